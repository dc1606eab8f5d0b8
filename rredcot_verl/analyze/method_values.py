"""Values of states by every method, from raw measurements.

Probes give `joint`, `normalized` and `geometric` of any set of answers without another pass; attributions give shares
of R - b; continuations give Monte Carlo. Regressions (`calibrated`, `hidden`, `both`) stand in `regressions`, and which
estimator has which values in `estimators`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from rredcot_verl.analyze.records import HIDDEN_FOLDER, Measurements, ProbeRecord
from rredcot_verl.analyze.statistics import Array
from rredcot_verl.analyze.trace_table import Mask, MonteCarloValues, TraceTable
from rredcot_verl.config.blocks import ReadoutConfig
from rredcot_verl.core.values import attribution_values, new_highs
from rredcot_verl.probes.values import values_of_sums

T = TypeVar("T")

ALL_ROLLOUTS = "monte_carlo_gold"
"""Monte Carlo from all continuations."""
ORACLE = "oracle"
FORMS = {
    "joint": "probability mass on useful answers ({})",
    "normalized": "that mass over the mass on all answers asked ({})",
    "geometric": "exp of the mean log-probability a token ({})",
}
PROPOSALS = {"reference": "the reference answer", "group": "the group's answers", "union": "both"}


@dataclass(frozen=True)
class Method:
    """Values of the states of a table by one method.

    Attributes:
        name: Its name in the results.
        family: `probe`, `peer`, `attribution`, `monte_carlo`, `readout`, `baseline` or `truth`.
        about: One sentence for readers.
        values: `(num_traces, width)`, v_0 .. v_{K-1} in [0, 1]; NaN where the method has none.
        uses_outcome: Whether the values are made with the trace's own outcome, so that they are no forecast of it.
        estimator: The `algorithm.adv_estimator` that gives this credit in training.
        against: Which continuations it is compared with: `gold`, or `rest` where it has used the others itself.
        seconds, num_tokens: `(num_traces,)`, what it costs beside the plain log-prob pass; NaN where not known.
    """

    name: str
    family: str
    about: str
    values: Array
    uses_outcome: bool = False
    estimator: str = "rredcot"
    against: str = "gold"
    seconds: Array = field(default_factory=lambda: np.zeros(0))
    num_tokens: Array = field(default_factory=lambda: np.zeros(0))

    def covers(self, table: TraceTable) -> Mask:
        """`(num_traces,)`, the traces all of whose states have a value."""
        covered: Mask = np.all(np.isfinite(self.values) | ~table.is_state, axis=1)
        return covered

    def segment_rewards(self, table: TraceTable) -> Array:
        """d_1 .. d_K `(num_traces, width)`; NaN on traces without values."""
        return table.segment_rewards(self.values)


@dataclass(frozen=True)
class Evidence:
    """What values are made of.

    Attributes:
        measurements: All records.
        table: The traces under one cutting.
        seed: Of what is fitted.
        notes: What could not be done is added here.
        progress: Whether to show how far a loop is.
    """

    measurements: Measurements
    table: TraceTable
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    progress: bool = False

    def each(self, items: Sequence[T], what: str) -> "tqdm[T]":
        """The items, with a progress bar where one is wanted."""
        return tqdm(items, desc=what, disable=not self.progress)

    @cached_property
    def hidden(self) -> dict[int, Array]:
        """Projected hidden states `(num_traces, width, dim)` by layer; NaN where there is none."""
        path = self.measurements.folder / HIDDEN_FOLDER / f"{self.table.cutting}.npz"
        if not path.exists():
            return {}
        with np.load(path) as arrays:
            read = {int(name.removeprefix("layer_")): arrays[name] for name in arrays if name.startswith("layer_")}
            traces, states = arrays["traces"], arrays["states"]
        return {layer: self.table.padded(traces, states, rows, np.nan)[0] for layer, rows in sorted(read.items())}

    @property
    def layer(self) -> int | None:
        """The layer that the plugin reads by default if it was measured, else the last one measured."""
        default, model = ReadoutConfig().layer, self.measurements.run.get("model")
        num_layers = model.get("num_layers", 0) if isinstance(model, dict) else 0
        known = [layer for layer in (default, default + num_layers) if layer in self.hidden]
        return known[0] if known else max(self.hidden, key=lambda layer: (layer < 0, layer), default=None)

    def cost(self, what: str) -> tuple[Array, Array]:
        """Seconds and tokens of one kind of cost `(num_traces,)`; NaN where not measured."""
        seconds, num_tokens = np.full((2, len(self.table.traces)), np.nan)
        for record in self.measurements.costs:
            row = self.table.row_of.get(record.trace)
            if row is not None and record.what == what:
                seconds[row], num_tokens[row] = record.seconds, record.num_tokens
        return seconds, num_tokens


def group_mean(table: TraceTable) -> Method:
    """What costs nothing; a prompt's only trace has the mean of all other traces, the only trace of all 0.5."""
    rewards, nothing = table.rewards, np.zeros(len(table.traces))
    everyone = (rewards.sum() - rewards) / (len(rewards) - 1) if len(rewards) > 1 else np.array([0.5])
    means = np.where(np.isnan(table.others), everyone, table.others)
    constant = np.where(table.is_state, means[:, None], np.nan)
    about = "the mean reward of the prompt's other traces at every state: GRPO's baseline, leave-one-out"
    return Method(
        "group_mean",
        "baseline",
        about,
        constant,
        estimator="grpo",
        seconds=nothing,
        num_tokens=nothing,
    )


