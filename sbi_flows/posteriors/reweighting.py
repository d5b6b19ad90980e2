"""Draws re-weighted to another density: weights with a smooth tail, and what they are worth.

Public names: `Reweighting`, `reweighted`, `cjs_distance`.

The smoothing is that of `psislw` of ArviZ 0.x, which ArviZ 1.x, supported too, has no longer by
that name; a test compares the two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

LEAST_EFFECTIVE = 100
"""Draws that weighted ones have to be worth, for a mean to be good to a tenth of its sd."""


class Reweighting(NamedTuple):
    """Weights of draws.

    Attributes:
        weights: They add up to 1, shape (n,).
        effective: Number of draws without weights that they are worth: 1 over the sum of squares.
        pareto_k: Shape of the tail of the weights: their mean needs it below 1, their variance
            below 1/2; 0 where the largest weights tie.
    """

    weights: np.ndarray
    effective: float
    pareto_k: float

    @property
    def reliable(self) -> bool:
        """Whether averages with these weights can be told from so many draws."""
        limit = min(0.7, 1.0 - 1.0 / math.log10(len(self.weights)))
        return self.pareto_k <= limit and self.effective >= LEAST_EFFECTIVE


def reweighted(log_ratio: np.ndarray) -> Reweighting:
    """Weights from log density ratios (n,), the largest replaced by quantiles of a Pareto tail.

    Args:
        log_ratio: Up to a constant; -inf is a weight of zero, one at least is finite. n is at least
            25, and NaN has no meaning here.

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
    tail = tail[ratios[tail] > cut]  # what ties with the cut is no part of a tail
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
    """Shape and scale of a generalised Pareto distribution of increasing positive numbers (m,).

    Source: Zhang & Stephens 2009, "A New and Efficient Estimation Method for the Generalized Pareto
    Distribution" (Technometrics 51:316), in the opposite sign; drawn to 1/2 as by ten more numbers.
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
    """Between draws (n, D) and the same with weights (n,), column by column; in [0, 1], shape (D,).

    The cumulative Jensen-Shannon distance of distribution functions, over its upper bound; the
    larger one of draws and of negative draws.

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
    """Divergence in both directions of functions on steps, over its upper bound."""
    p, q = np.maximum(p, 1e-300), np.maximum(q, 1e-300)
    middle = 0.5 * (p + q)
    # what makes each of both directions positive cancels in their sum
    divergence = np.sum(steps * (p * np.log2(p / middle) + q * np.log2(q / middle)), axis=0)
    bound = np.sum(steps * (p + q), axis=0)
    return np.maximum(divergence, 0.0) / np.maximum(bound, 1e-300)
