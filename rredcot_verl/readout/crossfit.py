"""Cross-fitting by prompt: every row is valued by a fit that saw no outcome of its prompt.

Nested, with every pair of folds left out once: the fit without folds f and g judges a ridge strength on g for the
choice of f, and on f for the choice of g. So the choice is as blind to a fold as the fit is.
"""

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from rredcot_verl.readout.fit import log_likelihood
from rredcot_verl.readout.sample import AUTOMATIC, INFINITE, Choice, Fits, Sample

RIDGES = (1000.0, 200.0, 40.0, 8.0, 1.6, 0.3)
"""Ridge strengths compared, and none of the block at all; see `Choice`."""
OFFSET_STRENGTHS = (AUTOMATIC, 4.0, 16.0, 64.0, 256.0)
"""The more the columns say of the prompt, the less its group mean adds to them."""
MIN_PROMPTS = 10
"""With fewer prompts a standard error over prompts is not worth much: the group mean is kept."""

Scores = dict[Choice, Tensor]
"""Held-out log-likelihood of each candidate by prompt."""


@dataclass(frozen=True)
class CrossFit:
    """Values of all rows, and what was chosen.

    Attributes:
        values: `(num_rows,)` float64 in [0, 1].
        choices: One for each fold that holds rows.
        gain: Held-out log-likelihood of the choice less that of the group means, nats per response; 0 where no choice
            was made.
    """

    values: Tensor
    choices: list[Choice]
    gain: float


def cross_fit(sample: Sample) -> CrossFit:
    """Value every row by a fit to the other folds' rows.

    The log-odds are offset + features @ b. The offset is that of the prompt's other rollouts' mean, drawn to the mean
    of the training prompts as a Beta prior would, so that 0 of 7 is not taken for impossible. Its coefficient is fixed
    at 1: a free one would meet that, within a prompt, the mean of the others is the lower the better the own outcome.
    How strongly it is drawn is chosen with the ridges: columns that know the prompt make its mean redundant.

    A block of columns is used where that raises the held-out likelihood by more than its standard error over prompts.
    Where no block is, the values are the other rollouts' means exactly, not drawn anywhere.
    """
    folds = torch.unique(sample.folds).tolist()
    num_blocks = int(sample.blocks.max()) + 1 if sample.blocks.numel() else 0
    nothing = Choice((INFINITE,) * num_blocks, AUTOMATIC)
    chosen, gain = dict.fromkeys(folds, nothing), 0.0
    if num_blocks and len(folds) >= 3 and int(sample.prompts.max()) + 1 >= MIN_PROMPTS:
        chosen, gain = _choose(sample, folds, nothing)
    values = torch.empty_like(sample.outcomes)
    for fold in folds:
        held_out = (sample.folds == fold).nonzero().flatten()
        fits = Fits(sample, sample.folds != fold)
        if any(chosen[fold].used):
            values[held_out] = fits.log_odds(chosen[fold], held_out).sigmoid()
        else:
            means = sample.group_means[held_out]
            values[held_out] = torch.where(means.isnan(), fits.mean, means)
    return CrossFit(values, list(chosen.values()), gain)


def _choose(sample: Sample, folds: list[int], nothing: Choice) -> tuple[dict[int, Choice], float]:
    """Block after block, each judged beside those before it; then the offset's strength; then the first block again."""
    chosen = dict.fromkeys(folds, nothing)
    scores: dict[int, Scores] = {}
    num_blocks = len(nothing.ridges)
    for number, block in enumerate([*range(num_blocks), None, 0]):
        again = number > num_blocks
        wanted = {fold: {nothing, *_candidates(choice, block, again)} for fold, choice in chosen.items()}
        scores = held_out_likelihoods(sample, folds, wanted)
        for fold in folds:
            chosen[fold] = _best(scores[fold], chosen[fold], block)
    gained = torch.stack([(scores[fold][chosen[fold]] - scores[fold][nothing]).sum() for fold in folds])
    num_judged = sample.weights.sum() * (len(folds) - 1)
    return chosen, float(gained.sum() / num_judged)


def _candidates(choice: Choice, block: int | None, again: bool) -> list[Choice]:
    """What is compared for a block (or for the offset); once it was chosen, its neighbours alone."""
    if block is None:
        return [Choice(choice.ridges, strength) for strength in OFFSET_STRENGTHS if any(choice.used)] or [choice]
    near = range(len(RIDGES))
    if again and choice.used[block]:
        place = RIDGES.index(choice.ridges[block])
        near = range(max(0, place - 1), min(len(RIDGES), place + 2))
    return [_with(choice, block, ridge) for ridge in (INFINITE, *(RIDGES[number] for number in near))]


def _with(choice: Choice, block: int, ridge: float) -> Choice:
    return Choice((*choice.ridges[:block], ridge, *choice.ridges[block + 1 :]), choice.strength)


def _best(scores: Scores, present: Choice, block: int | None) -> Choice:
    """The likeliest candidate if it gains more than one standard error; else no block, or the automatic strength."""
    best = max(sorted(scores), key=lambda choice: float(scores[choice].sum()))
    simpler = present if block is None else _with(present, block, INFINITE)
    gain = scores[best] - scores[simpler]
    return best if float(gain.sum()) > float(gain.std()) * gain.numel() ** 0.5 else simpler


def held_out_likelihoods(sample: Sample, folds: list[int], wanted: dict[int, set[Choice]]) -> dict[int, Scores]:
    """For each fold and each of its candidates: log-likelihood of every prompt of the other folds, `(num_prompts,)`."""
    num_prompts = int(sample.prompts.max()) + 1
    total = {fold: {choice: sample.outcomes.new_zeros(num_prompts) for choice in wanted[fold]} for fold in folds}
    for first, second in combinations(folds, 2):
        fits = Fits(sample, (sample.folds != first) & (sample.folds != second))
        for fold, judge in ((first, second), (second, first)):
            rows = (sample.folds == judge).nonzero().flatten()
            # Each fold's candidates on their own: which ones the other fold has depends on this fold's outcomes.
            for choice, log_odds in fits.compare(wanted[fold], rows).items():
                score = fits.weights(rows) * log_likelihood(log_odds, sample.outcomes[rows])
                total[fold][choice].index_add_(0, sample.prompts[rows], score)
    judges = {fold: torch.unique(sample.prompts[sample.folds != fold]) for fold in folds}
    return {fold: {choice: score[judges[fold]] for choice, score in scores.items()} for fold, scores in total.items()}
