"""Credited traces for people: what `python -m rredcot_verl.report` reads, and what samples for trackers are made of."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transfer_queue as tq
from torch import Tensor
from transfer_queue import KVBatchMeta

from rredcot_verl.config.blocks import TracesConfig
from rredcot_verl.core.credit import Credit
from rredcot_verl.core.redistribution import SegmentBatch
from rredcot_verl.report.selection import choose_extremes, scores
from rredcot_verl.sources.base import Source
from rredcot_verl.sources.queue import Rows, as_list


@dataclass(frozen=True)
class CreditedRows:
    """A batch with its credit.

    Attributes:
        rows, segments, credit: As computed by the trainer.
        return_errors: `(bs,)`, |redistributed - R|.
        engine: Who read the probes.
        source: Where the values come from.
        reward_range: Lowest and highest reward of the task.
    """

    rows: Rows
    segments: SegmentBatch
    credit: Credit
    return_errors: Tensor
    engine: str
    source: Source
    reward_range: tuple[float, float]


def write_traces(settings: TracesConfig, step: int, tokenizer: Any, batch: KVBatchMeta, credited: CreditedRows) -> None:
    """Write `<dir>/<step>.jsonl`, one response a line, at most `settings.num_traces`, scored ones first.

    Values and segment rewards are in units of reward; `start` and `end` of a segment are character offsets into
    `response`, which is decoded without special tokens.
    """
    assert settings.dir is not None
    lines = trace_lines(step, tokenizer, batch, credited, first_rows(credited, settings.num_traces))
    if not lines:
        return
    folder = Path(settings.dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{step}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def first_rows(credited: CreditedRows, num_rows: int) -> list[int]:
    """At most `num_rows` responses, scored ones first, in order of their keys, so that groups stay together."""
    rows = credited.rows
    known = (row for row, record in enumerate(rows.records) if record is not None)
    return sorted(known, key=lambda row: (not credited.segments.scored[row], rows.keys[row]))[:num_rows]


def informative_rows(credited: CreditedRows, num_rows: int) -> list[int]:
    """At most `num_rows` responses worth a look: worst blamed, best credited, most surprising, by turns.

    Only numbers are read here; the texts of the rows that are not chosen are never decoded.
    """
    segments = credited.segments
    order = [row for row in first_rows(credited, len(credited.rows.keys)) if segments.scored[row]]
    measured: list[tuple[float, float, float] | None] = []
    for row in order:
        num_segments = int(segments.num_segments[row])
        values = segments.self_values[row, :num_segments].tolist()
        rewards = segments.segment_rewards[row, :num_segments].tolist()
        advantage = credited.credit.row_advantages[row].item()
        measured.append(scores(values, rewards, credited.rows.outcomes[row].item(), advantage))
    groups = [str(credited.rows.index[row]) for row in order]
    return [order[extreme.row] for extreme in choose_extremes(measured, groups, num_rows)]


def trace_lines(
    step: int, tokenizer: Any, batch: KVBatchMeta, credited: CreditedRows, chosen: Sequence[int]
) -> list[dict[str, Any]]:
    """One dictionary a response, as it stands in a traces file.

    Args:
        step: Training step.
        tokenizer: Decodes prompts and responses.
        batch: The batch, whose texts are read from the TransferQueue.
        credited: Its credit.
        chosen: The rows wanted, each with a record.
    """
    if not chosen:
        return []
    rows = credited.rows
    data = tq.kv_batch_get(
        keys=[batch.keys[row] for row in chosen],
        partition_id=batch.partition_id,
        select_fields=["prompts", "responses", "reward_model", "raw_prompt", "extra_info"],
    )
    prompts, responses = data["prompts"].unbind(), data["responses"].unbind()
    reward_models, raw_prompts, extra_infos = (
        as_list(data[field]) if field in data.keys() else [None] * len(chosen)
        for field in ("reward_model", "raw_prompt", "extra_info")
    )
    lines = []
    for place, row in enumerate(chosen):
        record = rows.records[row]
        assert record is not None
        lines.append(
            {
                "step": step,
                "uid": str(rows.index[row]),
                "prompt": _question(raw_prompts[place]) or tokenizer.decode(prompts[place], skip_special_tokens=True),
                "response": tokenizer.decode(responses[place], skip_special_tokens=True),
                "ground_truth": _text((reward_models[place] or {}).get("ground_truth")),
                "index": _text((extra_infos[place] or {}).get("index")),
                "reward": rows.outcomes[row].item(),
                "reward_range": list(credited.reward_range),
                "grpo_advantage": credited.credit.row_advantages[row].item(),
                "status": record.status.value,
                "source": credited.source.name,
                "weighs": credited.source.weighs,
                "forecasts": credited.source.forecasts,
                "engine": credited.engine,
                "truncated": record.truncated,
                "start_value": credited.segments.self_values[row, 0].item(),
                "segments": _segments(tokenizer, responses[place].tolist(), row, credited),
                "return_error": credited.return_errors[row].item(),
            }
        )
    return lines


def _segments(tokenizer: Any, response_ids: list[int], row: int, credited: CreditedRows) -> list[dict[str, Any]]:
    segments = credited.segments
    boundaries = segments.segment_boundaries[row].tolist()
    characters = [len(tokenizer.decode(response_ids[:offset], skip_special_tokens=True)) for offset in boundaries]
    return [
        {
            "start": characters[k],
            "end": characters[k + 1],
            "num_tokens": boundaries[k + 1] - boundaries[k],
            "value": segments.self_values[row, k + 1].item(),
            "segment_reward": segments.segment_rewards[row, k].item(),
            "weight": credited.credit.segment_weights[row, k].item(),
            "advantage": credited.credit.segment_advantages[row, k].item(),
        }
        for k in range(int(segments.num_segments[row]))
    ]


def _question(raw_prompt: Any) -> str | None:
    """What the user asked last, without the chat template around it."""
    contents = [message["content"] for message in raw_prompt or [] if message.get("role") == "user"]
    return contents[-1] if contents and isinstance(contents[-1], str) else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
