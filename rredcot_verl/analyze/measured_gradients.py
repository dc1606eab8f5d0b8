"""Gradients of units of prompts under many forms of credit, and what each form is worth (`efficiency`).

verl's loss on the first update of a batch (ratio 1, `token-mean`) has the gradient -(sum over response tokens of
A_t grad log pi_t) / (number of response tokens). Of a small model a unit's sum is one backward pass a form, with the
advantages as weights; of a large one, of which little is kept, a pass a segment serves all forms. What is kept of a
form is three numbers with their intervals, so no gradient is ever written to a file.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rredcot_verl.analyze.command_line import Options
from rredcot_verl.analyze.credit_forms import FORMS, GRPO, Form, advantages, unbiased_forms
from rredcot_verl.analyze.efficiency import MEASURES, GradientComparison, UnitGradients, nothing
from rredcot_verl.analyze.estimators import CREDITED, PROBES, REFERENCE, methods_from
from rredcot_verl.analyze.method_values import Evidence, Method, true_values
from rredcot_verl.analyze.policy import PACK_TOKENS, Policy, split_by_size
from rredcot_verl.analyze.records import GRADIENTS_FILE, Measurements, TraceRecord
from rredcot_verl.analyze.regressions import regression_methods
from rredcot_verl.analyze.statistics import Array, Resamples
from rredcot_verl.analyze.trace_table import TraceTable, make_table

MOST_UNITS = 64
"""Prompts are put together into at most so many units."""
FULL = 4_000_000
"""Parameters up to which gradients are taken whole."""
_AT_ONCE = 4
"""Forms that share a forward pass where gradients are whole; so many, and two more, of `MOST_UNITS` gradients each are
held in memory."""
SKETCH_DIM = 4096
"""Numbers kept of a larger gradient for inner products. The relative error of one is about 1 / sqrt(SKETCH_DIM) = 1.6 %
of the product of the norms."""
NUM_COORDINATES = 1 << 17
"""Coordinates of a larger gradient, drawn at random, whose sum stands for that over all in Adam's view."""


