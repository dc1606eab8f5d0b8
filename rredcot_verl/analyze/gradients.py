"""Sketches of the policy gradient, segment by segment, for the variance of an update under each credit."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rredcot_verl.analyze.budget import Stopwatch
from rredcot_verl.analyze.model import Policy
from rredcot_verl.analyze.records import TraceRecord

SKETCH_DIM = 4096
"""Numbers kept of a gradient. The relative error of an inner product of sketches is about 1 / sqrt(SKETCH_DIM) = 1.6 %
of the product of the norms."""


class GradientSketcher:
    """Count sketches (Charikar, Chen, Farach-Colton, 2002) of gradients with respect to all parameters.

    Every parameter has a seeded bucket and sign; a sketch sums, by bucket, the signed gradient. Inner products of
    sketches are unbiased estimates of those of the gradients.

    Args:
        policy: The model.
        temperature: Sampling temperature.
        seed: Of buckets and signs.
        watch: Where seconds go.
    """

    def __init__(self, policy: Policy, temperature: float, seed: int, watch: Stopwatch) -> None:
        self._policy = policy
        self._temperature = temperature
        self._watch = watch
        self._parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
        generator = torch.Generator().manual_seed(seed)
        # Sign and bucket in one number: the upper half of the buckets is the negative side.
        self._places = [
            torch.randint(2 * SKETCH_DIM, (parameter.numel(),), generator=generator, dtype=torch.int32)
            for parameter in self._parameters
        ]

    def measure(self, trace: TraceRecord, boundaries: Sequence[int]) -> np.ndarray:
        """`(num_segments, SKETCH_DIM)` float32: the gradient of each segment's summed log-probability."""
        model, device = self._policy.model, self._policy.device
        with self._watch.measure("gradients"), torch.enable_grad():
            ids = torch.tensor([trace.prompt_ids + trace.response_ids], device=device)
            size = len(trace.response_ids)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=size + 1).logits[0, :-1]
            log_probs = (logits.float() / self._temperature).log_softmax(-1)
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
