"""The methods that are compared, from raw measurements to values of states.

Probes give `joint`, `normalized` and `geometric` of any set of answers without another pass; attributions give shares
of R - b; continuations give Monte Carlo. Regressions (`calibrated`, `hidden`, `both`) stand in `readouts`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from rredcot_verl.analyze.board import Board, Mask
from rredcot_verl.analyze.records import CostRecord, Measurements, ProbeRecord, WeightRecord
from rredcot_verl.analyze.statistics import Array
from rredcot_verl.core.self_value import geometric_value, joint_value, normalized_value
from rredcot_verl.core.values import attribution_values, mig_values, smooth

REFERENCE = "joint:reference"
"""What differences are taken to: the plugin's default."""
MONTE_CARLO = "monte_carlo"
GROUP_MEAN = "group_mean"
FORMS = ("joint", "normalized", "geometric")
PROPOSALS = ("reference", "group", "union")
ATTRIBUTIONS = ("attention_attribution", "input_x_gradient", "integrated_gradients", "leave_one_out")
SMOOTHED = (REFERENCE, "calibrated", MONTE_CARLO)
"""Methods that are smoothed too."""
PROBED_FOR = {"vps": "geometric:reference", "mig": "geometric:reference"}
"""Which probes the peers read: theirs is the mean log-probability a token."""


@dataclass(frozen=True)
class Method:
    """Values of the states of a board by one method.

    Attributes:
        name: Its name in the results.
        family: `probe`, `peer`, `attribution`, `monte_carlo`, `readout`, `baseline` or `smoothed`.
        about: One sentence for readers.
        values: `(num_traces, width)`, v_0 .. v_{K-1} in [0, 1]; NaN where the method has none.
        uses_outcome: Whether the values are made with the trace's own outcome, so that they are no forecast of it.
        estimator: The `algorithm.adv_estimator` that gives this credit in training.
        pinned: Whether the last segment is credited with R - v_{K-1}; otherwise with 0.
        against: Which continuations it is compared with: `gold`, or `rest` where it has used the others itself.
        seconds, num_tokens: `(num_traces,)`, what it costs beside the plain log-prob pass; NaN where not known.
    """

    name: str
    family: str
    about: str
    values: Array
    uses_outcome: bool = False
    estimator: str = "rredcot"
    pinned: bool = True
    against: str = "gold"
    seconds: Array = field(default_factory=lambda: np.zeros(0))
    num_tokens: Array = field(default_factory=lambda: np.zeros(0))

    def covers(self, board: Board) -> Mask:
        """`(num_traces,)`, the traces all of whose states have a value."""
        covered: Mask = np.all(np.isfinite(self.values) | ~board.is_state, axis=1)
        return covered

    def segment_rewards(self, board: Board) -> Array:
        """d_1 .. d_K `(num_traces, width)`; d_K = 0 if not `pinned`; NaN on traces without values."""
        rewards = board.segment_rewards(self.values)
        if not self.pinned:
            rewards[np.arange(len(rewards)), board.num_segments - 1] = 0.0
        return rewards


def baselines(board: Board) -> list[Method]:
    """What costs nothing."""
    constant = np.where(board.is_state, board.others[:, None], np.nan)
    nothing = np.zeros(len(board.traces))
    about = "the mean reward of the prompt's other traces at every state: GRPO's baseline, leave-one-out"
    return [
        Method(GROUP_MEAN, "baseline", about, constant, estimator="grpo", seconds=nothing, num_tokens=nothing),
    ]


def probe_methods(measurements: Measurements, board: Board, temperature: float) -> list[Method]:
    """`joint`, `normalized` and `geometric` of every set of answers, and the peers that read the same probes.

    `normalized:reference` is left out: it is 1 everywhere. The cost of the references is that of a pass of their own
    where it was measured; other sets of answers have the seconds of the pass that asked them all.
    """
    records = {
        record.trace: record
        for record in measurements.probes
        if record.cutting == board.cutting and record.temperature == temperature
    }
    alone = cost(board, measurements.costs, "probe_reference")
    methods = []
    for form in FORMS:
        for proposals in PROPOSALS:
            if records and (form, proposals) != ("normalized", "reference"):
                method = _probed(board, records, form, proposals)
                if proposals == "reference" and np.isfinite(alone[0]).any():
                    method = replace(method, seconds=alone[0], num_tokens=alone[1])
                methods.append(method)
    methods = [method for method in methods if method.covers(board).any()]
    by_name = {method.name: method for method in methods}
    source = by_name.get(PROBED_FOR["vps"])
    if source is not None:
        about = "change of the reference answer's exp(mean log-probability) (GRPO-VPS, IGPO); the last segment gets 0"
        methods.append(replace(source, name="vps", family="peer", about=about, estimator="vps", pinned=False))
        about = "only new highs of the reference answer's exp(mean log-probability) pay (MIG); the last segment gets 0"
        highs = by_row(board, source.values, lambda _, values: mig_values(values))
        methods.append(
            replace(source, name="mig", family="peer", about=about, values=highs, estimator="mig", pinned=False)
        )
    return methods


def attribution_methods(measurements: Measurements, board: Board) -> list[Method]:
    """Weights of segments for the answer, as values b + (R - b) * (share of the segments so far).

    b is the group's mean reward, the trace's own included, as in training. A trace whose weights are all 0 is one
    segment there and has no values here.
    """
    sums, counts = np.bincount(board.groups, board.rewards), np.bincount(board.groups)
    means = (sums / np.maximum(counts, 1))[board.groups]
    methods = []
    for name in ATTRIBUTIONS:
        records = [
            record for record in measurements.weights if (record.cutting, record.method) == (board.cutting, name)
        ]
        if records:
            methods.append(_attributed(board, name, records, means))
    return methods


