"""The verifier as verl names it, called outside verl."""

import asyncio
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rredcot_verl.analyze.problems import Problem

DEFAULT_NAME = "compute_score"
"""What verl calls a custom reward function unless told otherwise."""
_MAX_CONCURRENCY = 64


def load_function(name: str | None) -> Callable[..., Any]:
    """The reward function of a name.

    Args:
        name: `PATH`, `PATH:FUNCTION`, `pkg://package.module` or `pkg://package.module:FUNCTION`; None for verl's own,
            which goes by `data_source`. Without FUNCTION it is `compute_score`.

    Raises:
        ValueError: There is no such file, module or function.
    """
    if name is None:
        from verl.utils.reward_score import default_compute_score

        return default_compute_score
    from verl.utils.import_utils import load_extern_object

    head, colon, function = name.rpartition(":")
    # The colon of pkg:// and of a Windows drive names no function.
    path, function = (head, function) if colon and function.isidentifier() and head != "pkg" else (name, DEFAULT_NAME)
    is_package = path.startswith("pkg://")
    if not is_package and not Path(path).expanduser().is_file():
        raise ValueError(f"--reward-function {name!r}: {path} is no file; expected PATH[:FUNCTION] or pkg://MODULE")
    if is_package and str(Path.cwd()) not in sys.path:
        # As in `python -m`, the current folder counts too.
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = load_extern_object(path if is_package else str(Path(path).expanduser()), function)
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(f"--reward-function {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"--reward-function {name!r}: {function} is {type(found).__name__}, expected a function")
    return found


class Verifier:
    """Rewards of responses; equal responses to a problem are verified once.

    Args:
        function: verl's `compute_score(data_source, solution_str, ground_truth, extra_info=None, ...)`, plain or async.
        options: Further keyword arguments of every call.
    """

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any] | None = None) -> None:
        self._function = function
        self._options = dict(options or {})
        # One for all calls: verifiers keep semaphores and processes that belong to a loop.
        self._loop = asyncio.new_event_loop() if inspect.iscoroutinefunction(function) else None

    def rewards(self, responses: Sequence[tuple[Problem, str]]) -> list[float]:
        """Verify responses to problems.

        Raises:
            ValueError: The verifier failed, or gave no finite number.
        """
        keys = [(id(problem.row), text) for problem, text in responses]
        distinct = dict(zip(keys, responses, strict=True))
        try:
            if self._loop is not None:
                found = self._loop.run_until_complete(self._gather(list(distinct.values())))
            else:
                found = [self._call(*each) for each in distinct.values()]
        except Exception as error:  # noqa: BLE001 - a user's function raises what it likes
            raise ValueError(f"--reward-function failed: {type(error).__name__}: {error}") from error
        known = {key: _score(result) for key, result in zip(distinct, found, strict=True)}
        return [known[key] for key in keys]

    def _call(self, problem: Problem, response: str) -> Any:
        return self._function(
            data_source=problem.data_source,
            solution_str=response,
            ground_truth=problem.ground_truth,
            extra_info=dict(problem.extra_info),
            **self._options,
        )

    async def _gather(self, responses: Sequence[tuple[Problem, str]]) -> list[Any]:
        room = asyncio.Semaphore(_MAX_CONCURRENCY)

        async def one(problem: Problem, response: str) -> Any:
            async with room:
                return await self._call(problem, response)

        return list(await asyncio.gather(*(one(*each) for each in responses)))


def _score(result: Any) -> float:
    score = result["score"] if isinstance(result, Mapping) and "score" in result else result
    # numpy's numbers, and a tuple or list whose first entry is the score, as in verl.
    score = score[0] if isinstance(score, tuple | list) and score else score
    try:
        number = float(score)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"the verifier gave {result!r}, expected a finite number or a dict with a finite 'score'")
    return number