class GradientReader:
    """Gradients with respect to all parameters: whole, or of a large model a count sketch and some coordinates.

    A sketch (Charikar, Chen, Farach-Colton, 2002) sums, by bucket, the gradient with random signs; inner products of
    sketches are unbiased estimates of those of the gradients.

    Args:
        policy: The model.
        temperature: Sampling temperature.
        max_tokens: Most tokens of a pass.
        seed: Of buckets, signs and coordinates.
        full: Most parameters whose gradient is kept whole.
    """

    def __init__(self, policy: Policy, temperature: float, max_tokens: int, seed: int, full: int = FULL) -> None:
        self._policy, self._temperature, self._max_tokens = policy, temperature, max_tokens
        self._parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
        self.num_parameters = sum(parameter.numel() for parameter in self._parameters)
        self.whole = self.num_parameters <= full
        if not self.whole:
            generator = torch.Generator().manual_seed(seed)
            # Sign and bucket in one number: the upper half of the buckets is the negative side.
            buckets = torch.randint(2 * SKETCH_DIM, (self.num_parameters,), generator=generator, dtype=torch.int32)
            self._buckets = buckets.to(policy.device)
            self._places = torch.randint(self.num_parameters, (NUM_COORDINATES,), generator=generator)

    @property
    def at_once(self) -> int | None:
        """How many forms are best read at once; None: all."""
        return _AT_ONCE if self.whole else None

    def read(
        self, traces: Sequence[TraceRecord], weights: Sequence[Sequence[Array]], units: Iterable[Sequence[int]]
    ) -> list[UnitGradients]:
        """The gradient of each unit's sum of weighted log-probabilities.

        Args:
            traces: All traces.
            weights: For each form, and each trace, `(num_response_tokens,)`, the advantages of its tokens.
            units: Places of the traces of each unit.

        Returns:
            One a form.
        """
        by_unit = [self._unit([traces[n] for n in unit], [[own[n] for n in unit] for own in weights]) for unit in units]
        return [UnitGradients(*map(torch.stack, zip(*rows, strict=True))) for rows in zip(*by_unit, strict=True)]

    def _unit(self, traces: Sequence[TraceRecord], weights: Sequence[Sequence[Array]]) -> list[tuple[Tensor, ...]]:
        """For each form what is kept of a unit's gradient."""
        device = self._policy.device
        # A pass of unlike lengths computes much padding; a trace without an advantage has no gradient.
        used = (n for n in range(len(traces)) if any(own[n].any() for own in weights))
        order = sorted(used, key=lambda n: len(traces[n].token_ids))
        if not self.whole:
            kept = torch.zeros(len(weights), NUM_COORDINATES + SKETCH_DIM, device=device)
            for n in order:
                # Tokens with the same advantages under every form, as those of a segment, share a pass.
                columns, which = np.unique([own[n] for own in weights], axis=1, return_inverse=True)
                pieces = [[(which.ravel() == piece).astype(np.float32)] for piece in range(columns.shape[1])]
                for column, gradient in zip(columns.T, self._gradients([traces[n]], pieces), strict=True):
                    kept += torch.outer(torch.from_numpy(column).to(device), self._kept(gradient))
            return [(own[:NUM_COORDINATES], own[NUM_COORDINATES:]) for own in kept.cpu()]
        sums = torch.zeros(len(weights), self.num_parameters, device=device)
        for part in split_by_size([len(traces[n].token_ids) for n in order], self._max_tokens):
            chosen = [order[place] for place in part]
            own_weights = [[own[n] for n in chosen] for own in weights]
            for total, gradient in zip(sums, self._gradients([traces[n] for n in chosen], own_weights), strict=True):
                total += gradient
        return [(total,) for total in sums.cpu()]

    def _kept(self, gradient: Tensor) -> Tensor:
        """`(NUM_COORDINATES + SKETCH_DIM,)`, linear in the gradient."""
        buckets = gradient.new_zeros(2 * SKETCH_DIM).index_add_(0, self._buckets, gradient)
        return torch.cat([gradient[self._places], buckets[:SKETCH_DIM] - buckets[SKETCH_DIM:]])

    def _gradients(self, traces: Sequence[TraceRecord], weights: Sequence[Sequence[Array]]) -> Iterator[Tensor]:
        """Gradients of some traces, `(num_parameters,)` float32: a forward pass, and a backward pass a weighting."""
        longest = max(len(trace.token_ids) for trace in traces)
        first = min(len(trace.prompt_ids) for trace in traces) - 1
        # Padded behind its end, a trace cannot see the padding, whose weight is 0.
        ids = torch.zeros(len(traces), longest, dtype=torch.int64)
        weight = torch.zeros(len(weights), len(traces), longest)
        for row, trace in enumerate(traces):
            ids[row, : len(trace.token_ids)] = torch.tensor(trace.token_ids)
            for form, own in enumerate(weights):
                weight[form, row, len(trace.prompt_ids) : len(trace.token_ids)] = torch.from_numpy(own[row])
        device = self._policy.device
        ids, weight = ids.to(device), weight[:, :, first + 1 :].to(device)
        with torch.enable_grad():
            logits = self._policy.model(input_ids=ids, use_cache=False, logits_to_keep=longest - first).logits[:, :-1]
            log_probs = (logits.float() / self._temperature).log_softmax(-1)
            own_log_probs = log_probs.gather(2, ids[:, first + 1 :].unsqueeze(2)).squeeze(2)
        for number, own in enumerate(weight):
            last = number == len(weight) - 1
            gradients = torch.autograd.grad(
                (own_log_probs * own).sum(), self._parameters, retain_graph=not last, allow_unused=True
            )
            parts = [
                parameter.new_zeros(parameter.numel()) if gradient is None else gradient.flatten()
                for parameter, gradient in zip(self._parameters, gradients, strict=True)
            ]
            yield torch.cat(parts).float()


def measure_gradients(policy: Policy, measurements: Measurements, options: Options) -> None:
    """Write `gradients.json`, unless it is there for the same traces, forms and methods."""
    path, traces = measurements.folder / GRADIENTS_FILE, [trace.trace for trace in measurements.traces]
    num_prompts, batch_prompts = options.gradients, options.batch_prompts
    asked = {"traces": traces, "forms": options.forms, "methods": list(CREDITED)}
    asked |= {"num_prompts": num_prompts, "batch_prompts": batch_prompts}
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["asked"] == asked:
        return
    cutting, groups = next(iter(options.cuttings)), {trace.group for trace in measurements.traces}
    table = make_table(measurements, cutting, Resamples.draw(len(groups), 0, options.seed))
    reader = GradientReader(policy, options.temperature, options.pack_tokens or PACK_TOKENS, options.seed)
    found = compare_forms(
        reader,
        table,
        _credited(Evidence(measurements, table, options.seed)),
        forms=options.forms,
        batch_prompts=batch_prompts,
        num_prompts=num_prompts,
        seed=options.seed,
    )
    path.write_text(json.dumps({"asked": asked, **found}, indent=2) + "\n", encoding="utf-8")


def _credited(evidence: Evidence) -> list[Method]:
    probes = methods_from(evidence, PROBES)
    first = [method for method in probes if method.name == REFERENCE]
    methods = [*true_values(evidence.table), *probes, *regression_methods(evidence, first, []), *methods_from(evidence)]
    by_name = {method.name: method for method in methods}
    return [by_name[name] for name in CREDITED if name in by_name]