def monte_carlo(board: Board) -> list[Method]:
    """Monte Carlo with few continuations, compared with the other continuations of the same states."""
    numbers = board.fresh.num_rollouts[board.is_state]
    if not numbers.size or numbers.max() < 1:
        return []
    most = int(np.median(numbers))
    about = f"mean reward of {most} continuations a state (VinePPO), compared with the other continuations"
    values = np.where(board.is_state, board.fresh.values, np.nan)
    return [
        Method(
            MONTE_CARLO,
            "monte_carlo",
            about,
            values,
            estimator="vineppo",
            against="rest",
            seconds=board.seconds * most,
            num_tokens=board.num_tokens * most,
        )
    ]


def smoothed(board: Board, method: Method, strength: float) -> Method:
    """The method with each value drawn towards its neighbours."""
    rewards = board.rewards
    values = by_row(board, method.values, lambda row, values: smooth(values, float(rewards[row]), strength))
    return replace(
        method,
        name=f"{method.name}+smooth={strength:g}",
        family="smoothed",
        about=f"{method.about}; smoothing {strength:g}",
        values=values,
        # The last value is drawn towards the outcome itself.
        uses_outcome=True,
    )


def by_row(board: Board, values: Array, change: Callable[[int, list[float]], Sequence[float]]) -> Array:
    """Apply a function of a trace's v_0 .. v_{K-1} to every trace that has them."""
    changed = np.full_like(values, np.nan)
    for row, num in enumerate(board.num_segments.tolist()):
        if np.isfinite(values[row, :num]).all():
            changed[row, :num] = change(row, values[row, :num].tolist())
    return changed


def cost(board: Board, records: Iterable[CostRecord], what: str) -> tuple[Array, Array]:
    """Seconds and tokens of one kind of cost `(num_traces,)`; NaN where not measured."""
    seconds, num_tokens = np.full((2, len(board.traces)), np.nan)
    for record in records:
        row = board.row_of.get(record.trace)
        if row is not None and record.what == what:
            seconds[row], num_tokens[row] = record.seconds, record.num_tokens
    return seconds, num_tokens


def _probed(board: Board, records: dict[int, ProbeRecord], form: str, proposals: str) -> Method:
    values = np.full((len(board.traces), board.width), np.nan)
    seconds, num_tokens = np.full((2, len(board.traces)), np.nan)
    for row, trace in enumerate(board.traces):
        record = records.get(trace.trace)
        if record is None:
            continue
        chosen = _chosen(record, proposals)
        if not any(chosen) or len(record.log_probs) < board.num_segments[row]:
            continue
        num = int(board.num_segments[row])
        values[row, :num] = _form_values(record, chosen, form)[:num]
        share = _token_share(record, chosen)
        num_tokens[row] = record.num_tokens * share
        seconds[row] = np.nan if record.seconds is None else record.seconds
    answers = {"reference": "the reference answer", "group": "the group's answers", "union": "both"}[proposals]
    about = {
        "joint": f"probability mass on useful answers ({answers})",
        "normalized": f"that mass over the mass on all answers asked ({answers})",
        "geometric": f"exp of the mean log-probability a token ({answers})",
    }[form]
    return Method(f"{form}:{proposals}", "probe", about, values, seconds=seconds, num_tokens=num_tokens)


def _chosen(record: ProbeRecord, proposals: str) -> list[bool]:
    pairs = zip(record.is_reference, record.is_group, strict=True)
    return [reference and proposals != "group" or group and proposals != "reference" for reference, group in pairs]


def _form_values(record: ProbeRecord, chosen: list[bool], form: str) -> Array:
    keep = [index for index, take in enumerate(chosen) if take]
    log_probs = torch.tensor(
        [[float("-inf") if row[i] is None else row[i] for i in keep] for row in record.log_probs], dtype=torch.float64
    )
    utilities = torch.tensor([record.utilities[i] for i in keep], dtype=torch.float64)
    if form == "joint":
        values = joint_value(log_probs, utilities)
    elif form == "normalized":
        values = normalized_value(log_probs, utilities)
    else:
        lengths = torch.tensor([[max(row[i], 1) for i in keep] for row in record.lengths])
        values = geometric_value(log_probs, utilities, lengths)
    return values.double().numpy()


def _token_share(record: ProbeRecord, chosen: list[bool]) -> float:
    """Share of the pass's answer tokens that these answers are; all answers were scored in one pass."""
    lengths = np.array(record.lengths, dtype=np.float64)
    return float(lengths[:, chosen].sum() / lengths.sum()) if lengths.sum() else 1.0


def _attributed(board: Board, name: str, records: list[WeightRecord], means: Array) -> Method:
    values = np.full((len(board.traces), board.width), np.nan)
    seconds, num_tokens = np.full((2, len(board.traces)), np.nan)
    for record in records:
        row = board.row_of.get(record.trace)
        if row is None or len(record.weights) != board.num_segments[row]:
            continue
        outcome, mean, num = float(board.rewards[row]), float(means[row]), len(record.weights)
        values[row, :num] = attribution_values(record.weights, outcome, mean) or np.nan
        seconds[row], num_tokens[row] = record.seconds, record.num_tokens
    about = f"{name.replace('_', ' ')}: R - b shared by the segments' weights for the answer"
    estimator = "gradient_attribution" if name in ("input_x_gradient", "integrated_gradients") else name
    return Method(
        name,
        "attribution",
        about,
        values,
        uses_outcome=True,
        estimator=estimator,
        seconds=seconds,
        num_tokens=num_tokens,
    )
