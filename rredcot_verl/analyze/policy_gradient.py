"""Variance and direction of the policy gradient under each credit, from sketches of the segments' gradients.

A segment's sketch g_k stands for the gradient of its summed log-probability. On the first update of a batch (ratio 1)
verl's loss with `loss_agg_mode=token-mean` has the gradient -(sum over traces and segments of A_k g_k) / (number of
response tokens of the batch). Prompts are the independent draws, so with h = sum over a prompt's traces of A_k g_k and
n its tokens, the gradient of a batch of M prompts has the mean mu = E[h] / E[n] and, by the delta method, a variance
(trace of the covariance) of E|h - n mu|^2 / (M E[n]^2). M cancels against GRPO's.

A small variance alone is worthless: advantages near 0 have it too. Hence the ratio at equal size of the advantages,
and the direction: inner products of means leave out a prompt's product with itself, which would be its noise.
"""

from typing import NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf

from rredcot_verl.analyze.method_values import Method
from rredcot_verl.analyze.records import GRADIENTS_FOLDER, Measurements
from rredcot_verl.analyze.statistics import Array, Measured
from rredcot_verl.analyze.trace_table import Mask, TraceTable
from rredcot_verl.config.blocks import CreditConfig, SelfValueConfig
from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.core.redistribution import SegmentBatch
from rredcot_verl.sources.registry import make_source
from rredcot_verl.trainer.estimator import Segmented, compute_credit, credit_rule

NAMES = ("variance", "variance_scaled", "cosine", "cosine_unbiased", "snr", "efficiency")
"""All relative to GRPO but the cosines, with mu and V the mean and the variance above, and <,> without a prompt's
product with itself. `variance`: V / V_grpo; `variance_scaled`: the same with the advantages scaled to GRPO's root mean
square over tokens; `cosine`: of the mean gradients as they are, noise and all (the same traces are in both);
`cosine_unbiased`: <mu, mu_grpo> / sqrt(<mu, mu> <mu_grpo, mu_grpo>); `snr`: <mu, mu> / V over GRPO's; `efficiency`:
<mu, mu_grpo>^2 / V over GRPO's: progress along GRPO's mean gradient for the noise, whatever the scale."""


FEWEST_PROMPTS = 10
NO_GRADIENT = "every group is uniform, so there is no gradient"
NO_DIRECTION = "the mean gradient does not stand out from its noise"
TOO_FEW = f"gradients of fewer than {FEWEST_PROMPTS} prompts: their mean is noise"


def load_sketches(measurements: Measurements, table: TraceTable) -> tuple[Mask, Array] | None:
    """Read the sketches of a cutting; None where there are none.

    Returns:
        `(num_traces,)`, traces all of whose segments have one, and `(num_traces, width, dim)`, 0 where there is none.
    """
    path = measurements.folder / GRADIENTS_FOLDER / f"{table.cutting}.npz"
    if not path.exists():
        return None
    with np.load(path) as arrays:
        vectors, present = table.padded(arrays["traces"], arrays["segments"], arrays["sketches"], 0.0)
    rows: Mask = np.all(present | ~table.is_state, axis=1)
    return (rows, vectors) if rows.any() else None


def advantages(
    table: TraceTable,
    method: Method | None,
    form: str,
    *,
    beta: float = 1.0,
    penalty: float = 1.0,
    lam: float = 1.0,
) -> Array:
    """Advantages of the segments exactly as in training, from the plugin's own `compute_credit`.

    Args:
        table: The traces.
        method: Whose values; None is GRPO. A trace without values is not scored: it has GRPO's advantage.
        form, beta, penalty: Of the `credit` block; all other settings are the plugin's defaults.
        lam: verl's `algorithm.lam`.

    Returns:
        `(num_traces, width)`; what stands beyond a trace's last segment has no meaning.
    """
    # Values that rest on the mean of the prompt's other traces, as a readout's do, are used as calibrated ones are.
    calibration = "logistic" if method is not None and method.rests_on_group else "none"
    settings = RREDCoTConfig(
        credit=CreditConfig(form=form, beta=beta, error_penalty=penalty),  # type: ignore[arg-type]
        self_value=SelfValueConfig(reward_range=table.reward_range, calibration=calibration),  # type: ignore[arg-type]
    )
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
    algorithm = OmegaConf.create({"gamma": 1.0, "lam": lam, "norm_adv_by_std_in_grpo": True})
    index = np.array([trace.group for trace in table.traces], dtype=object)
    source = make_source(settings, "grpo" if method is None else method.estimator)
    segmented = Segmented(segments, torch.arange(len(nums)), credit_rule(algorithm, settings, source))
    credit = compute_credit(segmented, index, mask.long())
    given = credit.segment_advantages.double().numpy()
    result = np.zeros(table.is_state.shape)
    result[:, : given.shape[1]] = given[:, : table.width]
    # A row that is not scored is one segment, the whole response.
    result[~scored] = given[~scored, :1]
    return result


