"""Many attribution tasks in one sequence, for one pass of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rredcot_verl.passes.attribution_task import AttributionTask
from rredcot_verl.passes.probe_pack import ProbePack
from rredcot_verl.passes.shared_attention import kept_logits, why_not_shared

Temperature = float | Sequence[float]
"""The rollout temperature at which log-probabilities are read: of all tasks, or one a task."""


@dataclass(frozen=True)
class AttributionPack:
    """Tasks in one sequence of `num_tokens` tokens, one after the other.

    Attributes:
        tasks: The tasks.
        layout: Who sees whom.
        token_ids: `(num_tokens,)` int64.
        rows: `(num_answer_tokens,)` int64, the tokens whose next-token distribution gives the answers' tokens.
        targets: `(num_answer_tokens,)` int64, the answers' tokens.
    """

    tasks: Sequence[AttributionTask]
    layout: ProbePack
    token_ids: Tensor
    rows: Tensor
    targets: Tensor

    @classmethod
    def build(
        cls, model: Any, tasks: Sequence[AttributionTask], device: torch.device | None = None
    ) -> "AttributionPack":
        """Lay out tasks for a model.

        Args:
            model: The model.
            tasks: At least one.
            device: Where the model computes; None for where its parameters are.

        Raises:
            ValueError: The model cannot compute a pack; see `why_not_shared`.
        """
        device = device or next(model.parameters()).device
        obstacle = why_not_shared(model.config, device.type)
        if obstacle is not None:
            raise ValueError(f"attention and gradient attribution cannot be computed for this model: {obstacle}")
        layout = ProbePack.build([task.answer_to for task in tasks], [[] for _ in tasks])
        rows: list[int] = []
        targets: list[int] = []
        tokens: list[int] = []
        for start, task in zip(layout.trace_starts, tasks, strict=False):
            rows += range(start + task.answer_from - 1, start + task.answer_to - 1)
            targets += task.token_ids[task.answer_from : task.answer_to]
            tokens += task.token_ids[: task.answer_to]

        def as_tensor(entries: list[int]) -> Tensor:
            return torch.tensor(entries, dtype=torch.int64, device=device)

        return cls(tasks, layout.to(device), as_tensor(tokens), as_tensor(rows), as_tensor(targets))

    def logits(self, model: nn.Module, rows: Tensor) -> Tensor:
        """`(len(rows), vocab_size)` logits of some tokens of the pack; a pass of the model."""
        # The model must be called all the same; one row keeps its head small.
        wanted = rows if len(rows) else rows.new_zeros(1)
        output = model(
            input_ids=self.token_ids.unsqueeze(0),
            attention_mask=None,
            position_ids=self.layout.positions.unsqueeze(0),
            logits_to_keep=wanted,
            use_cache=False,
        )
        return kept_logits(
            output, len(wanted), "attention_attribution and gradient_attribution need that, leave_one_out does not"
        )

    def log_probs(self, logits: Tensor, temperature: Temperature) -> Tensor:
        """`(num_answer_tokens,)` log-probabilities of all answers' tokens, nats."""
        temperatures = [temperature] * len(self.tasks) if isinstance(temperature, int | float) else list(temperature)
        by_row = [t for t, task in zip(temperatures, self.tasks, strict=True) for _ in range(task.num_answer_tokens)]
        scaled = logits.float() / torch.tensor(by_row, device=logits.device).unsqueeze(1)
        return -cross_entropy(scaled, self.targets, reduction="none")
