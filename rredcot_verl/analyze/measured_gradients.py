"""Sketches of the policy gradient, segment by segment, for the variance of an update under each credit."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from rredcot_verl.analyze.measuring import Context, Measurement, Unit
from rredcot_verl.analyze.records import GRADIENTS_FOLDER, TraceArrays, TraceRecord
from rredcot_verl.analyze.store import Store

SKETCH_DIM = 4096
"""Numbers kept of a gradient. The relative error of an inner product of sketches is about 1 / sqrt(SKETCH_DIM) = 1.6 %
of the product of the norms."""


class GradientMeasurement(Measurement):
    """Count sketches (Charikar, Chen, Farach-Colton, 2002) of gradients with respect to all parameters.

    Every parameter has a seeded bucket and sign; a sketch sums, by bucket, the signed gradient. Inner products of
    sketches are unbiased estimates of those of the gradients.

    Args:
        context: What the measurements share.
        traces: The traces that are sketched.
        seed: Of buckets and signs.
    """

    name = "gradients"

    def __init__(self, context: Context, traces: Sequence[TraceRecord], seed: int) -> None:
        self._context = context
        self._traces = {trace.trace for trace in traces}
        self._parameters = [parameter for parameter in context.policy.model.parameters() if parameter.requires_grad]
        generator = torch.Generator().manual_seed(seed)
        # Sign and bucket in one number: the upper half of the buckets is the negative side.
        self._places = [
            torch.randint(2 * SKETCH_DIM, (parameter.numel(),), generator=generator, dtype=torch.int32)
            for parameter in self._parameters
        ]

    def units(self, trace: TraceRecord) -> list[Unit]:
        """See `Measurement`."""
        return [Unit(trace, ((GRADIENTS_FOLDER, trace.trace),))] if trace.trace in self._traces else []

    def measure(self, units: Sequence[Unit]) -> Iterable[TraceArrays]:
        """See `Measurement`: a trace's rows of `gradients/<cutting>.npz`."""
        for unit in units:
            sketches = self.sketches(unit.trace, self._context.segments.boundaries(unit.trace))
            number, count = unit.trace.trace, len(sketches)
            arrays = {"traces": np.full(count, number), "segments": np.arange(count), "sketches": sketches}
            yield TraceArrays(GRADIENTS_FOLDER, number, arrays)

    def lay_out(self, store: Store, traces: Sequence[TraceRecord]) -> None:
        """See `Measurement`: `gradients/<cutting>.npz`."""
        parts = [store.arrays(GRADIENTS_FOLDER, trace.trace) for trace in traces if trace.trace in self._traces]
        store.write_arrays(GRADIENTS_FOLDER, self._context.segments.main, parts)

    def sketches(self, trace: TraceRecord, boundaries: Sequence[int]) -> np.ndarray:
        """`(num_segments, SKETCH_DIM)` float32: the gradient of each segment's summed log-probability."""
        model, device = self._context.policy.model, self._context.policy.device
        with self._context.watch.measure("gradients"), torch.enable_grad():
            ids = torch.tensor([trace.token_ids], device=device)
            size = len(trace.response_ids)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=size + 1).logits[0, :-1]
            log_probs = (logits.float() / self._context.temperature).log_softmax(-1)
            own = log_probs.gather(1, ids[0, -size:].unsqueeze(1)).squeeze(1)
            sketches = []
            for start, end in itertools.pairwise(boundaries):
                gradients = torch.autograd.grad(
                    own[start:end].sum(), self._parameters, retain_graph=end < boundaries[-1], allow_unused=True
                )
                sketches.append(self._sketch(gradients))
        return torch.stack(sketches).numpy()

    def _sketch(self, gradients: Sequence[Tensor | None]) -> Tensor:
        sums = torch.zeros(2 * SKETCH_DIM)
        for gradient, places in zip(gradients, self._places, strict=True):
            if gradient is not None:
                sums.index_add_(0, places, gradient.detach().flatten().float().cpu())
        return sums[:SKETCH_DIM] - sums[SKETCH_DIM:]