class GradientComparison:
    """Compares the policy gradients of credits with GRPO's.

    Args:
        table: The traces.
        rows, sketches: From `load_sketches`.
        grpo: `(num_traces, width)`, GRPO's advantages.
    """

    def __init__(self, table: TraceTable, rows: Mask, sketches: Array, grpo: Array) -> None:
        self._table, self._rows, self._sketches = table, rows, sketches
        self._num_groups = table.resamples.counts.shape[1]
        lengths = np.array(table.lengths, dtype=np.float64) * rows
        self._tokens = np.bincount(table.groups, lengths, minlength=self._num_groups).astype(np.float64)
        # 0 for a prompt of which nothing was sketched.
        self._counts = table.resamples.counts * (self._tokens > 0)
        self._grpo = self.gradients(grpo)

    def gradients(self, credit: Array) -> tuple[Array, Array]:
        """Of advantages `(num_traces, width)`, what the statistics need.

        Returns:
            `(num_groups, dim)`, h of each prompt, and `(num_groups,)`, its sum of tokens times squared advantages.
        """
        table = self._table
        segment_tokens = np.zeros(table.is_state.shape)
        for row, cut in enumerate(table.cuts):
            segment_tokens[row, : table.num_segments[row]] = np.diff(cut.boundaries)
        weights = np.where(table.is_state & self._rows[:, None], credit, 0.0)
        per_trace = np.einsum("tk,tkd->td", weights, self._sketches)
        sums = np.zeros((self._num_groups, per_trace.shape[1]))
        np.add.at(sums, table.groups, per_trace)
        squares = (weights**2 * segment_tokens).sum(axis=1)
        return sums, np.bincount(table.groups, squares, minlength=self._num_groups).astype(np.float64)

    def compare(self, credit: Array) -> dict[str, Measured]:
        """Each of `NAMES` of advantages `(num_traces, width)`, relative to GRPO."""
        counts, tokens = self._counts, self._tokens
        if (tokens > 0).sum() < FEWEST_PROMPTS:
            return {name: Measured.none(TOO_FEW) for name in NAMES}
        (sums, squares), (sums_grpo, squares_grpo) = self.gradients(credit), self._grpo
        with np.errstate(invalid="ignore", divide="ignore"):
            own, theirs = _moments(counts, sums, tokens), _moments(counts, sums_grpo, tokens)
            plain, apart = _products(counts, sums @ sums_grpo.T, tokens)
            scale = (counts @ squares_grpo) / (counts @ squares)
            variance = own.variance / theirs.variance
            lengths = _positive(own.apart) * _positive(theirs.apart)
            samples = {
                "variance": variance,
                "variance_scaled": variance * scale,
                "cosine": plain / np.sqrt(own.plain * theirs.plain),
                "cosine_unbiased": apart / np.sqrt(lengths),
                "snr": own.apart / own.variance / (_positive(theirs.apart) / theirs.variance),
                "efficiency": (apart / _positive(theirs.apart)) ** 2 / variance,
            }
        measured = {name: self._measured(numbers) for name, numbers in samples.items()}
        # A direction needs a mean that stands out from its noise; the ratio of two noises is no number.
        if not _stands_out(theirs):
            measured |= {name: Measured.none(NO_DIRECTION) for name in ("cosine_unbiased", "snr", "efficiency")}
        elif not _stands_out(own):
            measured["cosine_unbiased"] = Measured.none(NO_DIRECTION)
        return measured

    def grpo_signal_to_noise(self) -> Measured:
        """<mu, mu> / V of GRPO: times M, the squared signal-to-noise ratio of a batch of M prompts."""
        if (self._tokens > 0).sum() < FEWEST_PROMPTS:
            return Measured.none(TOO_FEW)
        with np.errstate(invalid="ignore", divide="ignore"):
            own = _moments(self._counts, self._grpo[0], self._tokens)
            return self._measured(own.apart / own.variance)

    def _measured(self, samples: Array) -> Measured:
        return Measured(samples, int(self._rows.sum()), int((self._tokens > 0).sum()), NO_GRADIENT)


def _products(counts: Array, gram: Array, tokens: Array) -> tuple[Array, Array]:
    """Inner products of two mean gradients on every resample: all, and those without a prompt's with itself."""
    total = counts @ tokens
    both = np.einsum("bg,bg->b", counts @ gram, counts)
    own = (counts**2) @ np.diag(gram)
    return both / total**2, (both - own) / (total**2 - (counts**2) @ tokens**2)


class _Moments(NamedTuple):
    variance: Array
    plain: Array
    apart: Array


def _moments(counts: Array, sums: Array, tokens: Array) -> _Moments:
    """Variance, and products of the mean gradient with itself, on every resample."""
    gram = sums @ sums.T
    plain, apart = _products(counts, gram, tokens)
    num, total = counts.sum(axis=1), counts @ tokens
    # sum over prompts of |h - n mu|^2, multiplied out.
    along = np.einsum("bg,bg->b", (counts * tokens) @ gram, counts) / total
    squares = counts @ np.diag(gram) - 2 * along + (counts @ tokens**2) * plain
    return _Moments(squares / (num - 1) / (total / num) ** 2, plain, apart)


def _stands_out(moments: _Moments) -> bool:
    """Whether the squared length of the mean gradient is above 0 on all but 2.5 % of the resamples."""
    return bool(moments.apart[0] > 0 and np.mean(moments.apart > 0) > 0.975)


def _positive(numbers: Array) -> Array:
    return np.where(numbers > 0, numbers, np.nan)
