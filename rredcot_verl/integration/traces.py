"""Credited traces for people: what `python -m rredcot_verl.report` reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transfer_queue as tq
from torch import Tensor
from transfer_queue import KVBatchMeta

from rredcot_verl.config.schema import TracesConfig
from rredcot_verl.core.redistribution import SegmentBatch
from rredcot_verl.integration.batch import Rows, as_list
from rredcot_verl.integration.estimator import Credit


@dataclass(frozen=True)
class CreditedRows:
    """A batch with its credit.

    Attributes:
        rows, segments, credit: As computed by the trainer.
        weights: `(bs, num_segments)`, segment advantage over the response's own.
        return_errors: `(bs,)`, |redistributed - R|.
        engine: Who read the probes.
    """

    rows: Rows
    segments: SegmentBatch
    credit: Credit
    weights: Tensor
    return_errors: Tensor
    engine: str


def write_traces(settings: TracesConfig, step: int, tokenizer: Any, batch: KVBatchMeta, credited: CreditedRows) -> None:
    """Write `<dir>/<step>.jsonl`, one response a line, at most `settings.num_traces`, scored ones first.

    Values and segment rewards are in units of reward; `start` and `end` of a segment are character offsets into
    `response`, which is decoded without special tokens.
    """
    assert settings.dir is not None
    rows, segments = credited.rows, credited.segments
    chosen = sorted(
        (row for row, record in enumerate(rows.records) if record is not None),
        key=lambda row: (not segments.scored[row], rows.keys[row]),
    )[: settings.num_traces]
    if not chosen:
        return
    data = tq.kv_batch_get(
        keys=[batch.keys[row] for row in chosen],
        partition_id=batch.partition_id,
        select_fields=["prompts", "responses", "reward_model", "raw_prompt"],
    )
    folder = Path(settings.dir)
    folder.mkdir(parents=True, exist_ok=True)
    prompts, responses = data["prompts"].unbind(), data["responses"].unbind()
    reward_models = as_list(data["reward_model"]) if "reward_model" in data.keys() else [None] * len(chosen)
    raw_prompts = as_list(data["raw_prompt"]) if "raw_prompt" in data.keys() else [None] * len(chosen)
    with open(folder / f"{step}.jsonl", "w", encoding="utf-8") as file:
        for place, row in enumerate(chosen):
            record = rows.records[row]
            assert record is not None
            reward_model = reward_models[place] or {}
            line = {
                "step": step,
                "uid": str(rows.index[row]),
                "prompt": _question(raw_prompts[place]) or tokenizer.decode(prompts[place], skip_special_tokens=True),
                "response": tokenizer.decode(responses[place], skip_special_tokens=True),
                "ground_truth": _text(reward_model.get("ground_truth")),
                "reward": rows.outcomes[row].item(),
                "grpo_advantage": credited.credit.row_advantages[row].item(),
                "status": record.status,
                "engine": credited.engine,
                "truncated": record.truncated,
                "start_value": segments.self_values[row, 0].item(),
                "segments": _segments(tokenizer, responses[place].tolist(), row, credited),
                "return_error": credited.return_errors[row].item(),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


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
            "weight": credited.weights[row, k].item(),
            "advantage": credited.credit.segment_advantages[row, k].item(),
        }
        for k in range(int(segments.num_segments[row]))
    ]


def _question(raw_prompt: Any) -> str | None:
    """What the user asked last, without the chat template around it."""
    contents = [message["content"] for message in raw_prompt or [] if message.get("role") == "user"]
    return contents[-1] if contents and isinstance(contents[-1], str) else None


def _text(ground_truth: Any) -> str | None:
    return None if ground_truth is None else str(ground_truth)
