"""The line that says what a run is doing."""

import inspect
import os
import re
import secrets
import subprocess
import sys

import pytest

from rredcot_verl import live
from rredcot_verl.live import GENERATED, MEASURED, PASSED, VERIFIED, Board
from tests import PATIENCE_S


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def board(clock):
    return Board(clock)


def test_the_line_from_the_first_second(board, clock):
    clock.now = 3
    assert board.line(60) == "rredcot: step 0, starting for 3 s; last sign of life 3 s ago"
    board.enter("loading models and servers")
    clock.now = 10
    assert board.line(60) == "rredcot: step 0, loading models and servers for 7 s; last sign of life 7 s ago"


def test_responses_are_counted_by_step(board, clock):
    board.begin_step(1)
    for stage in (GENERATED, VERIFIED):
        board.tell(stage, 3, 0)
        board.tell(stage, 0, 2)
    assert "; 2 generated and 1 under way; 2 verified and 1 under way; last" in board.line(60)
    # What is still under way goes on into the next step.
    board.begin_step(2)
    board.tell(GENERATED, 0, 1)
    assert board.line(60).startswith("rredcot: step 2, generating for 0 s; 1 generated; 0 verified and 1 under way;")


def test_what_hangs_is_named(board, clock):
    board.begin_step(1)
    board.tell(VERIFIED, 2, 0)
    board.tell(VERIFIED, 0, 1)
    clock.now = 59
    assert "none ended" not in board.line(60)
    # Others of its kind that begin do not hide it.
    board.tell(VERIFIED, 1, 0)
    board.tell(GENERATED, 1, 0)
    clock.now = 100
    line = board.line(60)
    assert "1 verified and 2 under way (none ended for 100 s)" in line
    assert "1 under way;" in line and line.endswith("last sign of life 41 s ago")


def test_phases_are_left_for_what_was_done_before(board, clock):
    board.begin_step(1)
    board.enter("updating the policy")
    board.tell(PASSED, 1, 0)
    board.tell(PASSED, 0, 1)
    board.tell(PASSED, 1, 1)
    assert "updating the policy for 0 s; 2 passes; last" in board.line(60)
    clock.now = 5
    board.leave()
    assert "generating for 0 s; last" in board.line(60)


def test_a_pass_that_ends_after_its_phase_is_counted_once(board):
    board.begin_step(1)
    board.enter("updating the policy")
    board.tell(PASSED, 1, 0)
    board.leave()
    board.tell(PASSED, 0, 1)
    assert "generating for 0 s; 1 passes; last" in board.line(60)


def test_the_longest_silence_is_a_steps(board, clock):
    board.begin_step(1)
    for clock.now in (4, 11, 12):
        board.tell(MEASURED, 1, 1)
    clock.now = 15
    assert board.longest_silence() == 7
    board.begin_step(2)
    clock.now = 17
    assert board.longest_silence() == 2


@pytest.mark.parametrize("early", [True, False])
def test_what_is_under_way_ends_once(monkeypatch, early):
    told = []
    monkeypatch.setattr(live, "tell", lambda stage, begun=0, ended=0: told.append((stage, begun, ended)))
    with pytest.raises(RuntimeError), live.under_way(VERIFIED) as end:
        if early:
            end()
            assert told[-1] == (VERIFIED, 0, 1)
        raise RuntimeError
    assert told == [(VERIFIED, 1, 0), (VERIFIED, 0, 1)]


def test_without_a_run_nobody_is_told():
    live._board.cache_clear()
    live.tell(GENERATED, begun=1)


def test_phases_name_methods_of_verls_trainers():
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    from rredcot_verl.trainer.phases import PHASES, PhasesMixin

    for name in PHASES:
        assert inspect.isfunction(getattr(PPOTrainer, name)) and name in vars(PhasesMixin)


DIES = """
import ray, sys, threading, time
from rredcot_verl import live

ray.init(num_cpus=1, include_dashboard=False, _temp_dir=sys.argv[1], log_to_driver=False)
line = live.LiveLine(0.2)
[printing] = [thread for thread in threading.enumerate() if thread.name == "rredcot-live"]
line.begin_step(3)
with line.phase("updating the policy"), live.under_way(live.VERIFIED):
    ray.get(line._board.longest_silence.remote())  # It has started, and heard of both.
    time.sleep(5)
live._READ_TIMEOUT_S = float(sys.argv[2])
assert line.metrics()["rredcot/silence_seconds/max"] > 4
ray.kill(line._board)
while line.metrics():  # It is told to end, and answers until it has.
    time.sleep(0.1)
with line.phase("updating the policy"):
    live.tell(live.GENERATED, begun=1)
line.begin_step(4)
assert line.metrics() == {}
printing.join(float(sys.argv[2]))
assert not printing.is_alive()
print("went on")
"""


@pytest.mark.run
def test_a_run_goes_on_without_its_board(tmp_path, ray_folder):
    token = tmp_path / "ray_token"
    token.write_text(secrets.token_hex(32))
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", DIES, f"{ray_folder}/r", str(PATIENCE_S)],
        env=environment | {"RAY_AUTH_TOKEN_PATH": str(token)},
        text=True,
        capture_output=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "went on" in done.stdout
    assert re.search(r"rredcot: step 3, updating the policy for \d+ s; 0 verified and 1 under way", done.stderr)
