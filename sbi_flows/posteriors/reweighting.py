"""Importance weights of draws: Pareto smoothing, and effective sample size.

Public names: `Reweighting`, `reweighted`, `cjs_distance`.

The smoothing is that of `psislw` of ArviZ 0.x. ArviZ 1.x has no function of that name; a test
compares both where it exists.
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
        weights: Weights, which add up to 1, shape (n,).
        effective: Effective sample size: 1 over the sum of squared weights.
        pareto_k: Shape parameter of the tail of the weights. Their mean exists below 1, their
            variance below 1/2. It is 0 where the largest weights tie.
    """

    weights: np.ndarray
    effective: float
    pareto_k: float

    @property
    def reliable(self) -> bool:
        """Whether weighted averages are reliable at this number of draws."""
        limit = min(0.7, 1.0 - 1.0 / math.log10(len(self.weights)))
        return self.pareto_k <= limit and self.effective >= MIN_EFFECTIVE_SAMPLE_SIZE


def reweighted(log_ratio: np.ndarray) -> Reweighting:
    """Compute weights from log density ratios (n,), the largest smoothed by a Pareto tail.

    Args:
        log_ratio: Log ratios up to a constant, n at least 25. -inf is a weight of zero; at least
            one is finite, and none is NaN.

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
    tail = tail[ratios[tail] > cut]  # values that tie with the cut are not in the tail
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
    Distribution" (Technometrics 51:316), with the opposite sign of the shape and a
    weak prior at 1/2 that is worth ten more numbers.
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

    It is the cumulative Jensen-Shannon distance of both distribution functions, divided by its
    upper bound, so that it lies in [0, 1]; the larger of the values for draws and negated draws.

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
    """Compute the symmetric divergence of two step functions over its upper bound."""
    p, q = np.maximum(p, 1e-300), np.maximum(q, 1e-300)
    middle = 0.5 * (p + q)
    # the terms that make each direction positive cancel in the sum
    divergence = np.sum(steps * (p * np.log2(p / middle) + q * np.log2(q / middle)), axis=0)
    bound = np.sum(steps * (p + q), axis=0)
    return np.maximum(divergence, 0.0) / np.maximum(bound, 1e-300)
