"""Forecasts: rows valued by a fit to other rows, with what is chosen chosen on those other rows too."""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from rredcot_verl.readout.model import Model, Rows, log_likelihood, shuffled_places

STRENGTHS = (1.0, 4.0, 16.0, 64.0, 256.0)
"""Rollouts that the mean of the other prompts may count as. The more the columns say of a prompt, the less its group
mean adds to them."""
DEVIATIONS = (0.0, 0.04, 0.15, 0.6)
"""Prior deviations of a block's coefficients, in log-odds per standard deviation of a column; 0: left out."""
INTERCEPT_DEVIATION = 30.0
"""The constant is as good as free."""
NUM_FOLDS = 5
"""Folds of training prompts, each left out once."""
MIN_PROMPTS = 10
"""With fewer prompts a standard error over prompts is not worth much: the group mean is kept."""


class Forecast(NamedTuple):
    """Values of rows, and what was chosen.

    Attributes:
        values: `(num_rows,)` float64 in [0, 1].
        deviations: `(num_blocks,)`, prior deviations chosen; 0: the block is left out.
        gain: Log-likelihood of the rows' outcomes under the forecast less that under the group means alone, nats per
            response; 0 where those are kept.
    """

    values: Tensor
    deviations: Tensor
    gain: float


def forecast(rows: Rows, train: Rows, blocks: Tensor, seed: int) -> Forecast:
    """Value rows by a fit to others; no outcome of the rows enters their values.

    Features are used where that raises the likelihood of left-out folds of the training rows by more than its standard
    error over prompts. Otherwise the values are the other rollouts' means exactly, not drawn anywhere.

    Args:
        rows: The rows to value.
        train: The rows to fit to, maybe none.
        blocks: `(num_features,)` columns with the same number share a prior.
        seed: Deals the training rows' prompts into folds.
    """
    _, blocks = torch.unique(blocks, return_inverse=True)
    num_blocks = int(blocks.max()) + 1 if blocks.numel() else 0
    # The first one leaves all blocks out.
    priors = torch.tensor(list(product(DEVIATIONS, repeat=num_blocks)), dtype=torch.float64)
    mean, prior, gain, values = 0.5, 0, 0.0, rows.group_means
    if len(train.steps):
        model = Model(train)
        mean = model.mean
        if num_blocks and len(torch.unique(train.prompts)) >= MIN_PROMPTS:
            columns = torch.cat([priors[:, blocks], torch.full((len(priors), 1), INTERCEPT_DEVIATION)], dim=1)
            strengths, prior = _chosen(train, columns, seed, (priors > 0).sum(dim=1))
            if prior:
                used, plain = (
                    model.log_odds(rows, strengths[number], model.coefficients(strengths[number], columns[number]))
                    for number in (prior, 0)
                )
                values = used.sigmoid()
                gains = log_likelihood(used, rows.outcomes) - log_likelihood(plain, rows.outcomes)
                gain = float(rows.weights @ gains / rows.weights.sum().clamp(min=1.0))
    return Forecast(values.nan_to_num(nan=mean), priors[prior], gain)


def _chosen(train: Rows, columns: Tensor, seed: int, num_used: Tensor) -> tuple[list[float], int]:
    """The best strength for each prior, and the prior, by the likelihood of folds that are left out.

    Args:
        train: The training rows.
        columns: `(num_priors, num_columns)`, prior deviations.
        seed: See `forecast`.
        num_used: `(num_priors,)`, blocks in use.
    """
    distinct, prompts = torch.unique(train.prompts, return_inverse=True)
    folds = shuffled_places(distinct, seed)[prompts] % NUM_FOLDS
    found = torch.zeros(len(STRENGTHS), len(columns), len(distinct), dtype=torch.float64)
    for fold in range(NUM_FOLDS):
        judge = train.take(folds == fold)
        model = Model(train.take(folds != fold))
        for number, strength in enumerate(STRENGTHS):
            log_odds = model.log_odds(judge, strength, model.first_step(strength, columns))
            likelihood = judge.weights * log_likelihood(log_odds, judge.outcomes)
            found[number].index_add_(1, prompts[folds == fold], likelihood)
    best = found.sum(dim=2).argmax(dim=0)
    prior = _fewest_blocks(found[best, torch.arange(len(columns))], num_used)
    return [STRENGTHS[number] for number in best.tolist()], prior


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
