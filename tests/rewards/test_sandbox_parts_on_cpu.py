"""The parts of the sandbox: values that cross it, outputs that match, what it refuses, how it ends."""

import fcntl
import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict, deque, namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from rredcot_verl.rewards.code_tests import CodeTests
from rredcot_verl.rewards.sandbox import filesystem
from rredcot_verl.rewards.sandbox import judge as judge_module
from rredcot_verl.rewards.sandbox.client import Limits, SandboxConfig, SandboxError, Server, get_server, sealed_file
from rredcot_verl.rewards.sandbox.compare import outputs_match
from rredcot_verl.rewards.sandbox.judge import judge
from rredcot_verl.rewards.sandbox.literals import Channel, Encoder, NotPlainError, decode
from rredcot_verl.rewards.sandbox.options import Options
from rredcot_verl.rewards.sandbox.syscall_numbers import numbers_of
from tests import PATIENCE_S

IS_ROOT = os.geteuid() == 0


def _across(value, **encoder):
    return decode(json.loads(json.dumps(Encoder(**encoder).encode(value))), lambda number: ("object", number))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**53),
        10**400,
        -0.0,
        1e-320,
        0.1,
        math.inf,
        -math.inf,
        1 + 2j,
        "",
        "\ud800 \0 ü",
        b"\xff\0",
        bytearray(b"x"),
        [],
        [1, [2.0, ["int", "0x3"]]],
        (),
        (1, (2,)),
        {},
        {1: "a", (1, 2): [None], "k": {True: 1.5}},
        set(),
        {1, "a", (2,)},
        frozenset({frozenset({1})}),
        range(3, 9, 2),
        deque([1, 2]),
    ],
)
def test_plain_values_arrive_as_they_left(value):
    arrived = _across(value)
    assert arrived == value and type(arrived) is type(value)
    assert repr(arrived) == repr(value)


@pytest.mark.parametrize("given", [{}, {(1, 2): [None]}, OrderedDict(a=1.5)], ids=repr)
def test_views_of_dictionaries_arrive_as_views(given):
    plain = dict(given)
    for view, expected in (
        (given.keys(), plain.keys()),
        (given.values(), plain.values()),
        (given.items(), plain.items()),
    ):
        arrived = _across(view, keep_subclasses=True)
        assert type(arrived) is type(expected) and list(arrived) == list(expected)


def test_nan_arrives():
    assert math.isnan(_across(math.nan))


def test_the_checker_sends_nothing_but_plain_values():
    for value in (object(), lambda: 0, Counter("a"), [OrderedDict()], int):
        with pytest.raises(NotPlainError):
            Encoder().encode(value)


def test_the_program_sends_subclasses_as_their_base():
    point = namedtuple("point", "x y")
    for value, base in ((Counter("aa"), dict), (point(1, 2), tuple), (OrderedDict(a=1), dict)):
        arrived = _across(value, keep_subclasses=True)
        assert type(arrived) is base and arrived == value
    assert list(_across((number for number in (1, 2)), keep_subclasses=True)) == [1, 2]


def test_objects_travel_as_numbers():
    assert _across([print], of_object=lambda value: 7) == [("object", 7)]


@pytest.mark.parametrize(
    "encoded",
    [
        {},
        1.5,
        [],
        ["list"],
        ["list", 1],
        ["int", 3],
        ["float", "x"],
        ["set", [["list", []]]],
        ["eval", "1"],
        ["dict", 1],
        ["dict_keys", [["list", []]]],
        ["dict_items", [1]],
        ["dict_values", 1],
    ]
    + [["object", True], ["object", "1"], ["range", [1, 2, 0]], ["bytes", "g"], [["list", []]], ["float", "0x1p99999"]],
    ids=str,
)
def test_nonsense_is_refused(encoded):
    with pytest.raises(ValueError, match="no encoded value|fromhex|invalid|zero|hexadecimal"):
        decode(encoded, lambda number: number)


