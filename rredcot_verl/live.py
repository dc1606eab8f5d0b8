"""A line that says what a run is doing, every so often.

Whoever begins or ends something tells a board, a small actor of the run, in a message that nobody waits for; the
trainer tells it the phase, and prints what it says, to stderr.
"""

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

TOKENS, GENERATED, VERIFIED, MEASURED, PASSED = "tokens of a batch", "generated", "verified", "measured", "passes"
"""What is told: tokens of the CPU server's batches, responses that are generated, verified and measured, and passes of
the first training rank."""

_READ_TIMEOUT_S = 10.0


@dataclass
class Stage:
    """Counts of a stage, and since when nothing of it has ended.

    Attributes:
        under_way: Begun and not ended.
        ended: In this step; of passes in this phase.
        quiet_since: When one last ended, or the first of those under way began; seconds of the clock.
    """

    under_way: int = 0
    ended: int = 0
    quiet_since: float = 0.0


class Board:
    """Knows what is under way.

    Args:
        clock: Gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stages = {name: Stage() for name in (TOKENS, GENERATED, VERIFIED, MEASURED, PASSED)}
        self._step = 0
        self._phases = [("starting", clock())]
        self._heard, self._longest = clock(), 0.0

    def _hear(self) -> float:
        now = self._clock()
        self._longest = max(self._longest, now - self._heard)
        self._heard = now
        return now

    def tell(self, stage: str, begun: int, ended: int) -> None:
        """So many have begun or ended."""
        told, now = self._stages[stage], self._hear()
        if ended or not told.under_way:
            told.quiet_since = now
        told.under_way += begun - ended
        told.ended += ended

    def enter(self, phase: str) -> None:
        """The trainer goes on with this."""
        self._phases.append((phase, self._hear()))
        self._stages[PASSED].ended = 0

    def leave(self) -> None:
        """It is back at what it did before."""
        self._phases.pop()
        self._phases[-1] = (self._phases[-1][0], self._hear())
        self._stages[PASSED].ended = 0

    def begin_step(self, step: int) -> None:
        """Responses that end from here on are this step's."""
        self._step = step
        self._phases = [("generating", self._hear())]
        self._longest = 0.0
        for stage in self._stages.values():
            stage.ended = 0

    def longest_silence(self) -> float:
        """Seconds of the step in which nothing was told, at the longest."""
        self._hear()
        return self._longest

    def line(self, silence_s: float) -> str:
        """What the run is doing.

        Args:
            silence_s: Seconds after which it is said of something under way how long nothing of its kind has ended.
        """
        now = self._clock()
        phase, since = self._phases[-1]
        parts = [f"rredcot: step {self._step}, {phase} for {now - since:.0f} s"]
        for name, stage in self._stages.items():
            if stage.ended or stage.under_way:
                text = f"{stage.ended} {name}"
                if stage.under_way:
                    text += f" and {stage.under_way} under way"
                    if now - stage.quiet_since >= silence_s:
                        text += f" (none ended for {now - stage.quiet_since:.0f} s)"
                parts.append(text)
        parts.append(f"last sign of life {now - self._heard:.0f} s ago")
        return "; ".join(parts)


def _name(ray: Any) -> str:
    """Of a run's board: other runs may share its cluster and namespace."""
    return f"rredcot_live_board_{ray.get_runtime_context().get_job_id()}"


@functools.cache
def _board() -> Any:
    """The run's board; None without one. It is there before whoever tells it anything."""
    # Not imported for this: what tells works without it.
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    try:
        return ray.get_actor(_name(ray))
    except ValueError:
        return None


def tell(stage: str, begun: int = 0, ended: int = 0) -> None:
    """Tell the run's board, if it has one."""
    board = _board()
    if board is not None:
        board.tell.remote(stage, begun, ended)


@contextlib.contextmanager
def under_way(stage: str) -> Iterator[Callable[[], None]]:
    """One of a stage begins. It ends with the block, or when what the block is given is called, whichever is first."""
    tell(stage, begun=1)
    end = functools.cache(lambda: tell(stage, ended=1))
    try:
        yield end
    finally:
        end()


class LiveLine:
    """The trainer's side: makes the board, tells it the phase, and prints its line from a thread.

    Args:
        every_s: Seconds between two lines.
    """

    def __init__(self, every_s: float) -> None:
        import ray

        self._every_s = every_s
        self._ray = ray
        self._board: Any = ray.remote(num_cpus=0)(Board).options(name=_name(ray)).remote()
        threading.Thread(target=self._print, name="rredcot-live", daemon=True).start()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within the block the trainer does this."""
        self._board.enter.remote(name)
        try:
            yield
        finally:
            self._board.leave.remote()

    def begin_step(self, step: int) -> None:
        """See `Board.begin_step`."""
        self._board.begin_step.remote(step)

    def metrics(self) -> dict[str, float]:
        """Of the step that ends."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            silence = self._ray.get(self._board.longest_silence.remote(), timeout=_READ_TIMEOUT_S)
            return {"rredcot/silence_seconds/max": silence}
        return {}

    def _print(self) -> None:
        while True:
            time.sleep(self._every_s)
            try:
                text = self._ray.get(self._board.line.remote(self._every_s), timeout=_READ_TIMEOUT_S)
            except self._ray.exceptions.GetTimeoutError:
                text = "rredcot: what the run is doing is not known, this machine is too busy"
            except self._ray.exceptions.RayError:
                return
            # Ray's driver holds what comes from stdout back until a block is full, where its own is no terminal.
            print(text, file=sys.stderr, flush=True)
