"""Logistic regression with an offset, fractional outcomes and a normal prior, by Newton's method in float64.

Own code, because scikit-learn's logistic regression has no offset, and because statsmodels and glum, which have one,
would bring compiled packages into the trainer's environment that verl does not install.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

WIDEST = 6.0
"""Standardised columns are clipped at this many standard deviations."""
MAX_ITERATIONS = 100
"""Far more than Newton's method takes (about 6)."""
TOLERANCE = 1e-9
"""Nats over all responses that one more step may still gain."""
TINY = 1e-12


class Rows(NamedTuple):
    """States to fit to and to value, of one or several steps.

    Attributes:
        features: `(num_rows, num_features)`.
        group_means: `(num_rows,)` float64, mean outcome of the prompt's other rollouts; NaN: none.
        num_others: `(num_rows,)` float64, how many those are.
        outcomes: `(num_rows,)` float64 in [0, 1].
        weights: `(num_rows,)` float64; a response of the present step has 1 in all.
        prompts: `(num_rows,)` int64, the same for the rows of a prompt.
        steps: `(num_rows,)` int64, the trainer's step.
    """

    features: Tensor
    group_means: Tensor
    num_others: Tensor
    outcomes: Tensor
    weights: Tensor
    prompts: Tensor
    steps: Tensor

    def take(self, places: Tensor) -> "Rows":
        """The rows with these numbers, or where this mask is true."""
        return Rows(*(tensor[places] for tensor in self))


def standardised(features: Tensor, weights: Tensor) -> Tensor:
    """Columns of mean 0 and deviation 1, clipped, and a column of ones: `(num_rows, num_features + 1)` float64."""
    features, share = features.double(), weights / weights.sum()
    center = share @ features
    scale = (share @ (features - center).square()).sqrt()
    varies = scale > 1e-9 * (1.0 + center.abs())
    columns = ((features - center) / scale.masked_fill(~varies, 1.0)).clamp(-WIDEST, WIDEST) * varies
    return torch.cat([columns, columns.new_ones(len(columns), 1)], dim=1)


class Model:
    """The model with the outcomes of the rows in `train`; it sees no outcome of another row.

    Args:
        rows: All rows.
        design: `(num_rows, num_columns)` float64, from `standardised`.
        train: `(num_rows,)` bool.

    Attributes:
        weights: `(num_rows,)`, weights of all rows in a likelihood.
        mean: Mean outcome of the training rows.
    """

    def __init__(self, rows: Rows, design: Tensor, train: Tensor) -> None:
        means, outcomes, weights = rows.group_means, rows.outcomes, rows.weights
        # Prompts that were all right or all wrong are often not measured. Of those that were, a rollout whose others
        # are all wrong is right, whatever its states: that is the selection, and it says nothing. Given others that do
        # not agree, the own outcome was not selected for.
        others_agree = (means < TINY) | (means > 1.0 - TINY)
        has_uniform_prompts = bool((others_agree & train & ((outcomes - means).abs() < TINY)).any())
        weights = weights if has_uniform_prompts else weights.masked_fill(others_agree, 0.0)
        total, successes = weights[train].sum(), weights[train] @ outcomes[train]
        self.mean = min(1.0, float(successes / total)) if total > 0 else 0.5
        # Half a success and half a failure more, or a mean of 0 or 1 would have no log-odds.
        self._level = (successes + 0.5) / (total + 1.0)
        # Outcomes that are all the same say nothing of what they depend on.
        self.weights = weights * (outcomes[train] != outcomes[train][:1]).any()
        self._rows, self._design, self._train = rows, design, train
        self._train_design, self._train_outcomes = design[train], outcomes[train]
        self._train_weights = self.weights[train]

    def offsets(self, strength: float) -> Tensor:
        """Log-odds of the group means, drawn to the training rows' mean as a Beta prior would: `(num_rows,)`.

        0 of 7 is not impossible. The offset's coefficient is fixed at 1: a free one would meet that, within a prompt,
        the mean of the others is the lower the better the own outcome.

        Args:
            strength: Rollouts that the mean of the training rows counts as.
        """
        others, means = self._rows.num_others, self._rows.group_means.nan_to_num(nan=0.0)
        return ((strength * self._level + others * means) / (strength + others)).logit()

    def first_step(self, strength: float, deviations: Tensor) -> Tensor:
        """Coefficients for several priors, close enough to compare them: `(num_priors, num_columns)`.

        One step of Newton's method from 0, so the training rows are read once for all priors.

        Args:
            strength: See `offsets`.
            deviations: `(num_priors, num_columns)`, prior deviations of the coefficients; 0: left out.
        """
        slope, curvature = self._expand(self.offsets(strength)[self._train])
        return deviations * _solve(curvature, deviations, deviations * slope)

    def log_odds(self, strength: float, deviations: Tensor) -> Tensor:
        """Log-odds of all rows, fitted to the last digit: `(num_rows,)`. Arguments as above, of one prior."""
        offsets = self.offsets(strength)
        # In units of the deviations: the penalty is half the sum of squares, and a deviation of 0 leaves a column out.
        coefficients = torch.zeros_like(deviations)

        def log_odds(coefficients: Tensor) -> Tensor:
            return offsets[self._train] + self._train_design @ (deviations * coefficients)

        def loss(coefficients: Tensor) -> Tensor:
            likelihood = self._train_weights @ log_likelihood(log_odds(coefficients), self._train_outcomes)
            return 0.5 * coefficients @ coefficients - likelihood

        for _ in range(MAX_ITERATIONS):
            slope, curvature = self._expand(log_odds(coefficients))
            gradient = deviations * slope - coefficients
            step = _solve(curvature, deviations, gradient)
            gain = float(gradient @ step)
            # A full step can overshoot where the means saturate; half of it enough times cannot.
            while loss(coefficients + step) > loss(coefficients) + TOLERANCE:
                step = step / 2.0
            coefficients = coefficients + step
            if gain < TOLERANCE:
                break
        return offsets + self._design @ (deviations * coefficients)

    def _expand(self, log_odds: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and curvature of the training rows' log-likelihood in the coefficients, the prior left out."""
        means, design = log_odds.sigmoid(), self._train_design
        slope = design.T @ (self._train_weights * (self._train_outcomes - means))
        curvature = design.T @ (design * (self._train_weights * means * (1.0 - means)).unsqueeze(1))
        return slope, curvature


def log_likelihood(log_odds: Tensor, outcomes: Tensor) -> Tensor:
    """R log p + (1 - R) log(1 - p) with p = sigmoid(log_odds), in nats; also for R between 0 and 1."""
    return outcomes * log_odds - softplus(log_odds)


def _solve(curvature: Tensor, deviations: Tensor, gradient: Tensor) -> Tensor:
    """Newton's step in units of the deviations; `deviations` and `gradient` may be of several priors."""
    scaled = deviations.unsqueeze(-1) * curvature * deviations.unsqueeze(-2)
    step: Tensor = torch.linalg.solve(scaled + torch.eye(len(curvature), dtype=curvature.dtype), gradient)
    return step