def test_messages_are_bounded():
    reader, writer = os.pipe()
    os.write(writer, b"\xff\xff\xff\x7f")
    with pytest.raises(ValueError, match="at most"):
        Channel(reader, writer).receive()
    with pytest.raises(ValueError, match="at most"):
        Channel(reader, writer).send("x" * 2**25)
    os.close(writer)
    with pytest.raises(EOFError):
        Channel(reader, writer).receive()
    os.close(reader)


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ("3\n", "3", True),
        ("3  \n4\t\n\n", "3\n4", True),
        ("", "\n", True),
        ("3\n\n4", "3\n4", False),
        (" 3", "3", False),
        ("1  2", "1 2", False),
        ("12", "1 2", False),
        ("yes", "YES", False),
        ("0.3333333", "0.33333333333", True),
        ("0.3334", "0.3333", False),
        ("1000000.9", "1000000.0", True),
        ("1000002.0", "1000000.0", False),
        ("1", "1.0", True),
        ("1.0", "1", False),
        ("10000000001", "10000000000", False),
        ("1e3", "1000.0", True),
        ("nan", "1.0", False),
        ("inf", "1e999", False),
        ("1_0.0", "10.0", False),
        ("a 0.50 b", "a 0.5 b", True),
        ("a 0.50 c", "a 0.5 b", False),
        ("1\f2", "1\n2", False),
    ],
)
def test_outputs_match(actual, expected, same):
    assert outputs_match(actual, expected, 1e-6) is same


def test_system_call_numbers_are_the_kernels():
    headers = {
        "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
        "aarch64": "/usr/include/asm-generic/unistd.h",
    }
    known = {name: numbers_of(name) for name in headers}
    assert known["x86_64"]["openat"] == 257 and known["aarch64"]["openat"] == 56
    assert numbers_of("riscv64") == {}
    for machine, header in headers.items():
        if Path(header).exists():
            lines = [line.split() for line in Path(header).read_text().splitlines()]
            named = {words[1]: words[2] for words in lines if len(words) > 2 and words[0] == "#define"}
            for name, number in known[machine].items():
                for prefix in ("__NR_", "__NR3264_"):
                    if named.get(prefix + name, "").isdigit():
                        assert number == int(named[prefix + name]), name


def _refusal(*disabled: str) -> str:
    with pytest.raises(SandboxError) as refused:
        Server(SandboxConfig(disabled=frozenset(disabled)))
    return str(refused.value)


def test_nothing_is_run_without_enough_layers():
    message = _refusal("namespaces", "seccomp")
    assert "untrusted programs are not run here" in message and "sandbox_fusion_url" in message
    assert "'seccomp': 'disabled'" in message


@pytest.mark.skipif(not IS_ROOT, reason="only root has an identity to give up")
def test_nothing_is_run_as_root():
    assert "started as root" in _refusal("uid")


@pytest.mark.skipif(IS_ROOT, reason="root has another identity to give programs")
def test_nothing_is_run_where_the_users_files_are_open():
    assert "Landlock" in _refusal("namespaces", "landlock")


def test_missing_layers_are_warned_of(caplog, monkeypatch):
    server = Server(SandboxConfig())
    server.missing = {"seccomp": "no table of system calls for riscv64"}
    server._report_missing()
    assert "riscv64" in caplog.text
    server.close()


def test_packages_that_are_not_installed_are_warned_of(caplog):
    Server(SandboxConfig(packages=("no_such_package",))).close()
    assert "['no_such_package'] not installed" in caplog.text


def test_the_extra_installs_what_programs_may_import_by_default():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert SandboxConfig().packages == Options().packages == ("numpy", "sortedcontainers")
    assert 'code = ["sortedcontainers' in text
    pytest.importorskip("sortedcontainers")
    program = "from sortedcontainers import SortedList\nprint(SortedList([2, 1])[0])"
    assert judge(program, CodeTests("stdin", inputs=("",), outputs=("1",))).detail == ""


def test_an_interpreter_that_is_none_is_named():
    with pytest.raises(SandboxError, match="/nowhere/python"):
        Server(SandboxConfig(python="/nowhere/python"))
    with pytest.raises(ValueError, match="allowed"):
        SandboxConfig(disabled=frozenset({"all"}))


def test_installed_packages_are_outside_what_may_be_read(tmp_path):
    (tmp_path / "chosen").mkdir()
    (tmp_path / "other").mkdir()
    read, listed = filesystem.readable_paths(["chosen"], [str(tmp_path)])
    hidden = filesystem.hidden_paths()
    assert str(tmp_path / "chosen") in read and str(tmp_path / "other") not in read
    for path in hidden:
        assert not any(path == other or path.startswith(other + "/") for other in read)
    # The standard library is found by listing its folder, which holds that of the packages.
    stdlib = os.path.dirname(os.path.realpath(os.__file__))
    assert any(stdlib == path or stdlib.startswith(path + "/") for path in (*read, *listed))
    assert any(os.path.realpath(json.__file__).startswith(path) for path in read)


