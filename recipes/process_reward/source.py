"""Segment values from a process reward model: a HuggingFace token or sequence classifier, read at segment ends.

    python -m verl.trainer.main_ppo ... algorithm.adv_estimator=rredcot \
        +algorithm.rredcot.source=recipes.process_reward.source:ProcessReward \
        +algorithm.rredcot.source_options.model=MODEL

v_k is the probability the classifier gives its good label at the end of segment k, in the range of the rewards; v_K
stays the verified outcome, so the reward model can move credit within a response and never the return. Ours.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import ray
import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from rredcot_verl.config.blocks import Block
from rredcot_verl.core.groups import from_unit
from rredcot_verl.sources.base import Source
from rredcot_verl.sources.group import Group
from rredcot_verl.sources.queue import Rows
from rredcot_verl.sources.record import Plan, Record, Status
from rredcot_verl.sources.response import Response


class Options(Block):
    """`algorithm.rredcot.source_options`."""

    model: str = Field(min_length=1, description="Folder or hub id of the classifier.")
    kind: Literal["auto", "token", "sequence"] = Field(
        "auto", description="`token`: one pass a response; `sequence`: one a boundary; `auto`: as its config says."
    )
    good_label: int = Field(-1, description="Index of the label that means right; a single label is a logit of it.")
    separator: str = Field("\n", description="Text the classifier was trained to find after a step.")
    running: Literal["last", "min"] = Field(
        "last",
        description="`last`: the score of the state; `min`: the lowest so far, where scores are of single steps.",
    )
    max_tokens: int = Field(16384, ge=1, description="Tokens of a pass, padding included.")
    num_gpus: float = Field(0, ge=0, description="0: in the trainer's process, on CPU; else in a Ray actor.")
    dtype: str = Field("float32", description="Of the classifier's weights.")


class Classifier:
    """A classifier that gives the probability of its good label at the ends of parts of a text.

    Args:
        options: See `Options`.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._device = "cuda" if options.num_gpus else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(options.model)
        kind = options.kind
        if kind == "auto":
            architectures = AutoConfig.from_pretrained(options.model).architectures or [""]
            kind = "token" if "TokenClassification" in architectures[0] else "sequence"
        self._by_token = kind == "token"
        auto = AutoModelForTokenClassification if self._by_token else AutoModelForSequenceClassification
        model = auto.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
        model.config.pad_token_id = self._pad_id = self._tokenizer.pad_token_id or 0
        self._model = model.to(self._device).eval()
        if self._by_token:
            self._refuse_lookahead()

    def _refuse_lookahead(self) -> None:
        """A score that knows what comes after its token knows the outcome, and is no value of a state."""
        long = self._tokenizer.encode("1 + 1 = 2\n2 + 2 = 5\n", add_special_tokens=False)
        short = long[: len(long) // 2]
        before, after = self._in_passes([short, long])
        moved = float((before - after[: len(short)]).abs().max())
        # Rounding in half precision moves it by about a hundredth.
        if moved > 0.05:
            raise ValueError(
                f"source_options.model={self._options.model!r}: its score of a token moves by {moved:.3f} with the "
                "tokens after it; expected a causal token classifier, or a sequence classifier, which reads prefixes"
            )

    def scores(self, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """For each text the probability of the good label at the end of each of its parts.

        A separator stands after every part but the first, which is the prompt.
        """
        tokens, ends = [], []
        for parts in texts:
            ids: list[int] = []
            own = []
            for number, part in enumerate(parts):
                text = part if number == 0 else part.rstrip("\n") + self._options.separator
                ids += self._tokenizer.encode(text, add_special_tokens=False)
                own.append(max(1, len(ids)))
            tokens.append(ids or [self._pad_id])
            ends.append(own)
        if self._by_token:
            found = self._in_passes(tokens)
            return [[rows[end - 1].item() for end in own] for rows, own in zip(found, ends, strict=True)]
        prefixes = [ids[:end] for ids, own in zip(tokens, ends, strict=True) for end in own]
        flat = iter(self._in_passes(prefixes))
        return [[next(flat).item() for _ in own] for own in ends]

    @torch.no_grad()
    def _in_passes(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Probabilities of each sequence, `(length,)` or a scalar; sequences of like length share a pass."""
        order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
        found: dict[int, Tensor] = {}
        while order:
            # The last one of a pass is its longest.
            count = 1
            while count < len(order) and (count + 1) * len(sequences[order[count]]) <= self._options.max_tokens:
                count += 1
            part, order = order[:count], order[count:]
            rows = [torch.tensor(sequences[number]) for number in part]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad_id)
            lengths = torch.tensor([len(row) for row in rows])
            mask = torch.arange(ids.size(1)) < lengths.unsqueeze(1)
            logits = self._model(ids.to(self._device), attention_mask=mask.to(self._device)).logits.float().cpu()
            single = logits.size(-1) == 1
            good = logits.sigmoid()[..., 0] if single else logits.softmax(-1)[..., self._options.good_label]
            found.update(
                {number: good[row, : lengths[row]] if self._by_token else good[row] for row, number in enumerate(part)}
            )
        return [found[number] for number in range(len(sequences))]


class ProcessReward(Source):
    """v_k from a process reward model; a record's payload is `texts`: the prompt, then each segment."""

    Options = Options
    options: Options

    def describe(self) -> str:
        """See `Source`."""
        return f"scores of {self.options.model} at segment ends"

    async def plan(self, response: Response, group: Group, boundaries: list[int]) -> Plan:
        """See `Source`."""
        decode = self.tools.elicitation.vocabulary.decode
        segments = zip(boundaries, boundaries[1:-1], strict=False)
        texts = [decode(response.prompt_ids), *(decode(response.response_ids[a:b]) for a, b in segments)]
        return Plan(Record(Status.SCORED, boundaries, {"texts": texts}, num_probes=len(texts)))

    @cached_property
    def _classifier(self) -> Any:
        """Loaded with the first batch, in the process that needs it."""
        if not self.options.num_gpus:
            return Classifier(self.options)
        return ray.remote(Classifier).options(num_gpus=self.options.num_gpus, num_cpus=1).remote(self.options)

    def values(self, rows: Rows) -> list[list[float]]:
        """See `Source`."""
        texts = [record.payload["texts"] for row in rows.scored if (record := rows.records[row]) is not None]
        scores = self._classifier.scores
        found = ray.get(scores.remote(texts)) if self.options.num_gpus else scores(texts)
        values: list[list[float]] = [[] for _ in rows.keys]
        for row, own in zip(rows.scored, found, strict=True):
            lowest = [min(own[: k + 1]) for k in range(len(own))] if self.options.running == "min" else own
            values[row] = [from_unit(score, self.settings.self_value.reward_range) for score in lowest]
        return values
