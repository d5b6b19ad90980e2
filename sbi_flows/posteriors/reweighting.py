"""Importance weights of draws, with Pareto smoothing and the effective sample size.

Public names: `Reweighting`, `reweighted`, `cjs_distance`.

The smoothing is the same as in the function `psislw` of ArviZ 0.x. ArviZ 1.x does not have this
function. If ArviZ 0.x is installed, a test compares the weights with those of `psislw`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

MIN_EFFECTIVE_SAMPLE_SIZE = 100
"""Minimum effective sample size for a weighted mean to be accurate to 0.1 standard deviations."""


class Reweighting(NamedTuple):
    """Importance weights of draws.

    Attributes:
        weights: Normalised weights, shape (n,); their sum is 1.
        effective: Effective sample size, 1 / sum(weights**2).
        pareto_k: Shape parameter k of the Pareto tail of the weights. The weights have a finite
            mean if k < 1, and a finite variance if k < 1/2. k is 0 if the largest weights are
            equal.
    """

    weights: np.ndarray
    effective: float
    pareto_k: float

    @property
    def reliable(self) -> bool:
        """Whether weighted averages are reliable, as judged from `pareto_k` and `effective`."""
        limit = min(0.7, 1.0 - 1.0 / math.log10(len(self.weights)))
        return self.pareto_k <= limit and self.effective >= MIN_EFFECTIVE_SAMPLE_SIZE


def reweighted(log_ratio: np.ndarray) -> Reweighting:
    """Compute weights from log density ratios; smooth the largest weights by a Pareto tail.

    Args:
        log_ratio: Log density ratios up to a constant, shape (n,); n must be at least 25. -inf
            gives a weight of zero. At least one ratio must be finite, and none may be NaN.

    References:
        Vehtari, Simpson, Gelman, Yao & Gabry 2024, Pareto Smoothed Importance Sampling,
        arXiv:1507.02646, sections 2 and 3.

    Example:
        >>> import numpy as np
        >>> z = np.random.default_rng(0).normal(size=4_000)
        >>> found = reweighted(0.5 * z)  # a normal moved by half a standard deviation
        >>> round(float(found.weights @ z), 1), found.reliable, reweighted(4.0 * z).reliable
        (0.5, True, False)
    """
    ratios = np.exp(np.asarray(log_ratio, np.float64) - np.max(log_ratio))
    n = len(ratios)
    order = np.argsort(ratios)
    tail = order[n - math.ceil(min(0.2 * n, 3.0 * math.sqrt(n))) :]
    cut = ratios[order[n - len(tail) - 1]]
    tail = tail[ratios[tail] > cut]  # leave out values equal to the cut
    k = 0.0
    if len(tail) >= 5:
        excess = ratios[tail] - cut
        k, scale = _pareto(excess)
        places = (np.arange(len(tail)) + 0.5) / len(tail)
        quantiles = scale * (np.expm1(-k * np.log1p(-places)) / k if k else -np.log1p(-places))
        ratios[tail] = np.minimum(cut + quantiles, ratios[tail[-1]])
    weights = ratios / ratios.sum()
    return Reweighting(weights, float(1.0 / np.sum(weights**2)), float(k))


def _pareto(excess: np.ndarray) -> tuple[float, float]:
    """Fit shape and scale of a generalised Pareto distribution to sorted positive numbers (m,).

    Source: Zhang & Stephens 2009, "A New and Efficient Estimation Method for the Generalized Pareto
    Distribution" (Technometrics 51:316). Here the shape has the opposite sign, and a weak prior
    draws it towards 1/2. The prior has the same weight as ten numbers.
    """
    m = len(excess)
    count = 30 + int(math.sqrt(m))
    quartile = excess[int(m / 4 + 0.5) - 1]
    b = (1.0 - np.sqrt(count / (np.arange(count) + 0.5))) / (3.0 * quartile) + 1.0 / excess[-1]
    shapes = np.mean(np.log1p(-b[:, None] * excess), axis=1)
    profile = m * (np.log(-b / shapes) - shapes - 1.0)
    weights = np.exp(profile - profile.max())
    best = float(np.sum(b * weights) / np.sum(weights))
    k = float(np.mean(np.log1p(-best * excess)))
    return (k * m + 5.0) / (m + 10.0), -k / best


def cjs_distance(draws: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute the distance (D,) between draws (n, D) and weighted draws, for each parameter.

    This is the cumulative Jensen-Shannon distance between the two distribution functions, divided
    by its upper bound, so that it lies in [0, 1]. The distance depends on the sign of a parameter:
    it is computed for the draws and for the negated draws, and the larger value is returned.

    References:
        Nguyen & Vreeken 2015, Non-Parametric Jensen-Shannon Divergence, section 3. Kallioinen et
        al. 2023, Detecting and Diagnosing Prior and Likelihood Sensitivity with Power-Scaling,
        arXiv:2107.14054, section 2.3.
    """
    order = np.argsort(draws, axis=0)
    steps = np.diff(np.take_along_axis(draws, order, axis=0), axis=0)
    below = np.cumsum(weights[order], axis=0)[:-1]
    plain = np.broadcast_to(np.arange(1, len(draws))[:, None] / len(draws), below.shape)
    sides = _cjs(plain, below, steps), _cjs(1.0 - plain, 1.0 - below, steps)
    return np.sqrt(np.maximum(*sides))


def _cjs(p: np.ndarray, q: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Compute the cumulative Jensen-Shannon divergence of step functions p, q, in [0, 1]."""
    p, q = np.maximum(p, 1e-300), np.maximum(q, 1e-300)
    middle = 0.5 * (p + q)
    # each one-sided divergence has extra terms that make it positive; they cancel in this sum
    divergence = np.sum(steps * (p * np.log2(p / middle) + q * np.log2(q / middle)), axis=0)
    bound = np.sum(steps * (p + q), axis=0)
    return np.maximum(divergence, 0.0) / np.maximum(bound, 1e-300)
