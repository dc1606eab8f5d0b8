"""A run written to disk whose figures are known exactly, and a line checker for its traces."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRIC = "val-core/toy/acc/mean@4"
VALIDATION = {0: 0.25, 2: 0.5, 4: 0.75}
BASELINE_VALIDATION = {0: 0.25, 4: 0.6875}
STEP_SECONDS, SELF_VALUE_SECONDS = 2.0, 0.5


@dataclass(frozen=True)
class Line:
    """A judged line."""

    start: int
    end: int
    ok: bool


def check_lines(prompt: str, response: str) -> list[Line]:
    """Judges every line but the answer; the fake traces write ``wrong`` into the lines that are."""
    lines, start = [], 0
    for text in response.splitlines(keepends=True):
        if text.strip() and not text.startswith("answer"):
            lines.append(Line(start, start + len(text.rstrip()), "wrong" not in text))
        start += len(text)
    return lines


def trace(parts: list[str], values: list[float], **changes: Any) -> dict[str, Any]:
    """A scored trace whose segments are ``parts``, of ten tokens each.

    Args:
        parts: Text of each segment.
        values: Self-values, the prompt's first: one more than there are parts.
        **changes: Fields that differ.
    """
    segments, start = [], 0
    for k, part in enumerate(parts):
        credit = values[k + 1] - values[k]
        numbers = {"num_tokens": 10, "value": values[k + 1], "segment_reward": credit, "weight": 1.0, "advantage": -1.0}
        segments.append({"start": start, "end": start + len(part), **numbers})
        start += len(part)
    row = {"step": 1, "uid": "group", "prompt": "What is 1 + 1?", "response": "".join(parts), "ground_truth": "2"}
    row |= {"reward": values[-1], "grpo_advantage": -1.0, "status": "scored", "start_value": values[0]}
    row |= {"engine": "rollout"}
    return row | {"segments": segments, "return_error": 0.0} | changes


def traces() -> list[dict[str, Any]]:
    """Six traces: of the four failed ones that count for the blame, two have it on the first wrong line."""
    good, bad, answer = "a good line\n", "a wrong line\n", "answer"
    return [
        trace([good, bad, good, answer], [0.5, 0.5, 0.25, 0.25, 0.0], return_error=-2e-6),  # tie: the earlier is meant
        trace([good, bad], [0.5, 0.5, 0.0], step=2),
        trace([bad, good, bad, answer], [0.5, 0.5, 0.5, 0.0, 0.0], step=3),  # the second wrong line is blamed
        trace([good, bad, answer], [0.25, 0.5, 0.5, 0.0], step=4),  # the answer is blamed
        trace([good, answer], [0.5, 0.75, 1.0], step=4, return_error=1e-6),
        trace([], [0.0], step=4, response="", status="truncated", start_value=None, return_error=None),
    ]


def write_dump(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes responses as verl's trainer dumps them, one file a step."""
    folder.mkdir(parents=True)
    for row in rows:
        with (folder / f"{row['step']}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return folder


def response(step: int, group: str, score: float | None, **changes: Any) -> dict[str, Any]:
    """A row of a dump, its prompt inside a chat template."""
    row = {
        "input": f"user\nQuestion {group}?\nassistant\n",
        "output": "some text",
        "gts": "2",
        "score": score,
        "step": step,
    }
    return row | {"uid": f"{group}_0_0"} | changes


def write_run(folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Writes a run with the given traces, those of ``traces()`` by default."""
    write_metrics(folder, VALIDATION, probing=True)
    (folder / "traces").mkdir()
    for row in traces() if rows is None else rows:
        with (folder / "traces" / f"{row['step']}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return folder


def write_metrics(folder: Path, validation: dict[int, float], *, probing: bool = False) -> Path:
    """Writes the metrics of a run of four steps, as verl's file logger does."""
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(5):
            data: dict[str, Any] = {"val-aux/toy/reward/mean@4": 9.0, "actor/nothing": None}
            data |= {METRIC: validation[step]} if step in validation else {}
            data |= {"timing_s/step": STEP_SECONDS, "critic/score/mean": step / 8} if step else {}
            if step and probing:
                data |= {"timing_s/self_value": SELF_VALUE_SECONDS}
                data |= {"rredcot/probe_tokens_per_response_token/mean": 0.5 * step}
            file.write(json.dumps({"step": step, "data": data}) + "\n")
    return folder
