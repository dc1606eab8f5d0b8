"""Sampled responses with their self-values, outside a training run: the same probes, once for each value form."""

import asyncio
import dataclasses
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from rredcot_verl.agent.scorer import ResponseScorer
from rredcot_verl.answers.grammar import look_up
from rredcot_verl.config.schema import RREDCoTConfig, parse
from rredcot_verl.cpu.generation import GeneratedSequence, generate_batch
from rredcot_verl.cpu.probing import read_probes
from rredcot_verl.cpu.sampling import SamplingParams
from rredcot_verl.report.data import Segment, Trace
from rredcot_verl.rewards.code import compute_score
from rredcot_verl.servers.probe_requests import Probe, parse_probes
from rredcot_verl.sources.group import Group
from rredcot_verl.sources.record import SCORED, CreditRecord
from rredcot_verl.sources.response import Response, as_member

MAX_RESPONSE_TOKENS = 96
MAX_LENGTH = 512
FORMS = ("joint", "normalized", "geometric")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sampled and verified response.

    Attributes:
        row: The data row it answers.
        prompt_ids: Tokens of the prompt.
        generated: Its tokens and their log-probabilities.
        score: What the code verifier said.
    """

    row: Mapping[str, Any]
    prompt_ids: list[int]
    generated: GeneratedSequence
    score: dict[str, Any]


class Policy:
    """A model on the CPU that samples, and scores probes as the rollout server does.

    Args:
        folder: HF folder with model and tokenizer.
    """

    def __init__(self, folder: str | Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._known: dict[tuple[int, ...], dict[Probe, dict[str, Any]]] = {}

    def sample(self, rows: Sequence[Mapping[str, Any]], num_samples: int, seed: int) -> list[Sample]:
        """Samples and verifies responses at temperature 1; a row's are neighbours. Seeds torch's global generator."""
        torch.manual_seed(seed)
        params = SamplingParams(max_tokens=MAX_RESPONSE_TOKENS)
        samples: list[Sample] = []
        repeated = [row for row in rows for _ in range(num_samples)]
        for first in range(0, len(repeated), 256):
            part = repeated[first : first + 256]
            prompts = [
                self.tokenizer.apply_chat_template(list(row["prompt"]), add_generation_prompt=True, return_dict=False)
                for row in part
            ]
            generated = generate_batch(
                self.model, prompts, [params] * len(part), [self.tokenizer.eos_token_id], threading.Event()
            )
            scores = asyncio.run(self._verify(part, generated))
            samples += [Sample(*each) for each in zip(part, prompts, generated, scores, strict=True)]
        return samples

    async def _verify(
        self, rows: Sequence[Mapping[str, Any]], generated: Sequence[GeneratedSequence]
    ) -> list[dict[str, Any]]:
        texts = [self.tokenizer.decode(each.token_ids, skip_special_tokens=True) for each in generated]
        return await asyncio.gather(
            *(
                compute_score(row["data_source"], text, row["reward_model"]["ground_truth"], reward="fraction")
                for row, text in zip(rows, texts, strict=True)
            )
        )

    async def score_probes(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: Mapping[str, Any]
    ) -> SimpleNamespace:
        """Stands in for `LLMServerClient.generate`: the scores of the probes of one trace."""
        del request_id
        probes, temperature = parse_probes(sampling_params, len(prompt_ids))
        # The value forms share most of their probes: each is computed once.
        known = self._known.setdefault(tuple(prompt_ids), {})
        new = [probe for probe in dict.fromkeys(probes) if probe not in known]
        if new:
            (scores,) = read_probes(self.model, [prompt_ids], [new], temperature, 32768)
            known.update(zip(new, scores, strict=True))
        return SimpleNamespace(extra_fields={"probe_log_probs": [known[probe] for probe in probes]})

    def credit(self, samples: Sequence[Sample], num_samples: int, block: Mapping[str, Any]) -> list[Trace]:
        """Scores the probes of sampled responses under one setting of `algorithm.rredcot`.

        Args:
            samples: From `sample`.
            num_samples: Responses of a row.
            block: The settings.

        Returns:
            One trace per response, as a training run writes them; weights and advantages are left at zero.
        """
        settings = parse(block)
        config = OmegaConf.create(
            {
                "actor_rollout_ref": {
                    "rollout": {"name": "rredcot_cpu", "temperature": 1.0, "response_length": MAX_RESPONSE_TOKENS}
                }
            }
        )
        scorer = ResponseScorer(config, settings, self.tokenizer, self.score_probes, MAX_LENGTH)
        traces = []
        for first in range(0, len(samples), num_samples):
            members = samples[first : first + num_samples]
            responses = [_response(member, scorer, settings) for member in members]
            records = asyncio.run(_credit_group(scorer, responses))
            traces += [
                self._trace(first // num_samples, member, record)
                for member, record in zip(members, records, strict=True)
            ]
        return traces

    def _trace(self, group: int, sample: Sample, record: CreditRecord) -> Trace:
        ids, reward = sample.generated.token_ids, float(sample.score["score"])
        places = [
            len(self.tokenizer.decode(ids[:offset], skip_special_tokens=True)) for offset in record.segment_boundaries
        ]
        values = [*record.self_values, reward]
        segments = [
            Segment(
                start=places[k],
                end=places[k + 1],
                num_tokens=record.segment_boundaries[k + 1] - record.segment_boundaries[k],
                value=values[k + 1],
                segment_reward=values[k + 1] - values[k],
                weight=0.0,
                advantage=0.0,
            )
            for k in range(len(places) - 1)
        ]
        return Trace(
            step=0,
            uid=str(group),
            prompt=sample.row["prompt"][-1]["content"],
            response=self.tokenizer.decode(ids, skip_special_tokens=True),
            ground_truth=sample.row["reward_model"]["ground_truth"],
            reward=reward,
            grpo_advantage=0.0,
            status=record.status,
            start_value=values[0] if record.status == SCORED else float("nan"),
            segments=tuple(segments),
            return_error=0.0,
            engine="sampled",
        )


def read_rows(path: str | Path, num_rows: int) -> list[dict[str, Any]]:
    """The first rows of a parquet file."""
    return pd.read_parquet(path).head(num_rows).to_dict("records")


def _response(sample: Sample, scorer: ResponseScorer, settings: RREDCoTConfig) -> Response:
    ids = sample.generated.token_ids
    return Response(
        prompt_ids=list(sample.prompt_ids),
        response_ids=ids,
        response_mask=[1] * len(ids),
        log_probs=sample.generated.log_probs,
        reward=float(sample.score["score"]),
        references=look_up(sample.row, settings.self_value.reference_key),
        request_id="sampled",
        answer=scorer.elicitation.read(ids) if ids else None,
    )


async def _credit_group(scorer: ResponseScorer, responses: Sequence[Response]) -> list[CreditRecord]:
    group = Group(len(responses))
    for number, response in enumerate(responses):
        await group.arrive(number, as_member(response))
    return [await scorer.credit(response, group) for response in responses]