def probed(evidence: Evidence) -> list[Method]:
    """`joint`, `normalized` and `geometric` of every set of answers.

    `normalized:reference` is left out: it is 1 everywhere. The cost of the references is that of a pass of their own
    where it was measured; other sets of answers have the seconds of the pass that asked them all.
    """
    table = evidence.table
    records = {record.trace: record for record in evidence.measurements.probes if record.cutting == table.cutting}
    alone = evidence.cost("probe_reference")
    methods = []
    for form in FORMS:
        for proposals in PROPOSALS:
            if (form, proposals) != ("normalized", "reference"):
                method = _probed(table, records, form, proposals)
                if proposals == "reference" and np.isfinite(alone[0]).any():
                    method = replace(method, seconds=alone[0], num_tokens=alone[1])
                methods.append(method)
    return [method for method in methods if method.covers(table).any()]


def changes_of_probe(evidence: Evidence) -> list[Method]:
    """GRPO-VPS: the peer's probe is the mean log-probability a token of the reference."""
    about = "change of the reference answer's exp(mean log-probability) (GRPO-VPS, IGPO)"
    found = [method for method in probed(evidence) if method.name == "geometric:reference"]
    return [replace(method, name="vps", family="peer", about=about) for method in found]


def new_highs_of_probe(evidence: Evidence) -> list[Method]:
    """MIG: the same probe, of which only new highs pay."""
    about = "only new highs of the reference answer's exp(mean log-probability) pay (MIG)"
    return [
        replace(
            method,
            name="mig",
            about=about,
            values=by_row(evidence.table, method.values, lambda _, values: new_highs(values)),
        )
        for method in changes_of_probe(evidence)
    ]


def attributed(evidence: Evidence, name: str) -> list[Method]:
    """Weights of segments for the answer, as values b + (R - b) * (share of the segments so far).

    b is the group's mean reward, the trace's own included, as in training. A trace whose weights are all 0 is one
    segment there and has no values here. None where nothing was weighed by this method.
    """
    table = evidence.table
    records = [r for r in evidence.measurements.weights if (r.cutting, r.method) == (table.cutting, name)]
    if not records:
        return []
    sums, counts = np.bincount(table.groups, table.rewards), np.bincount(table.groups)
    means = (sums / np.maximum(counts, 1))[table.groups]
    values = np.full(table.is_state.shape, np.nan)
    seconds, num_tokens = np.full((2, len(table.traces)), np.nan)
    for record in records:
        row, num = table.row_of.get(record.trace), len(record.weights)
        if row is None or num != table.num_segments[row]:
            continue
        given = attribution_values(record.weights, float(table.rewards[row]), float(means[row]))
        values[row, :num] = given or np.nan
        seconds[row], num_tokens[row] = record.seconds, record.num_tokens
    about = f"{name.replace('_', ' ')}: R - b shared by the segments' weights for the answer"
    method = Method(name, "attribution", about, values, uses_outcome=True)
    return [replace(method, seconds=seconds, num_tokens=num_tokens)]