def compare_forms(
    reader: GradientReader,
    table: TraceTable,
    methods: Sequence[Method],
    *,
    forms: Sequence[str] = tuple(FORMS),
    batch_prompts: int,
    num_prompts: int,
    seed: int,
) -> dict[str, Any]:
    """What forms of credit are worth with the values of every method, on the same traces.

    Args:
        reader: Of the policy that sampled the traces.
        table: The traces.
        methods: Whose values are credited. One that values only some prompts is compared on these.
        forms: Of `FORMS`, by name.
        batch_prompts: Prompts of an optimiser step.
        num_prompts: Of the table, from the first, at most.
        seed: Deals the units into halves.

    Returns:
        `gradients` of the results, see docs/analyze.md.
    """
    started = time.perf_counter()
    prompts = list(dict.fromkeys(table.groups.tolist()))[:num_prompts]
    per_unit = -(-len(prompts) // MOST_UNITS)
    units = [
        np.nonzero(np.isin(table.groups, prompts[start : start + per_unit]))[0].tolist()
        for start in range(0, len(prompts), per_unit)
    ]
    tokens = torch.tensor([sum(table.lengths[row] for row in unit) for unit in units])

    def read(*credits: Array) -> list[UnitGradients]:
        weights = [_by_token(table, credit) for credit in credits]
        return reader.read(table.traces, weights, tqdm(units, desc=f"gradients of {len(credits)} forms", leave=False))

    plain = advantages(table, None, GRPO)
    complete = [method for method in methods if method.covers(table).all()]
    unbiased = [advantages(table, method, form) for method in complete for form in unbiased_forms(method)]
    pairs = [(name, each) for name in forms for each in _whose(FORMS[name], methods)]
    credits = [advantages(table, method, FORMS[name]) for name, method in pairs]
    at_once = reader.at_once or len(pairs)
    # A gradient is linear in the advantages, so that of a mean is the mean of the gradients.
    direction, grpo, *first = read(np.mean([plain, *unbiased], axis=0), plain, *credits[:at_once])
    found = dict(enumerate(first))

    def comparison_on(kept: Tensor) -> GradientComparison:
        return GradientComparison(direction.rows(kept), grpo.rows(kept), tokens[kept], batch_prompts / per_unit, seed)

    everywhere = torch.ones(len(units), dtype=torch.bool)
    comparisons = {everywhere.numpy().tobytes(): comparison_on(everywhere)}
    signal = next(iter(comparisons.values())).signal_to_noise()
    kept_of, comparison_of = [], []
    for _, method in pairs:
        covered = np.ones(len(table.traces), dtype=bool) if method is None else method.covers(table)
        kept = torch.tensor([bool(covered[unit].any()) for unit in units])
        key = kept.numpy().tobytes()
        comparison = comparisons[key] = comparisons.get(key) or comparison_on(kept)
        kept_of.append(kept)
        comparison_of.append(comparison)
    rows = []
    for number, (name, method) in enumerate(pairs):
        if number and number % at_once == 0:
            part = range(number, min(number + at_once, len(pairs)))
            asked = [other for other in part if comparison_of[other].obstacle is None]
            found = dict(zip(asked, read(*[credits[other] for other in asked]), strict=True)) if asked else {}
        obstacle = comparison_of[number].obstacle
        if obstacle is None:
            measures = comparison_of[number].compare(found[number].rows(kept_of[number]))
        else:
            measures = dict.fromkeys(MEASURES, nothing(obstacle))
        rows.append({"form": name, "method": "" if method is None else method.name, "measures": measures})
    return {
        "num_parameters": reader.num_parameters,
        "whole": reader.whole,
        "num_prompts": len(prompts),
        "num_traces": sum(map(len, units)),
        "num_units": len(units),
        "batch_prompts": batch_prompts,
        "seconds": time.perf_counter() - started,
        "signal_to_noise": signal,
        "rows": rows,
    }


def _whose(form: Form, methods: Sequence[Method]) -> Sequence[Method | None]:
    """Whose values a form is tried with; a control arm with the first method's alone."""
    if not form.reads_values:
        return [None]
    return methods[:1] if "control" in form.credit else methods


def _by_token(table: TraceTable, credit: Array) -> list[Array]:
    """For each trace its advantages by token, of `(num_traces, width)` by segment."""
    return [
        np.repeat(credit[row, : len(cut.boundaries) - 1], np.diff(cut.boundaries)).astype(np.float32)
        for row, cut in enumerate(table.cuts)
    ]
