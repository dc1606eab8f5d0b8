"""A judge to attack: runs programs in a process of its own, beside things they could harm, and says what came of it.

Standard library only, and started as a script: it is also run as another user by an interpreter that has no packages.
"""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rredcot_verl.rewards.code_tests import parse_tests
from rredcot_verl.rewards.sandbox.client import Limits, SandboxConfig, get_server
from rredcot_verl.rewards.sandbox.judge import judge

_PROGRAM_UIDS = range(50000, 55000)


def _processes() -> dict[int, tuple[int, int]]:
    """Process id to parent and user of everything that runs; what has ended and waits for its parent is left out."""
    found = {}
    for name in os.listdir("/proc"):
        try:
            if name.isdigit():
                state, parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    found[int(name)] = int(parent), os.stat(f"/proc/{name}").st_uid
        except OSError:
            continue
    return found


def _left_over(own: set[int]) -> set[int]:
    """Processes that a sandbox left behind: of the programs' users, of this user, or below this process."""
    processes = _processes()
    ours = set()
    for pid, (parent, uid) in processes.items():
        line = {pid}
        while parent in processes and parent not in line:
            line.add(parent)
            parent = processes[parent][0]
        if uid in _PROGRAM_UIDS or os.getpid() in line or (os.getuid() != 0 and uid == os.getuid()):
            ours.add(pid)
    return ours - own


def main() -> None:
    """Read the programs, run them, write the verdicts."""
    given = json.load(sys.stdin)
    bystander = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(3600)"], stdout=subprocess.DEVNULL
    )
    tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind("\0" + given["mark"])
    abstract.listen()
    named = socket.socket(socket.AF_UNIX)
    named.bind(given["canary_folder"] + "/socket")
    named.listen()
    told = {
        "judge": os.getpid(),
        "bystander": bystander.pid,
        "canary_folder": given["canary_folder"],
        "secret_file": given["secret_file"],
        "mark": given["mark"],
        "tcp_port": tcp.getsockname()[1],
        "udp_port": udp.getsockname()[1],
    }
    config = SandboxConfig(packages=(), disabled=frozenset(given["disabled"]))
    server = get_server(config)

    def run(program: dict) -> dict:
        tests = dict(program["tests"])
        if tests["kind"] == "stdin":
            tests["inputs"] = [json.dumps(told) + "\n"]
        limits = Limits(**{"memory_mb": 512, **program["limits"]})
        started = time.monotonic()
        verdict = judge(program["source"], parse_tests(tests), config, limits, max(4.0, limits.time_limit_s))
        return {
            "num_passed": verdict.num_passed,
            "timed_out": verdict.timed_out,
            "detail": verdict.detail,
            "seconds": time.monotonic() - started,
        }

    with ThreadPoolExecutor(3) as threads:
        verdicts = dict(zip(given["programs"], threads.map(run, given["programs"].values()), strict=True))
    own = {os.getpid(), bystander.pid, server.pid}
    # Ended and not yet gone from the table is no harm.
    deadline = time.monotonic() + 60
    # What is there in every look: the programs of another world's sandbox, under users of the same range, come and go.
    left_over = _left_over(own)
    while left_over and time.monotonic() < deadline:
        time.sleep(0.05)
        left_over &= _left_over(own)
    told_afterwards = {
        "verdicts": verdicts,
        "missing": server.missing,
        "left_over": sorted(left_over),
        "bystander_alive": bystander.poll() is None,
        "bystander_priority": os.getpriority(os.PRIO_PROCESS, bystander.pid),
        "own_priority": os.getpriority(os.PRIO_PROCESS, 0),
        "server_alive": server.alive,
    }
    bystander.kill()
    bystander.wait()
    server.close()
    print(json.dumps(told_afterwards))


if __name__ == "__main__":
    main()
