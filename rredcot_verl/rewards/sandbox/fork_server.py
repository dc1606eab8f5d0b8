"""A bare Python that forks cells: started once by a judge, without its environment, its modules or its files.

It holds nothing worth reading, and it is what every program is a copy of, which is why a program starts in
milliseconds.
"""

import fcntl
import gc
import json
import os
import re
import signal
import socket
import sys
from typing import Any, Literal

from rredcot_verl.rewards.sandbox import cell, filesystem, kernel, landlock, seccomp

MAX_FILES = 16
MAX_REQUEST_BYTES = 4096
# Imported once here, so that no program pays for them.
_PRELOADED = (
    "abc array atexit bisect builtins collections collections.abc copy dataclasses datetime decimal enum fractions "
    "functools heapq io itertools json math operator os queue random re statistics string sys threading time typing"
)
_FIRST_UID = 50000


def _trial(action: Any) -> str | None:
    """Try something in a process of its own; what went wrong, None if nothing did."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:
            os.write(tell, f"{type(error).__name__}: {error}"[:1000].encode())
        finally:
            os._exit(0)
    os.close(tell)
    with open(told, "rb") as answer:
        why_not = answer.read().decode(errors="replace")
    _, status = os.waitpid(pid, 0)
    return why_not or (None if status == 0 else f"ended with status {status}")


class Layering:
    """Finds out what holds here, and puts it up.

    Args:
        options: `packages`, `package_folders` and `disabled`, the names of layers that are not to be used.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._packages = options["packages"], options["package_folders"]
        self._disabled = set(options["disabled"])
        self.missing: dict[str, str] = {}
        self._is_root = os.geteuid() == 0

    def put_up(self) -> cell.Layers:
        """All layers that this machine has. Raises RuntimeError where they are too few to run anything."""
        uid = self._other_uid()
        ruleset, filtered = None, self._try("seccomp", self._seccomp)
        private = self._try("namespaces", self._namespaces)
        if private:
            self._enter_namespaces()
        else:
            if self._try("landlock", self._landlock):
                ruleset = fcntl.fcntl(self._ruleset(), fcntl.F_DUPFD_CLOEXEC, 100)
            if not filtered:
                raise RuntimeError("neither namespaces nor a system call filter can be had")
            if ruleset is None and uid is None:
                raise RuntimeError(
                    "neither namespaces nor Landlock nor a user of its own can be had: the program could read and "
                    "change what the trainer's user can"
                )
            if not self._try("interpreter", lambda: self._can_read_interpreter(uid)):
                raise RuntimeError(f"user {uid} cannot read the interpreter: {self.missing['interpreter']}")
        return cell.Layers(private, filtered, ruleset, uid, self._threads_counted(private, uid))

    def _threads_counted(self, private: bool, uid: int | None) -> Literal["cell", "user", "unknown"]:
        if uid is not None:
            return "cell"
        if not private:
            return "user"
        version = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
        # From then on, a user namespace counts for itself.
        if version >= (5, 14):
            return "cell"
        self.missing["thread limit"] = "needs Linux 5.14 where programs have the trainer's user"
        return "unknown"

    def _try(self, name: str, action: Any) -> bool:
        why_not = "disabled" if name in self._disabled else _trial(action)
        if why_not is not None:
            self.missing[name] = why_not
        return why_not is None

    def _other_uid(self) -> int | None:
        if not self._is_root:
            return None
        if not self._try("uid", self._change_uid):
            raise RuntimeError(f"started as root, and no other user can be become ({self.missing['uid']})")
        return _FIRST_UID

    @staticmethod
    def _change_uid() -> None:
        os.setgroups([])
        os.setresgid(_FIRST_UID, _FIRST_UID, _FIRST_UID)
        os.setresuid(_FIRST_UID, _FIRST_UID, _FIRST_UID)

    @staticmethod
    def _seccomp() -> None:
        if kernel.MACHINE not in seccomp.MACHINES:
            raise RuntimeError(f"no table of system calls for {kernel.MACHINE}")
        kernel.set_no_new_privileges()
        seccomp.install(seccomp.build_filter(own_pid=os.getpid(), may_fork=False, private=False))
        try:
            socket.socket()
        except PermissionError:
            return
        raise RuntimeError("the filter was accepted and does not filter")

    def _namespaces(self) -> None:
        self._enter_namespaces()
        kernel.unshare(kernel.CLONE_NEWPID | kernel.CLONE_NEWNS)
        kernel.mount("tmpfs", cell.WORKING_FOLDER, "tmpfs")

    def _enter_namespaces(self) -> None:
        flags = kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
        uid, gid = os.geteuid(), os.getegid()
        if self._is_root:
            kernel.unshare(flags)
        else:
            kernel.unshare(flags | kernel.CLONE_NEWUSER)
            for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        filesystem.enter_private_root(*self._packages, cell.WORKING_FOLDER)

    def _ruleset(self) -> int:
        return landlock.create_ruleset(*filesystem.readable_paths(*self._packages))

    def _landlock(self) -> None:
        ruleset = self._ruleset()
        kernel.set_no_new_privileges()
        landlock.restrict(ruleset)
        try:
            os.listdir("/")
        except PermissionError:
            return
        raise RuntimeError("the rules were accepted and do not hold")

    def _can_read_interpreter(self, uid: int | None) -> None:
        if uid is not None:
            self._change_uid()
        for path in (os.__file__, sys.executable):
            with open(path, "rb"):
                pass


def _serve(control: socket.socket, layers: cell.Layers) -> None:
    """Fork a keeper for every request until the judge closes its end."""
    number = 0
    while True:
        data, files, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, MAX_FILES)
        if not data:
            return
        number += 1
        try:
            if os.fork() == 0:
                try:
                    control.close()
                    cell.keep(json.loads(data), files, layers, number)
                finally:
                    os._exit(1)
        except OSError as error:
            cell.tell_status(files, {"error": f"fork: {error}"})
        for file in files:
            os.close(file)


def main() -> None:
    """Set up, say what could not be, serve. Options: one JSON object, the first argument."""
    options = json.loads(sys.argv[1])
    control = socket.socket(fileno=os.dup(0))
    null = os.open("/dev/null", os.O_RDWR)
    for file in (0, 1):
        os.dup2(null, file)
    os.setsid()
    _be_the_first_to_go()
    for name in _PRELOADED.split():
        __import__(name)
    _add_exit_and_quit()
    # Not the folder of this package, which the judge put there.
    sys.path[:] = [path for path in sys.path if path not in ("", options["own_folder"])]
    sys.meta_path.append(filesystem.ChosenPackages(options["packages"], options["package_folders"]))
    layering = Layering(options)
    try:
        layers = layering.put_up()
    except (RuntimeError, OSError) as error:
        control.send(json.dumps({"refused": str(error), "missing": layering.missing}).encode())
        return
    control.send(json.dumps({"refused": None, "missing": layering.missing}).encode())
    if layers.seccomp and layers.private:
        # A program is then number 1 of its namespace: one filter, which every cell inherits.
        for may_fork in (False, True):
            seccomp.build_filter(own_pid=1, may_fork=may_fork, private=True)
    # Keepers are nobody's to wait for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    gc.disable()
    gc.freeze()
    _serve(control, layers)


def _be_the_first_to_go() -> None:
    # If memory runs out all the same, a program is to be killed and not the trainer.
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:  # Not everywhere; the memory limit does not depend on it.
        pass


def _add_exit_and_quit() -> None:
    # The interpreter runs without `site`, which is what defines them.
    import site

    site.setquit()
    site.sethelper()