def test_chosen_packages_are_found_and_no_others(tmp_path):
    (tmp_path / "chosen.py").write_text("")
    (tmp_path / "other.py").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__init__.py").write_text("")
    finder = filesystem.ChosenPackages(["chosen", "folder", "absent"], [str(tmp_path)])
    assert finder.find_spec("chosen").origin == str(tmp_path / "chosen.py")
    assert finder.find_spec("folder").submodule_search_locations == [str(tmp_path / "folder")]
    assert finder.find_spec("other") is finder.find_spec("absent") is finder.find_spec("chosen.x", ["y"]) is None


ECHO = CodeTests("stdin", inputs=("a", "b"), outputs=("a", "b"))


def test_a_dead_server_is_replaced():
    config = SandboxConfig(packages=("a_name_of_its_own",))
    server = get_server(config)
    assert judge("print(input())", ECHO, config).num_passed == 2
    os.kill(server.pid, signal.SIGKILL)
    server._process.wait()
    assert judge("print(input())", ECHO, config).num_passed == 2
    assert get_server(config).pid != server.pid
    get_server(config).close()


def test_a_cell_ends_when_it_is_cancelled():
    server = get_server(SandboxConfig())
    files = [sealed_file(b""), os.memfd_create("out"), os.memfd_create("err")]
    with server.start("main", {"source": "while True: pass"}, Limits(time_limit_s=60), files) as cell:
        cell.cancel()
        ending = cell.wait()
    assert ending.cancelled and not ending.timed_out and ending.exit == -signal.SIGKILL
    for file in files:
        os.close(file)


FEW_FILES = """
import os, resource, time
from rredcot_verl.rewards.code_tests import CodeTests
from rredcot_verl.rewards.sandbox import judge as judging
from rredcot_verl.rewards.sandbox.client import SandboxConfig, SandboxError, Server, get_server

judging._RETRY_PAUSE_S = 0.0
server = get_server(SandboxConfig(packages=()))
config = SandboxConfig(packages=())
kinds = [CodeTests("stdin", inputs=("",), outputs=("",)), CodeTests("call", tests=("f()",))]
program = "def f(): return 1"
assert all(judging.judge(program, tests, config).num_passed == 1 for tests in kinds)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
before = os.listdir("/proc/self/fd")
first_free = max(map(int, before)) + 1
refused = passed = 0
for room in range(24):
    for tests in kinds:
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + room, hard))
        try:
            passed += judging.judge(program, tests, config).num_passed
        except SandboxError as error:
            refused += "Too many open files" in str(error)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert os.listdir("/proc/self/fd") == before, (room, tests.kind)
for room in range(6):
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + room, hard))
    try:
        Server(SandboxConfig(packages=())).close()
    except (OSError, SandboxError):
        pass
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.listdir("/proc/self/fd") == before, room
assert refused > 8 and passed > 8 and refused + passed == 48, (refused, passed)
assert all(judging.judge(program, tests, config).num_passed == 1 for tests in kinds)
server.close()
"""


def test_running_out_of_files_is_a_failure_of_the_sandbox_and_leaks_none():
    done = subprocess.run([sys.executable, "-c", FEW_FILES], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_file_that_cannot_be_written_is_closed(monkeypatch):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fcntl, "fcntl", no_room)
    gc.collect()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="No space"):
        sealed_file(b"x")
    assert not set(os.listdir("/proc/self/fd")) - set(before)


def test_a_program_is_judged_again_when_there_was_no_room_for_a_file(monkeypatch):
    answers = iter([OSError(24, "Too many open files"), get_server(SandboxConfig())])

    def server_or_error(config):
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(judge_module, "get_server", server_or_error)
    assert judge("print(input())", ECHO).num_passed == 2


ORPHAN = """
import os, sys
from rredcot_verl.rewards.sandbox.client import *
server = get_server(SandboxConfig(packages=()))
files = [sealed_file(b""), os.dup(1), os.memfd_create("err")]
source = "import time; print('started', flush=True); time.sleep(600)"
with server.start("main", {"source": source}, Limits(time_limit_s=600), files) as cell:
    cell.wait()
"""


def test_programs_end_with_the_trainer():
    trainer = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline() == "started\n"
    trainer.kill()
    trainer.wait()
    # The pipe ends when the last process that could write to it has.
    started = time.monotonic()
    assert trainer.stdout.read() == ""
    assert time.monotonic() - started < 300, "a program outlived its trainer"
    trainer.stdout.close()


def test_limits_of_the_problem_replace_the_options():
    tests = CodeTests("stdin", inputs=("",), outputs=("",), time_limit_s=2.0)
    late = judge("while True: pass", tests)
    assert late.timed_out and "more than 2 s" in late.detail
    hog = judge("x = b'x' * 2**27", replace(tests, time_limit_s=None, memory_limit_mb=64))
    assert hog.num_passed == 0 and "MemoryError" in hog.detail
