"""verl's own dumps of responses (``trainer.rollout_data_dir``, ``trainer.validation_data_dir``): no segments, no
values.

A row has ``input``, ``output``, ``gts``, ``score``, ``step`` and, in verl's V1 trainer, ``uid``: the row's key
``{uid}_{session}_{output}``. A run's dumps can be far larger than memory: texts of responses are kept for the last step
only.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rredcot_verl.report.files import NUMBER, TEXT, entry, json_lines
from rredcot_verl.report.trace import SOLVED_AT, Response


def load_responses(files: Sequence[Path], solved_at: float = SOLVED_AT) -> Iterator[Response]:
    """Reads dumps, one file a step, the files in order of step.

    Yields:
        The responses; of a session with several outputs the last, whose reward all of them carry.

    Raises:
        ReportError: A file is empty or malformed.
    """
    prompts: dict[str, str] = {}
    for file in files:
        is_last = file == files[-1]
        for row, where in _final_rows(file):
            prompt = entry(row, "input", TEXT, where)
            ground_truth = row.get("gts") if is_last else None
            yield Response(
                step=int(file.stem),
                uid=_group(row) or prompt,
                # The same prompt returns in every epoch: one copy of its text is enough.
                prompt=prompts.setdefault(prompt, prompt),
                response=entry(row, "output", TEXT, where) if is_last else "",
                ground_truth=None if ground_truth is None else str(ground_truth),
                reward=entry(row, "score", NUMBER, where),
                solved_at=solved_at,
            )


def mean_scores(files: Sequence[Path]) -> Iterator[tuple[int, float]]:
    """The mean score of each dump, as ``(step, mean)``; the files in order of step."""
    for file in files:
        scores = [entry(row, "score", NUMBER, where) for row, where in _final_rows(file)]
        yield int(file.stem), sum(scores) / len(scores)


def _final_rows(file: Path) -> list[tuple[dict[str, Any], str]]:
    """The rows of a dump but for outputs before a session's last."""
    rows: dict[str, tuple[dict[str, Any], str]] = {}
    for row, where in json_lines(file):
        key = _key(row)
        # verl sorts the rows by key, its outputs in order: the last one stays.
        rows[where if key is None else key.rpartition("_")[0]] = (row, where)
    return list(rows.values())


def _group(row: dict[str, Any]) -> str | None:
    key = _key(row)
    return None if key is None else key.rsplit("_", 2)[0]


def _key(row: dict[str, Any]) -> str | None:
    key = row.get("uid")
    return key if isinstance(key, str) and key.count("_") >= 2 else None
