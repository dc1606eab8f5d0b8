"""One run of one program: a keeper that watches and kills, and the process it keeps."""

import gc
import json
import math
import os
import resource
import select
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from rredcot_verl.rewards.sandbox import checker, descendants, kernel, landlock, program, seccomp

WORKING_FOLDER = "/sandbox"
# File descriptors of a request, in the order in which they are sent; others follow.
STATUS, LIFE, PAYLOAD, STDIN, STDOUT, STDERR = range(6)
_EXIT_REFUSED = 125
_MIB = 2**20


@dataclass(frozen=True)
class Layers:
    """What holds the programs of a server.

    Attributes:
        private: Namespaces. A mount namespace with nothing but the interpreter, and a working folder of its own; a
            process namespace for each program: it sees only itself and dies as a whole.
        seccomp: The filter on system calls.
        ruleset: Landlock's rule set, a file descriptor; None where it is not needed or not there.
        uid: User that programs run as: the first of `num_uids`, taken in turn; None: the server's own.
        threads_counted: By the kernel, against the limit: those of the program's `cell` alone, those of the whole
            `user`, or `unknown` (an older kernel, a namespace).
    """

    private: bool
    seccomp: bool
    ruleset: int | None
    uid: int | None
    threads_counted: Literal["cell", "user", "unknown"]
    num_uids: int = 4096


def keep(request: dict[str, Any], files: list[int], layers: Layers, number: int) -> NoReturn:
    """Run one program and report how it ended; called in a process forked for it, and never returns."""
    status: dict[str, Any] = {"error": "the keeper failed"}
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        kernel.set_subreaper()
        if layers.private:
            kernel.unshare(kernel.CLONE_NEWPID | kernel.CLONE_NEWNS)
        told, tell = os.pipe()
        deadline = time.monotonic() + request["time_limit_s"]
        pid = os.fork()
        if pid == 0:
            os.close(told)
            _become_program(request, files, layers, number, tell)
        os.close(tell)
        for file in files[PAYLOAD:]:
            os.close(file)
        status = _watch(pid, files[LIFE], deadline, layers)
        refusal = os.read(told, 4096)
        if refusal:
            status = {"error": refusal.decode(errors="replace")}
    except OSError as error:
        status = {"error": f"the sandbox could not start a program: {error}"}
    finally:
        tell_status(files, status)
        os._exit(0)


def tell_status(files: list[int], status: dict[str, Any]) -> None:
    """Report to the judge how a request ended."""
    os.write(files[STATUS], json.dumps(status).encode() + b"\n")


def _watch(pid: int, life: int, deadline: float, layers: Layers) -> dict[str, Any]:
    """Wait for the program, the deadline, or the judge's end of the life pipe; then kill whatever is left."""
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(life, select.POLLIN | select.POLLHUP)
    events = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    # Not reaped yet: the number still names this very process.
    os.kill(pid, signal.SIGKILL)
    _, wait_status = os.waitpid(pid, 0)
    if not layers.private:
        descendants.kill_all()
    return {
        "exit": os.waitstatus_to_exitcode(wait_status),
        "timed_out": not events,
        "cancelled": bool(events) and ended not in [file for file, _ in events],
    }


def _become_program(request: dict[str, Any], files: list[int], layers: Layers, number: int, tell: int) -> NoReturn:
    """Give up everything, then run what is not trusted."""
    try:
        # A process group reaches across process namespaces: the keeper must not be in the program's.
        os.setsid()
        tell, extra, payload = _arrange_files(request, files, tell)
        _enter(request, layers, number, num_files=tell + 1)
    except (OSError, ValueError, RuntimeError) as error:
        os.write(tell, f"the sandbox could not close a program in: {error}".encode())
        os._exit(_EXIT_REFUSED)
    os.close(tell)
    os._exit(_run(request["mode"], payload, extra))


def _arrange_files(request: dict[str, Any], files: list[int], tell: int) -> tuple[int, list[int], dict[str, Any]]:
    """0, 1, 2, what the mode needs, and nothing else; where `tell` and those are, and the payload."""
    with open(files[PAYLOAD], "rb") as payload_file:
        payload = json.loads(payload_file.read())
    extra = files[STDERR + 1 :]
    wanted = [files[STDIN], files[STDOUT], files[STDERR], *extra, tell]
    # First out of the way, then into place.
    aside = [os.dup2(file, 200 + position, inheritable=False) for position, file in enumerate(wanted)]
    for position, file in enumerate(aside):
        os.dup2(file, position, inheritable=True)
    return len(wanted) - 1, list(range(3, 3 + len(extra))), payload


def _enter(request: dict[str, Any], layers: Layers, number: int, num_files: int) -> None:
    """Limits, working folder, user, rights, filters: in the order in which each is still permitted."""
    # Before /proc is out of reach.
    threads_before = descendants.count_threads(os.getuid()) if layers.threads_counted == "user" else 0
    # The rule set's own descriptor is needed until the end; it goes when everything else is closed.
    ruleset = None if layers.ruleset is None else os.dup2(layers.ruleset, num_files)
    os.closerange(num_files + (ruleset is not None), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    os.umask(0o077)
    if layers.private:
        size = f"size={request['disk_mb']}m,nr_inodes=1024,mode=777"
        flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        kernel.mount("tmpfs", WORKING_FOLDER, "tmpfs", flags, size)
        os.chdir(WORKING_FOLDER)
        sys.path.insert(0, WORKING_FOLDER)
    else:
        os.chdir("/")
    kernel.drop_capabilities()
    if layers.uid is not None:
        uid = layers.uid + number % layers.num_uids
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    kernel.clear_capabilities()
    if 0 in os.getresuid():
        raise RuntimeError("the program would run as root")
    _set_limits(request, None if layers.threads_counted == "unknown" else threads_before + request["max_threads"])
    # After the change of user, which clears it.
    kernel.set_dies_with_parent()
    kernel.set_no_new_privileges()
    kernel.set_not_dumpable()
    if ruleset is not None:
        landlock.restrict(ruleset)
        os.close(ruleset)
    if layers.seccomp:
        seccomp.install(
            seccomp.build_filter(own_pid=os.getpid(), may_fork=request["max_processes"] > 1, private=layers.private)
        )


def _set_limits(request: dict[str, Any], max_threads: int | None) -> None:
    limits = {
        resource.RLIMIT_AS: request["memory_mb"] * _MIB,
        resource.RLIMIT_CPU: math.ceil(request["time_limit_s"]) + 1,
        resource.RLIMIT_FSIZE: request["output_mb"] * _MIB,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if max_threads is not None:
        limits[resource.RLIMIT_NPROC] = max_threads
    for name, limit in limits.items():
        hard = resource.getrlimit(name)[1]
        allowed = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(name, (allowed, allowed))


def _run(mode: str, payload: dict[str, Any], extra: list[int]) -> int:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    gc.enable()
    # New objects on the new descriptors: the server's were on others, and hold a lock each.
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="replace", closefd=False)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # type: ignore[misc]
    if mode == "main":
        return program.run_main(payload["source"])
    if mode == "serve":
        program.serve(payload["source"], *extra)
    else:
        checker.check(payload, *extra)
    return 0
