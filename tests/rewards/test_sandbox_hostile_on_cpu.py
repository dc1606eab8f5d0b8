"""Hostile programs: none passes, none harms, none outlives its time; with all layers, and with one after another gone.

Every program has a small bound of its own (64 forks, 512 MiB, 64 MiB written), so that a hole fails the test and not
the machine.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests import PATIENCE_S

ROOT = Path(__file__).parents[2]
WORLD = Path(__file__).with_name("hostile_world.py")
ALONE = sorted((Path(__file__).parent / "hostile/alone").glob("*.py"))
CALLED = sorted((Path(__file__).parent / "hostile/called").glob("*.py"))
# Nobody's: what runs under it was started here.
OTHER_USER = 61234
# An interpreter that another user can run, for the worlds that are not this user's or leave its files readable.
SYSTEM_PYTHON = "/usr/bin/python3"
MARK = "mark-of-a-hostile-program"
IS_ROOT = os.geteuid() == 0

# Name: layers left out, whether it runs as another user.
WORLDS = {
    "all_layers": ((), False),
    "other_user": ((), True),
    "no_namespaces": (("namespaces",), False),
    "other_user_no_namespaces": (("namespaces",), True),
    "no_seccomp": (("seccomp",), False),
}


def _header(source: str, name: str) -> str | None:
    found = re.search(rf"^# {name}: (.*)$", source, re.MULTILINE)
    return found.group(1) if found else None


def _programs(world: str) -> dict[str, dict]:
    programs = {}
    for path in ALONE:
        source = path.read_text()
        if world not in (_header(source, "not") or ""):
            # Room enough for those that end by themselves, however busy the machine is.
            seconds = 1.0 if _header(source, "outcome") == "timed_out" else 60.0
            limits = {"time_limit_s": seconds} | json.loads(_header(source, "limits") or "{}")
            tests = {"kind": "stdin", "inputs": [""], "outputs": ["held\n"]}
            programs[path.stem] = {"source": source, "limits": limits, "tests": tests}
    asserts = [f"assert answer({number}) == {2 * number}" for number in (20, 21)]
    tests = {"kind": "call", "entry_point": "answer", "tests": asserts}
    for path in CALLED:
        limits = {"time_limit_s": 1.0 if path.stem.startswith("endless_") else 60.0}
        programs[f"called_{path.stem}"] = {"source": path.read_text(), "limits": limits, "tests": tests}
    good = "def answer(x):\n    return 2 * x\n"
    return programs | {"called_good": {"source": good, "limits": {"time_limit_s": 60.0}, "tests": tests}}


def _python_of(world: str) -> str:
    disabled, other_user = WORLDS[world]
    if not IS_ROOT:
        if other_user:
            pytest.skip("only root can become another user")
        return sys.executable
    if not other_user and "namespaces" not in disabled:
        return sys.executable
    # Programs then read the interpreter as a user who may not even enter the folder of this one.
    for python in (sys.executable, SYSTEM_PYTHON):
        code = "import sys, socket; sys.exit(sys.version_info < (3, 10))"
        user = {"user": OTHER_USER, "group": OTHER_USER, "extra_groups": []}
        try:
            started = subprocess.run([python, "-c", code], env={}, capture_output=True, **user)
        except OSError:
            continue
        if started.returncode == 0:
            return python
    pytest.skip("no interpreter of Python 3.10 that another user can run")


class World:
    """What came of the programs of one world, and what the folder beside them looks like."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        canary_folder = folder / "canary_folder"
        canary_folder.mkdir()
        canary_folder.chmod(0o777)
        (canary_folder / "canary").write_text("sings")
        (canary_folder / "canary").chmod(0o666)
        (folder / "secret-solution.py").write_text("def answer(x): return 2 * x")
        self.mark = f"{MARK}-{name}-{os.getpid()}"
        disabled, other_user = WORLDS[name]
        given = {
            "programs": _programs(name),
            "disabled": disabled,
            "canary_folder": str(canary_folder),
            "secret_file": str(folder / "secret-solution.py"),
            "mark": self.mark,
        }
        user = {"user": OTHER_USER, "group": OTHER_USER, "extra_groups": []} if other_user else {}
        done = subprocess.run(
            [_python_of(name), "-B", str(WORLD)],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            cwd=folder,
            env={"PYTHONPATH": str(ROOT), "TRAINER_PASSWORD": "secret-of-the-trainer"},
            timeout=PATIENCE_S,
            **user,
        )
        if name != "all_layers" and "untrusted programs are not run here" in done.stderr:
            pytest.skip("this machine lacks another layer too, and rightly nothing is run")
        assert done.returncode == 0, done.stderr
        self.came_of_it = json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=WORLDS)
def world(request):
    # Not tmp_path: another user may not enter it.
    folder = Path(tempfile.mkdtemp(prefix="hostile"))
    folder.chmod(0o755)
    try:
        yield request.param, World(request.param, folder)
    finally:
        shutil.rmtree(folder)


def _came_of(world: tuple[str, World], name: str) -> dict:
    verdicts = world[1].came_of_it["verdicts"]
    if name not in verdicts:
        pytest.skip("needs the layer that is left out here")
    return verdicts[name]


@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.stem)
def test_program_is_held(world, path):
    wanted = _header(path.read_text(), "outcome")
    verdict = _came_of(world, path.stem)
    outcome = "timed_out" if verdict["timed_out"] else "held" if verdict["num_passed"] == 1 else "failed"
    assert outcome in wanted.split("_or_"), verdict


@pytest.mark.parametrize("path", CALLED, ids=lambda path: path.stem)
def test_program_passes_no_test(world, path):
    verdict = _came_of(world, f"called_{path.stem}")
    assert verdict["num_passed"] == 0, verdict
    assert verdict["timed_out"] or not path.stem.startswith("endless_")


def test_good_program_passes(world):
    assert _came_of(world, "called_good")["num_passed"] == 2


def test_nothing_is_left_and_nobody_is_hurt(world):
    _, found = world
    came_of_it = found.came_of_it
    assert came_of_it["left_over"] == []
    assert came_of_it["bystander_alive"] and came_of_it["server_alive"]
    # Also where the tests themselves run under `nice`.
    own_priority = os.getpriority(os.PRIO_PROCESS, 0)
    assert came_of_it["bystander_priority"] == came_of_it["own_priority"] == own_priority
    canary_folder = found.folder / "canary_folder"
    assert sorted(path.name for path in canary_folder.iterdir()) == ["canary", "socket"]
    assert (canary_folder / "canary").read_text() == "sings"
    assert sorted(path.name for path in found.folder.iterdir()) == ["canary_folder", "secret-solution.py"]
    interpreter, library = os.path.dirname(sys.executable), os.path.dirname(os.__file__)
    for folder in ("/tmp", "/var/tmp", "/dev/shm", "/", "/etc", interpreter, library, Path.home()):
        assert not (Path(folder) / found.mark).exists()


def test_missing_layers_are_reported(world):
    name, found = world
    assert set(WORLDS[name][0]) <= set(found.came_of_it["missing"])
