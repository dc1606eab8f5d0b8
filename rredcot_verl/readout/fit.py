"""Logistic regression with offsets, fractional outcomes and a ridge, by Newton's method in float64.

Own code, because scikit-learn's logistic regression has no offset, and because statsmodels and glum, which have one,
would bring compiled packages into the trainer's environment that verl does not install.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

MAX_ITERATIONS = 100
"""Far more than a fit with a ridge takes (about 10)."""
EXACT = 1e-12
"""Tolerance of a fit whose values are used, nats over all responses."""
COARSE = 1e-2
"""Tolerance of fits that only compare ridge strengths."""
SLOW = 0.1
"""A step that lowers the expected gain of the next to more than this share of its own calls for a new curvature."""


class LogisticFit:
    """Coefficients b that minimise sum_i w_i (log(1 + exp(eta_i)) - R_i eta_i) + 1/2 sum_j ridge_j b_j^2.

    eta = offsets + design @ b. For R in {0, 1} the first sum is the negative log-likelihood; for R in between it has
    its minimum at the same conditional mean (quasi-likelihood). The ridge is above 0, so the minimum exists and is
    one, with more columns than rows too.

    The curvature is what costs: `num_rows * num_columns^2`. It is kept from one fit to the next, and computed anew only
    where the steps it gives grow poor.

    Args:
        design: `(num_rows, num_columns)` float64.
        offsets: `(num_rows,)` float64, log-odds that enter with coefficient 1.
        outcomes: `(num_rows,)` float64 in [0, 1].
        weights: `(num_rows,)` float64, at least 0.
    """

    def __init__(self, design: Tensor, offsets: Tensor, outcomes: Tensor, weights: Tensor) -> None:
        self._design, self._offsets, self._outcomes, self._weights = design, offsets, outcomes, weights
        self._rough = design.float()
        self._curvature: Tensor | None = None
        self._last = design.new_zeros(design.size(1))

    def fit(self, ridge: Tensor, tolerance: float = EXACT) -> Tensor:
        """Coefficients `(num_columns,)`, starting from those of the last fit.

        Args:
            ridge: `(num_columns,)` float64, above 0.
            tolerance: Stop when the next step is expected to lower the sum by less.
        """
        coefficients = self._last
        present, eta = self._loss(coefficients, ridge)
        before = float("inf")
        for _ in range(MAX_ITERATIONS):
            gradient = self._slope(eta) - ridge * coefficients
            fresh = self._curvature is None
            step = self._newton(gradient, eta, ridge)
            expected = 0.5 * float(gradient @ step)
            if not fresh and expected > SLOW * before:
                self._curvature = None
                step = self._newton(gradient, eta, ridge)
                expected = 0.5 * float(gradient @ step)
            if expected < tolerance:
                break
            scale = 1.0
            found, eta = self._loss(coefficients + step, ridge)
            # A full step can overshoot where the means saturate; half of it enough times cannot.
            while not found <= present and scale > 1e-6:
                scale /= 2.0
                found, eta = self._loss(coefficients + scale * step, ridge)
            coefficients, present, before = coefficients + scale * step, found, expected
        self._last = coefficients
        return coefficients

    def moved(self, offsets: Tensor) -> "LogisticFit":
        """The same rows with other offsets; what this fit knows is where that one starts."""
        other = LogisticFit(self._design, offsets, self._outcomes, self._weights)
        other._curvature, other._last = self._curvature, self._last
        return other

    def path(self, ridges: Tensor) -> Tensor:
        """Coefficients for several neighbouring ridges: a fit in the middle, and one Newton step from it to the others.

        To compare strengths at the price of one fit; what is chosen is then fitted by `fit`.

        Args:
            ridges: `(num_ridges, num_columns)`, sorted by strength.

        Returns:
            `(num_ridges, num_columns)` float64.
        """
        center = self.fit(ridges[len(ridges) // 2], tolerance=COARSE)
        if len(ridges) == 1:
            return center.unsqueeze(0)
        eta = self._offsets + self._design @ center
        self._curvature = self._second(eta)
        target = self._curvature @ center + self._slope(eta)
        found: Tensor = torch.linalg.solve(self._curvature + torch.diag_embed(ridges), target.expand(len(ridges), -1))
        return found

    def _loss(self, coefficients: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        eta = self._offsets + self._design @ coefficients
        loss = self._weights @ (softplus(eta) - self._outcomes * eta)
        return loss + 0.5 * (ridge @ coefficients.square()), eta

    def _slope(self, eta: Tensor) -> Tensor:
        return self._design.T @ (self._weights * (self._outcomes - eta.sigmoid()))

    def _second(self, eta: Tensor) -> Tensor:
        # In float32, three times as fast: it directs the steps, and the gradient in float64 says where they end.
        means = eta.sigmoid()
        scaled = self._rough * (self._weights * means * (1.0 - means)).float().unsqueeze(1)
        return (self._rough.T @ scaled).double()

    def _newton(self, gradient: Tensor, eta: Tensor, ridge: Tensor) -> Tensor:
        if self._curvature is None:
            self._curvature = self._second(eta)
        step: Tensor = torch.linalg.solve(self._curvature + ridge.diag(), gradient)
        return step


def log_likelihood(log_odds: Tensor, outcomes: Tensor) -> Tensor:
    """R log p + (1 - R) log(1 - p) with p = sigmoid(log_odds): `(num_rows,)`, nats."""
    return outcomes * log_odds - softplus(log_odds)
