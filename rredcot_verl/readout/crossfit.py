"""Cross-fitting by prompt: every row is valued by a fit that saw no outcome of its prompt.

Nested, with every pair of folds left out once: the fit without folds f and g judges the candidates on g for the choice
of f, and on f for the choice of g. So the choice is as blind to a fold as the fit is.
"""

from itertools import combinations, product
from typing import NamedTuple

import torch
from torch import Tensor

from rredcot_verl.readout.model import Model, Rows, log_likelihood, standardised

STRENGTHS = (1.0, 4.0, 16.0, 64.0, 256.0)
"""Rollouts that the mean of the other prompts may count as. The more the columns say of a prompt, the less its group
mean adds to them."""
DEVIATIONS = (0.0, 0.04, 0.15, 0.6)
"""Prior deviations of a block's coefficients, in log-odds per standard deviation of a column; 0: left out."""
INTERCEPT_DEVIATION = 30.0
"""The constant is as good as free."""
MIN_PROMPTS = 10
"""With fewer prompts a standard error over prompts is not worth much: the group mean is kept."""


class CrossFit(NamedTuple):
    """Values of all rows, and what was chosen.

    Attributes:
        values: `(num_rows,)` float64 in [0, 1].
        deviations: `(num_folds, num_blocks)`, prior deviations chosen for each fold that holds rows.
        gain: Held-out log-likelihood of the choice less that of the group means, nats per response; 0 where those are
            kept.
    """

    values: Tensor
    deviations: Tensor
    gain: float


def cross_fit(rows: Rows, blocks: Tensor, folds: Tensor) -> CrossFit:
    """Value every row by a fit to the other folds' rows.

    Features are used where that raises the held-out likelihood by more than its standard error over prompts. Otherwise
    the values are the other rollouts' means exactly, not drawn anywhere.

    Args:
        rows: The rows.
        blocks: `(num_features,)` columns with the same number share a prior.
        folds: `(num_rows,)` int64; the rows of a prompt are in one fold.
    """
    _, blocks = torch.unique(blocks, return_inverse=True)
    num_blocks = int(blocks.max()) + 1 if blocks.numel() else 0
    # The first one leaves all blocks out.
    priors = torch.tensor(list(product(DEVIATIONS, repeat=num_blocks)), dtype=torch.float64)
    columns = torch.cat([priors[:, blocks], torch.full((len(priors), 1), INTERCEPT_DEVIATION)], dim=1)
    distinct, prompts = torch.unique(rows.prompts, return_inverse=True)
    held_out = [folds == fold for fold in torch.unique(folds)]
    design = standardised(rows.features, rows.weights)
    strengths, chosen, gain = [STRENGTHS[0]] * len(held_out), [0] * len(held_out), 0.0
    if num_blocks and len(held_out) >= 3 and len(distinct) >= MIN_PROMPTS:
        likelihoods = _held_out_likelihoods(rows._replace(prompts=prompts), design, columns, held_out)
        for fold, own in enumerate(held_out):
            judged = likelihoods[fold][:, :, torch.unique(prompts[~own])]
            best = judged.sum(dim=2).argmax(dim=0)
            judged = judged[best, torch.arange(len(priors))]
            chosen[fold] = _fewest_blocks(judged, (priors > 0).sum(dim=1))
            strengths[fold] = STRENGTHS[best[chosen[fold]]]
            gain += float((judged[chosen[fold]] - judged[0]).sum())
        gain /= float(rows.weights.sum()) * (len(held_out) - 1)
    values = torch.empty_like(rows.outcomes)
    for own, strength, prior in zip(held_out, strengths, chosen, strict=True):
        model = Model(rows, design, ~own)
        if prior:
            values[own] = model.log_odds(strength, columns[prior])[own].sigmoid()
        else:
            values[own] = rows.group_means[own].nan_to_num(nan=model.mean)
    return CrossFit(values, priors[chosen], gain)


def _held_out_likelihoods(rows: Rows, design: Tensor, columns: Tensor, held_out: list[Tensor]) -> Tensor:
    """What judges the candidates for each fold: `(num_folds, num_strengths, num_priors, num_prompts)`, 0 for its own.

    Args:
        rows: Their prompts are numbered from 0.
        design: See `Model`.
        columns: `(num_priors, num_columns)`, prior deviations.
        held_out: For each fold, which rows are in it: `(num_rows,)` bool.
    """
    shape = len(held_out), len(STRENGTHS), len(columns), int(rows.prompts.max()) + 1
    found = torch.zeros(shape, dtype=torch.float64)
    for first, second in combinations(range(len(held_out)), 2):
        model = Model(rows, design, ~(held_out[first] | held_out[second]))
        for number, strength in enumerate(STRENGTHS):
            coefficients = model.first_step(strength, columns)
            offsets = model.offsets(strength)
            for fold, judge in ((first, held_out[second]), (second, held_out[first])):
                log_odds = offsets[judge] + coefficients @ design[judge].T
                likelihood = model.weights[judge] * log_likelihood(log_odds, rows.outcomes[judge])
                found[fold, number].index_add_(1, rows.prompts[judge], likelihood)
    return found


def _fewest_blocks(likelihoods: Tensor, num_used: Tensor) -> int:
    """The best candidate of those with the fewest blocks that are within one standard error of the best of all.

    Args:
        likelihoods: `(num_priors, num_prompts)`.
        num_used: `(num_priors,)`, blocks in use.
    """
    totals = likelihoods.sum(dim=1)
    best = int(totals.argmax())
    for count in range(int(num_used[best])):
        simpler = int(totals.masked_fill(num_used != count, float("-inf")).argmax())
        lead = likelihoods[best] - likelihoods[simpler]
        if float(lead.sum()) <= float(lead.std()) * lead.numel() ** 0.5:
            return simpler
    return best
