"""The math verifier's processes: limits that hold, no harm to the caller, nothing left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from rredcot_verl.rewards import math, verifier_processes
from rredcot_verl.rewards.math import close_processes, compute_score, why_unusable
from rredcot_verl.rewards.verifier_processes import LateOrDeadError, VerifierProcesses
from tests import PATIENCE_S

MODULE = "rredcot_verl.rewards.math_worker"
EASY = {"golds": ["x+1"], "parts": ["1+x"]}
ENDLESS = {"golds": ["9^{9^{9^9}}"], "parts": ["\\frac{x}{2}"]}
# The address space a process may use runs out, or its time does.
N = 100_000


@pytest.fixture(scope="module")
def processes():
    pool = VerifierProcesses(MODULE, 1)
    yield pool
    pool.close()


def _is_running(process_id):
    try:
        with open(f"/proc/{process_id}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until_ended(process_ids):
    deadline = time.monotonic() + PATIENCE_S
    while any(map(_is_running, process_ids)):
        assert time.monotonic() < deadline, "processes outlive what started them"
        time.sleep(0.05)


def test_a_late_process_is_killed_and_replaced(processes):
    assert processes.call_and_wait(EASY, 60)["is_equal"] is True
    late = processes.process_ids()
    with pytest.raises(LateOrDeadError, match="no answer within 0.5 s"):
        processes.call_and_wait(ENDLESS, 0.5)
    assert not any(map(_is_running, late))
    assert processes.call_and_wait(EASY, 60)["is_equal"] is True
    assert processes.process_ids() != late


def test_a_process_that_dies_is_replaced(processes):
    processes.call_and_wait(EASY, 60)

    async def kill_while_busy():
        request = asyncio.ensure_future(processes.call(ENDLESS, 60))
        await asyncio.sleep(0.2)
        os.kill(processes.process_ids()[0], signal.SIGKILL)
        with pytest.raises(LateOrDeadError, match="ended"):
            await request

    asyncio.run(kill_while_busy())
    assert processes.call_and_wait(EASY, 60)["is_equal"] is True


def test_a_process_that_died_between_requests_is_reported_once(processes):
    processes.call_and_wait(EASY, 60)
    os.kill(processes.process_ids()[0], signal.SIGKILL)
    _wait_until_ended(processes.process_ids())
    with pytest.raises(LateOrDeadError, match="ended"):
        processes.call_and_wait(EASY, 60)
    assert processes.call_and_wait(EASY, 60)["is_equal"] is True


def test_processes_are_recycled(processes, monkeypatch):
    seen = []
    # The first call finds a process that has had enough.
    for max_calls in (0, 2, 2, 2):
        monkeypatch.setattr(verifier_processes, "MAX_CALLS", max_calls)
        processes.call_and_wait(EASY, 60)
        seen += processes.process_ids()
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert not _is_running(seen[0])


def test_the_event_loop_goes_on_while_an_answer_is_judged():
    finished = []

    async def judge(name, response, gold, timeout_s):
        result = await compute_score("test", response, gold, timeout_s=timeout_s, num_processes=2)
        finished.append(name)
        return result

    async def both():
        await judge("warm", "\\boxed{1+x}", "x+1", 60)
        late = asyncio.ensure_future(judge("late", "\\boxed{9^{9^{9^9}}}", "x+1", 3.0))
        await asyncio.sleep(0)
        results = await asyncio.gather(*(judge("easy", f"\\boxed{{{k}}}", str(k), 60) for k in range(50)))
        assert all(result["score"] == 1.0 for result in results)
        return await late

    result = asyncio.run(both())
    assert finished == ["warm"] + ["easy"] * 50 + ["late"]
    assert (result["score"], result["timed_out"]) == (0.0, 1.0)


def test_a_new_event_loop_finds_the_same_processes():
    for _ in range(2):
        result = asyncio.run(compute_score("test", "\\boxed{1+x}", "x+1", timeout_s=60))
        assert result["score"] == 1.0


def test_who_checked_ground_truths_can_end_the_processes():
    for _ in range(2):
        assert why_unusable("x^2 + y", timeout_s=60) is None
        running = [process_id for pool in math._started.values() for process_id in pool.process_ids()]
        assert running and all(map(_is_running, running))
        close_processes()
        assert not any(map(_is_running, running)) and not math._started


@pytest.mark.parametrize(
    "answer",
    {
        "digits": "9" * N,
        "parentheses": "(" * N + ")" * N,
        "braces": "{" * N + "}" * N,
        "fractions": "\\frac{1}{" * 300 + "2" + "}" * 300,
        "a tower of fractions": "\\frac{1}{1+" * 30 + "1" + "}" * 30,
        "a power": "10^{10^{10}}",
        "a factorial": "(10^9)!",
        "signs": "-" * 900 + "5",
        "an exponent": "1e999999999",
        "text": "\\text{" * 150 + "}" * 150,
        "commas": "1," * 499 + "1",
        "a nul": "\x00 5",
    }.values(),
    ids=lambda answer: answer[:12],
)
def test_huge_answers_are_wrong_and_harm_nothing(answer):
    result = asyncio.run(compute_score("test", f"\\boxed{{{answer}}}", "x^2+1", timeout_s=0.5))
    assert result["score"] == 0.0 and len(result["pred"]) <= 1000
    assert result["answer_start"] == 0.0


@pytest.mark.parametrize(
    "response", ["\\boxed{" * N, "Answer: " + "*" * N, "Answer: " * N + "\n", "<think>" * N + "\\boxed{5}"]
)
def test_huge_responses_are_searched(response):
    result = asyncio.run(compute_score("test", response, "5"))
    assert result["score"] == 0.0


def test_no_process_outlives_its_parent():
    """The parent is killed while one process works and one waits."""
    code = (
        "import asyncio, sys\n"
        "from rredcot_verl.rewards.verifier_processes import VerifierProcesses\n"
        f"pool = VerifierProcesses({MODULE!r}, 2)\n"
        f"easy, endless = {EASY!r}, {ENDLESS!r}\n"
        "async def main():\n"
        "    await asyncio.gather(pool.call(easy, 60), pool.call(easy, 60))\n"
        "    late = asyncio.ensure_future(pool.call(endless, 600))\n"
        "    await asyncio.sleep(0.2)\n"
        "    print(*pool.process_ids(), flush=True)\n"
        "    await late\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process_ids = [int(word) for word in parent.stdout.readline().split()]
    assert len(process_ids) == 2 and all(map(_is_running, process_ids))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    _wait_until_ended(process_ids)


def test_a_process_imports_neither_torch_nor_verl_nor_ray():
    code = (
        "import sys, rredcot_verl.rewards.math_worker, rredcot_verl.rewards.math_library\n"
        "found = {'torch', 'verl', 'ray', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_module_that_cannot_start_is_named(monkeypatch):
    pool = VerifierProcesses("rredcot_verl.rewards.no_such_module", 1)
    with pytest.raises(RuntimeError, match="no_such_module` did not start"):
        pool.call_and_wait(EASY, 5)
    pool.close()


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "2"])
def test_the_number_of_processes_is_checked(number):
    with pytest.raises(ValueError, match="reward_kwargs.num_processes="):
        VerifierProcesses(MODULE, number)
