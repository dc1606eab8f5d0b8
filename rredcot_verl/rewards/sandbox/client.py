"""The judge's side of a cell: starts the server, has programs run, and reads how they ended."""

import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import rredcot_verl
from rredcot_verl.rewards.line_reader import LineReader
from rredcot_verl.rewards.sandbox.filesystem import package_paths

logger = logging.getLogger(__name__)

_START = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from rredcot_verl.rewards.sandbox import fork_server; fork_server.main()"
)
_START_TIMEOUT_S = 60.0
# What a keeper may need beyond the time limit to kill, reap and report.
_GRACE_S = 10.0
_MAX_HELLO_BYTES = 65536
# All that a program finds in its environment. Numerical libraries would start a thread a core.
_ENVIRONMENT = {
    "HOME": "/sandbox",
    "LANG": "C.UTF-8",
    "TMPDIR": "/sandbox",
    "PATH": "/usr/bin:/bin",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
LAYERS = ("namespaces", "landlock", "seccomp", "uid")
_WHAT_TO_DO = (
    "Ways out: start the container with user namespaces allowed (Docker: --security-opt seccomp=unconfined, or "
    "--cap-add SYS_ADMIN), run as a user that is not root on a kernel with Landlock (5.13), or have programs run by a "
    "service: sandbox_fusion_url"
)


class SandboxError(RuntimeError):
    """Programs cannot be run safely here, or the sandbox itself failed. Says nothing about a program."""


@dataclass(frozen=True)
class SandboxConfig:
    """What programs run with.

    Attributes:
        python: Interpreter; any CPython from 3.10 on.
        packages: Installed packages that programs may import. All others are hidden: some hold data sets with
            solutions.
        disabled: Layers not to be used, out of `LAYERS`; for tests.
    """

    python: str = sys.executable
    packages: tuple[str, ...] = ("numpy", "sortedcontainers")
    disabled: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        unknown = sorted(self.disabled - set(LAYERS))
        if unknown:
            raise ValueError(f"disabled={unknown} is not allowed; allowed: {list(LAYERS)}")


@dataclass(frozen=True)
class Limits:
    """Limits of one cell.

    Attributes:
        time_limit_s: Seconds by the clock from start to end.
        memory_mb: MiB of address space of each process.
        output_mb: MiB that one file may have, standard output included.
        disk_mb: MiB that the working folder may hold; it lives in memory.
        max_processes: 1: no process can be started. More: bounded by `max_threads`.
        max_threads: Threads and processes of the program's user at one time.
    """

    time_limit_s: float = 10.0
    memory_mb: int = 1024
    output_mb: int = 16
    disk_mb: int = 16
    max_processes: int = 1
    max_threads: int = 64


@dataclass(frozen=True)
class Ending:
    """How a cell ended.

    Attributes:
        exit: Exit status; minus the signal's number if one ended it.
        timed_out: Whether the time limit ended it.
        cancelled: Whether the judge ended it.
    """

    exit: int
    timed_out: bool
    cancelled: bool


class Cell:
    """A program that runs. Use as a context manager: leaving it ends the program."""

    def __init__(self, status: int, life: int, deadline: float) -> None:
        self._status = status
        self._life = life
        self._deadline = deadline
        self._ending: Ending | None = None

    def __enter__(self) -> "Cell":
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        try:
            self.wait()
        finally:
            os.close(self._status)

    def cancel(self) -> None:
        """End the program, and all it started, now."""
        if self._life >= 0:
            os.close(self._life)
            self._life = -1

    def wait(self) -> Ending:
        """Wait for the end. Raises SandboxError if the sandbox could not run it or does not report."""
        if self._ending is None:
            try:
                fields = json.loads(LineReader(self._status).read_line(self._deadline))
            except TimeoutError as error:
                self.cancel()
                raise SandboxError("a keeper did not report in time") from error
            except EOFError as error:
                raise SandboxError("a keeper ended without a report") from error
            if "error" in fields:
                raise SandboxError(fields["error"])
            self._ending = Ending(**fields)
        return self._ending


_ASK_FOR_FOLDERS = (
    "import json, site, sysconfig; paths = sysconfig.get_paths(); "
    "print(json.dumps([*site.getsitepackages(), paths['purelib'], paths['platlib']]))"
)


@lru_cache
def _package_folders(python: str) -> tuple[str, ...]:
    try:
        answer = subprocess.run([python, "-I", "-c", _ASK_FOR_FOLDERS], capture_output=True, check=True, text=True)
        return tuple(dict.fromkeys(json.loads(answer.stdout)))
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise SandboxError(f"python={python!r} is not an interpreter that can be run: {error}") from error


class Server:
    """The bare Python that forks cells. One a process and configuration: see `get_server`.

    Attributes:
        pid: Its process id.
        missing: Layers that could not be had, and why.
    """

    def __init__(self, config: SandboxConfig) -> None:
        own_folder = str(Path(rredcot_verl.__file__).resolve().parents[1])
        package_folders = list(_package_folders(config.python))
        absent = [name for name in config.packages if not package_paths([name], package_folders)]
        if absent:
            logger.warning(
                "packages=%s: %s not installed for %s, so programs that import them fail; install them (the extra "
                "rredcot_verl[code] has those of the default), or name others",
                list(config.packages),
                absent,
                config.python,
            )
        options = {
            "packages": list(config.packages),
            "package_folders": package_folders,
            "disabled": sorted(config.disabled),
            "own_folder": own_folder,
        }
        command = [config.python, "-S", "-s", "-B", "-c", _START, own_folder, json.dumps(options)]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ExitStack() as if_it_fails, theirs:
            if_it_fails.enter_context(ours)
            complaints = closed_with(if_it_fails, os.memfd_create("complaints"))
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=complaints,
                    env=_ENVIRONMENT,
                    cwd="/",
                )
            except OSError as error:
                raise SandboxError(f"python={config.python!r} cannot be started: {error}") from error
            if_it_fails.pop_all()
        self._control = ours
        self.pid = self._process.pid
        with open(complaints, "rb") as complaint_file:
            self.missing = self._read_hello(complaint_file.fileno())
        self._report_missing()

    def _read_hello(self, complaints: int) -> dict[str, str]:
        self._control.settimeout(_START_TIMEOUT_S)
        try:
            hello = self._control.recv(_MAX_HELLO_BYTES)
        except TimeoutError as error:
            self.close()
            raise SandboxError(f"the sandbox did not start within {_START_TIMEOUT_S:.0f} s") from error
        self._control.settimeout(None)
        if not hello:
            self.close()
            told = os.pread(complaints, 4096, 0).decode(errors="replace")
            raise SandboxError(f"the sandbox did not start: {told}")
        fields = json.loads(hello)
        if fields["refused"] is not None:
            self.close()
            raise SandboxError(
                f"untrusted programs are not run here: {fields['refused']} (missing: {fields['missing']}). "
                f"{_WHAT_TO_DO}"
            )
        return dict(fields["missing"])

    def _report_missing(self) -> None:
        # Without namespaces Landlock stands in for them, and with them it is not needed.
        missing = {layer: why for layer, why in self.missing.items() if why != "disabled"}
        if missing:
            told = "; ".join(f"{layer}: {why}" for layer, why in missing.items())
            logger.warning("The sandbox for untrusted programs runs without some of its layers. %s", told)

    @property
    def alive(self) -> bool:
        """Whether it can run programs."""
        return self._process.poll() is None

    def start(self, mode: str, payload: dict[str, Any], limits: Limits, files: Sequence[int]) -> Cell:
        """Start a program.

        Args:
            mode: `main`, `serve` or `check`.
            payload: What the mode needs, read by the cell and then closed.
            limits: Its limits.
            files: Standard input, output and error, then what the mode needs. They stay the caller's to close.

        Raises:
            SandboxError: The server is gone.
            OSError: No more files can be opened.
        """
        request = {"mode": mode, **asdict(limits)}
        with ExitStack() as if_it_fails:
            with ExitStack() as theirs:
                status_reader, status_writer = os.pipe()
                closed_with(if_it_fails, status_reader)
                closed_with(theirs, status_writer)
                life_reader, life_writer = os.pipe()
                closed_with(if_it_fails, life_writer)
                closed_with(theirs, life_reader)
                payload_file = closed_with(theirs, sealed_file(json.dumps(payload).encode()))
                sent = [status_writer, life_reader, payload_file, *files]
                try:
                    socket.send_fds(self._control, [json.dumps(request).encode()], sent)
                except OSError as error:
                    raise SandboxError(f"the sandbox's server has ended: {error}") from error
            if_it_fails.pop_all()
        return Cell(status_reader, life_writer, time.monotonic() + limits.time_limit_s + _GRACE_S)

    def close(self) -> None:
        """End the server. Programs that run are ended by their own cells."""
        self._control.close()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def closed_with(stack: ExitStack, file: int) -> int:
    """A file descriptor, which is closed with the stack."""
    stack.callback(os.close, file)
    return file


def pipe_on(stack: ExitStack) -> tuple[int, int]:
    """A pipe, reading end first, that is closed with the stack."""
    reader, writer = os.pipe()
    return closed_with(stack, reader), closed_with(stack, writer)


def sealed_file(data: bytes) -> int:
    """A file in memory that nobody can change, at its start; the caller closes it."""
    file = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with ExitStack() as if_it_fails:
        closed_with(if_it_fails, file)
        with open(file, "wb", closefd=False) as writer:
            writer.write(data)
        os.lseek(file, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        if_it_fails.pop_all()
    return file


_servers: dict[tuple[int, SandboxConfig], Server] = {}
_lock = threading.Lock()


def get_server(config: SandboxConfig) -> Server:
    """The server of this process for a configuration; started if there is none. Raises SandboxError."""
    key = (os.getpid(), config)
    with _lock:
        server = _servers.get(key)
        if server is None or not server.alive:
            server = _servers[key] = Server(config)
        return server