def monte_carlo(evidence: Evidence) -> list[Method]:
    """Monte Carlo with few continuations, compared with the other continuations of the same states."""
    table = evidence.table
    numbers = table.first_rollouts.num_rollouts[table.is_state]
    if not numbers.size or numbers.max() < 1:
        return []
    most = int(np.median(numbers))
    about = f"mean reward of {most} continuations a state (VinePPO), compared with the other continuations"
    method = _sampled(table, "monte_carlo", about, table.first_rollouts, np.full(len(table.traces), most))
    return [method if table.has_truth else replace(method, against="rest")]


def from_all_rollouts(table: TraceTable) -> Method:
    """The Monte Carlo reference as a method: what credit from all continuations would do."""
    most = np.where(table.is_state, table.monte_carlo.num_rollouts, 0).sum(axis=1) / np.maximum(table.num_segments, 1)
    about = "all continuations of the gold: what Monte Carlo credit can do at this noise"
    return replace(_sampled(table, ALL_ROLLOUTS, about, table.monte_carlo, most), estimator="vineppo")


def _sampled(table: TraceTable, name: str, about: str, sampled: MonteCarloValues, most: Array) -> Method:
    values = np.where(table.is_state, sampled.values, np.nan)
    seconds, num_tokens = table.seconds * most, table.num_tokens * most
    return Method(name, "monte_carlo", about, values, seconds=seconds, num_tokens=num_tokens)


def true_values(table: TraceTable) -> list[Method]:
    """The task's own values, where it gave any: what the best possible source would do."""
    if not np.isfinite(table.truth).any():
        return []
    about, nothing = "the true value of every state, as the task computes it", np.zeros(len(table.traces))
    return [Method(ORACLE, "truth", about, table.truth, seconds=nothing, num_tokens=nothing)]


def by_row(table: TraceTable, values: Array, change: Callable[[int, list[float]], Sequence[float]]) -> Array:
    """Apply a function of a trace's v_0 .. v_{K-1} to every trace that has them."""
    changed = np.full_like(values, np.nan)
    for row, num in enumerate(table.num_segments.tolist()):
        if np.isfinite(values[row, :num]).all():
            changed[row, :num] = change(row, values[row, :num].tolist())
    return changed


def _probed(table: TraceTable, records: dict[int, ProbeRecord], form: str, proposals: str) -> Method:
    values = np.full((len(table.traces), table.width), np.nan)
    seconds, num_tokens = np.full((2, len(table.traces)), np.nan)
    for row, trace in enumerate(table.traces):
        record, num = records.get(trace.trace), int(table.num_segments[row])
        if record is None or len(record.log_probs) < num:
            continue
        pairs = zip(record.is_reference, record.is_group, strict=True)
        chosen = [
            reference and proposals != "group" or group and proposals != "reference" for reference, group in pairs
        ]
        if not any(chosen):
            continue
        values[row, :num] = _form_values(record, chosen, form)[:num]
        # All answers were scored in one pass; these are charged their share of its answer tokens.
        lengths = np.array(record.lengths, dtype=np.float64)
        share = float(lengths[:, chosen].sum() / lengths.sum()) if lengths.sum() else 1.0
        num_tokens[row] = record.num_tokens * share
        seconds[row] = record.seconds
    about = FORMS[form].format(PROPOSALS[proposals])
    return Method(f"{form}:{proposals}", "probe", about, values, seconds=seconds, num_tokens=num_tokens)


def _form_values(record: ProbeRecord, chosen: list[bool], form: str) -> Array:
    keep = [index for index, take in enumerate(chosen) if take]
    log_probs = torch.tensor(
        [[float("-inf") if row[i] is None else row[i] for i in keep] for row in record.log_probs], dtype=torch.float64
    )
    lengths = torch.tensor([[row[i] for i in keep] for row in record.lengths])
    return values_of_sums(form, log_probs, lengths, [record.utilities[i] for i in keep]).double().numpy()
