"""Logistic regression with an offset, fractional outcomes and a normal prior, by Newton's method in float64.

Own code, because scikit-learn's logistic regression has no offset, and because statsmodels and glum, which have one,
would bring compiled packages into the trainer's environment that verl does not install.
"""

import hashlib
from collections.abc import Hashable, Iterable
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


class Rows(NamedTuple):
    """States to fit to and to value, of one or several steps.

    Attributes:
        features: `(num_rows, num_features)`.
        group_means: `(num_rows,)` float64, mean outcome of the prompt's other rollouts; NaN: none.
        num_others: `(num_rows,)` float64, how many those are.
        outcomes: `(num_rows,)` float64 in [0, 1].
        weights: `(num_rows,)` float64; a response of the present step has 1 in all, or 0: it is not fitted to.
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


class Model:
    """The model of some rows. Of the rows that it values it reads neither the outcomes nor how they are distributed.

    Args:
        train: The rows that are fitted to, at least one.

    Attributes:
        mean: Their mean outcome.
    """

    def __init__(self, train: Rows) -> None:
        outcomes, weights, features = train.outcomes, train.weights, train.features.double()
        total, successes = weights.sum(), weights @ outcomes
        self.mean = min(1.0, float(successes / total))
        # Half a success and half a failure more, or a mean of 0 or 1 would have no log-odds.
        self._level = (successes + 0.5) / (total + 1.0)
        share = weights / total
        self._center = share @ features
        scale = (share @ (features - self._center).square()).sqrt()
        self._varies = scale > 1e-9 * (1.0 + self._center.abs())
        self._scale = scale.masked_fill(~self._varies, 1.0)
        self._train, self._design = train, self._standardised(train)
        # Outcomes that are all the same say nothing of what they depend on.
        self._weights = weights * (outcomes != outcomes[:1]).any()

    def _standardised(self, rows: Rows) -> Tensor:
        """Columns of mean 0 and deviation 1 in the training rows, clipped, and ones: `(num_rows, num_columns)`."""
        columns = ((rows.features.double() - self._center) / self._scale).clamp(-WIDEST, WIDEST) * self._varies
        return torch.cat([columns, columns.new_ones(len(columns), 1)], dim=1)

    def _offsets(self, rows: Rows, strength: float) -> Tensor:
        """Log-odds of the group means, drawn to the training rows' mean as a Beta prior would: `(num_rows,)`.

        0 of 7 is not impossible. The offset's coefficient is fixed at 1: a free one would meet that, within a prompt,
        the mean of the others is the lower the better the own outcome.
        """
        others, means = rows.num_others, rows.group_means.nan_to_num(nan=0.0)
        return ((strength * self._level + others * means) / (strength + others)).logit()

    def log_odds(self, rows: Rows, strength: float, coefficients: Tensor) -> Tensor:
        """Log-odds of rows.

        Args:
            rows: Any rows.
            strength: Rollouts that the mean of the training rows counts as.
            coefficients: `(..., num_columns)`.

        Returns:
            `(..., num_rows)`.
        """
        return self._offsets(rows, strength) + coefficients @ self._standardised(rows).T

    def first_step(self, strength: float, deviations: Tensor) -> Tensor:
        """Coefficients for several priors, close enough to compare them: `(num_priors, num_columns)`.

        One step of Newton's method from 0, so the training rows are read once for all priors.

        Args:
            strength: See `log_odds`.
            deviations: `(num_priors, num_columns)`, prior deviations of the coefficients; 0: left out.
        """
        slope, curvature = self._expand(self._offsets(self._train, strength))
        return deviations * _solve(curvature, deviations, deviations * slope)

    def coefficients(self, strength: float, deviations: Tensor) -> Tensor:
        """Coefficients for one prior, fitted to the last digit: `(num_columns,)`. Arguments as above."""
        offsets = self._offsets(self._train, strength)
        # In units of the deviations: the penalty is half the sum of squares, and a deviation of 0 leaves a column out.
        coefficients = torch.zeros_like(deviations)

        def log_odds(coefficients: Tensor) -> Tensor:
            return offsets + self._design @ (deviations * coefficients)

        def loss(coefficients: Tensor) -> Tensor:
            likelihood = self._weights @ log_likelihood(log_odds(coefficients), self._train.outcomes)
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
        return deviations * coefficients

    def _expand(self, log_odds: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and curvature of the training rows' log-likelihood in the coefficients, the prior left out."""
        means, design = log_odds.sigmoid(), self._design
        slope = design.T @ (self._weights * (self._train.outcomes - means))
        curvature = design.T @ (design * (self._weights * means * (1.0 - means)).unsqueeze(1))
        return slope, curvature


def log_likelihood(log_odds: Tensor, outcomes: Tensor) -> Tensor:
    """R log p + (1 - R) log(1 - p) with p = sigmoid(log_odds), in nats; also for R between 0 and 1."""
    return outcomes * log_odds - softplus(log_odds)


def digest(labels: Iterable[Hashable]) -> Tensor:
    """`(n,)` int64: the same for a label (by its text) in every process and whatever Python's hash seed."""
    texts = [str(label) for label in labels]
    hashes = {text: hashlib.blake2b(text.encode(), digest_size=8).digest() for text in set(texts)}
    return torch.tensor([int.from_bytes(hashes[text], "big", signed=True) for text in texts], dtype=torch.int64)


def shuffled_places(prompts: Tensor, seed: int) -> Tensor:
    """Place of each of the distinct prompts in an order that depends on their set and the seed alone: `(n,)` int64."""
    return digest(f"{seed}:{prompt}" for prompt in prompts.tolist()).argsort().argsort()


def _solve(curvature: Tensor, deviations: Tensor, gradient: Tensor) -> Tensor:
    """Newton's step in units of the deviations; `deviations` and `gradient` may be of several priors."""
    scaled = deviations.unsqueeze(-1) * curvature * deviations.unsqueeze(-2)
    step: Tensor = torch.linalg.solve(scaled + torch.eye(len(curvature), dtype=curvature.dtype), gradient)
    return step
