"""The forms of credit that are compared by their gradients, and their advantages, exactly as in training."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from rredcot_verl.analyze.method_values import ORACLE, Method
from rredcot_verl.analyze.statistics import Array
from rredcot_verl.analyze.trace_table import TraceTable
from rredcot_verl.config.blocks import CreditConfig, SelfValueConfig
from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.core.redistribution import SegmentBatch
from rredcot_verl.trainer.estimator import Segmented, compute_credit, credit_rule


@dataclass(frozen=True)
class Form:
    """One way to make advantages of values.

    Attributes:
        credit: Of the `credit` block; what is not named has the plugin's default. Where there are no values at
            all every form but `critic` is GRPO.
        algorithm: Of verl's `algorithm` block: `lam`, `norm_adv_by_std_in_grpo`.
        reads_values: Whether it depends on values at all.
    """

    credit: dict[str, Any] = field(default_factory=lambda: {"form": "td"})
    algorithm: dict[str, Any] = field(default_factory=dict)
    reads_values: bool = True


GRPO = Form(reads_values=False)
FORMS = {
    "GRPO without std": Form(algorithm={"norm_adv_by_std_in_grpo": False}, reads_values=False),
    "td, lambda 1": Form({"form": "td"}, {"lam": 1.0}),
    "td, lambda 0.5": Form({"form": "td"}, {"lam": 0.5}),
    "td, lambda 0": Form({"form": "td"}, {"lam": 0.0}),
    "critic, lambda 1": Form({"form": "critic"}, {"lam": 1.0}),
    "critic, lambda 0.5": Form({"form": "critic"}, {"lam": 0.5}),
    "critic, lambda 0": Form({"form": "critic"}, {"lam": 0.0}),
    "reweight, beta 1": Form({"form": "reweight", "beta": 1.0}),
    "reweight, beta 4": Form({"form": "reweight", "beta": 4.0}),
    "td, lambda 0.5, shuffled": Form({"form": "td", "control": "shuffled"}, {"lam": 0.5}),
    "td, lambda 0.5, inverted": Form({"form": "td", "control": "inverted"}, {"lam": 0.5}),
    "td, lambda 0.5, by position": Form({"form": "td", "control": "position"}, {"lam": 0.5}),
}
"""By the name in the results: one line a form."""


def unbiased_forms(method: Method) -> list[Form]:
    """The forms whose expected gradient is GRPO's with a method's values, so that they may tell its direction.

    With lambda 1 that holds whatever the values are, as long as they do not know the outcome; of true values with every
    lambda, and the smaller ones are less noisy.
    """
    names = ("td, lambda 1", "td, lambda 0.5", "td, lambda 0") if method.name == ORACLE else ("td, lambda 1",)
    return [FORMS[name] for name in names]


def advantages(table: TraceTable, method: Method | None, form: Form) -> Array:
    """Advantages of the segments, from the plugin's own `compute_credit`.

    Args:
        table: The traces.
        method: Whose values; None is GRPO. A trace without values is not scored: it has GRPO's advantage.
        form: How they are made.

    Returns:
        `(num_traces, width)`; what stands beyond a trace's last segment has no meaning.
    """
    values_in = SelfValueConfig(reward_range=table.reward_range)
    settings = RREDCoTConfig(credit=CreditConfig(**form.credit), self_value=values_in)
    low, high = table.reward_range
    scored = np.zeros(len(table.traces), dtype=bool) if method is None else method.covers(table)
    nums = table.num_segments.tolist()
    values: list[list[float]] = [
        [] if method is None or not scored[row] else (low + (high - low) * method.values[row, : nums[row]]).tolist()
        for row in range(len(nums))
    ]
    outcomes = torch.tensor([trace.reward for trace in table.traces])
    segments = SegmentBatch.from_rows([cut.boundaries for cut in table.cuts], values, outcomes, table.lengths)
    mask = torch.arange(max(table.lengths)) < torch.tensor(table.lengths).unsqueeze(1)
    algorithm = OmegaConf.create({"gamma": 1.0, "lam": 1.0, "norm_adv_by_std_in_grpo": True, **form.algorithm})
    index = np.array([trace.group for trace in table.traces], dtype=object)
    segmented = Segmented(segments, torch.arange(len(nums)), credit_rule(algorithm, settings))
    # The shuffled control arm draws.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        given = compute_credit(segmented, index, mask.long()).segment_advantages.double().numpy()
    result = np.zeros(table.is_state.shape)
    result[:, : given.shape[1]] = given[:, : table.width]
    # A row that is not scored is one segment, the whole response.
    result[~scored] = given[~scored, :1]
    return result
