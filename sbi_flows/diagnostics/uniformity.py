"""Tests that numbers which should be uniform on (0, 1) are, and the correction for many tests.

Every check of a posterior ends here: for a correct posterior the ranks, the density ranks and the
TARP fractions, made continuous by `continuous_ranks`, are independent and exactly uniform.
Public names: `continuous_ranks`, `ks_p_value`, `normal_p_values`, `log_gamma`, `gamma_quantile`,
`ecdf_band`, `holm`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from scipy import special

SEED = 20_230_221
"""Of the simulated null distributions, so that a band is the same in every run."""


def ks_p_value(uniform: Any, *, alternative: str = "two-sided") -> float:
    """P-value of a one-sample Kolmogorov-Smirnov test of values (N,) against U(0, 1).

    `alternative` is that of `scipy.stats.kstest`: "less" rejects values that are too large.
    """
    from scipy import stats

    return float(stats.kstest(np.asarray(uniform), "uniform", alternative=alternative).pvalue)


def normal_p_values(uniform: Any) -> tuple[np.ndarray, np.ndarray]:
    """Exact two-sided tests of location and of spread for uniform values (N, ...), along axis 0.

    v = Phi^-1(u) is standard normal under the null, so that Student's t of its mean and its sum of
    squared deviations have their textbook distributions. A posterior that is shifted moves only
    the mean of v, one that is too narrow or too wide by a factor moves only its standard deviation
    (exactly so for a normal posterior); this is what lets the verdict tell them apart. The mean is
    judged by the standard deviation found, or a posterior too narrow would seem biased as well.

    Returns:
        P-values of the location and of the spread, each of the shape of one row.
    """
    v = special.ndtri(np.asarray(uniform, np.float64))
    n = len(v)
    t = v.mean(axis=0) / v.std(axis=0, ddof=1) * np.sqrt(n)
    location = 2.0 * special.stdtr(n - 1, -np.abs(t))
    squares = np.sum((v - v.mean(axis=0)) ** 2, axis=0)
    spread = 2.0 * np.minimum(special.chdtr(n - 1, squares), special.chdtrc(n - 1, squares))
    return np.asarray(location), np.asarray(np.minimum(spread, 1.0))


def log_gamma(uniform: Any, draws: int, *, level: float = 0.05) -> float:
    """Log of the rank statistic gamma over its null quantile; below 0 rejects at `level`.

    gamma = 2 min_i min{F(R_i; N, z_i), 1 - F(R_i - 1; N, z_i)} with z_i = i / (S + 1), R_i the
    number of ranks below i and F the binomial distribution function: the smallest tail probability
    of the ranks' ECDF over all S cuts.

    Args:
        uniform: Continuous ranks in (0, 1), shape (N,).
        draws: Number of draws S that the ranks were taken among.
        level: Level of the null quantile.

    References:
        Modrak et al. 2023, Simulation-Based Calibration Checking for Bayesian Computation,
        arXiv:2211.02383, eqs. 8 and 9. Saeilynoja et al. 2022, Graphical Test for Discrete
        Uniformity and its Applications, arXiv:2103.10522.
    """
    uniform = np.asarray(uniform)
    n = len(uniform)
    counts = np.bincount(np.minimum((uniform * (draws + 1)).astype(int), draws), minlength=draws)
    below = np.cumsum(counts[:draws])
    cuts = np.arange(1, draws + 1) / (draws + 1)
    gamma = max(float(np.min(_tail(below, n, cuts))), np.finfo(float).tiny)
    return float(np.log(gamma) - np.log(gamma_quantile(n, draws, level)))


@lru_cache(maxsize=64)
def gamma_quantile(n: int, cuts: int, level: float = 0.05, repeats: int = 2_000) -> float:
    """The `level` quantile of gamma for n uniform values and evenly spaced cuts, by simulation.

    The seed is fixed and the answer cached: the same sizes give the same number.
    """
    rng = np.random.default_rng(SEED)
    smallest = np.ones(repeats)
    rows_at_once = max(1, 4_000_000 // max(n, cuts))
    for start in range(0, repeats, rows_at_once):
        rows = min(rows_at_once, repeats - start)
        # how many of n uniform values lie in each of cuts + 1 cells, then below each cut
        cells = rng.integers(0, cuts + 1, (rows, n)) + (cuts + 1) * np.arange(rows)[:, None]
        counts = np.bincount(cells.ravel(), minlength=rows * (cuts + 1))
        below = np.cumsum(counts.reshape(rows, cuts + 1), axis=1)[:, :cuts]
        # few distinct counts occur at a cut, and the binomial tail is what costs
        pairs, where = np.unique(below + (n + 1) * np.arange(cuts), return_inverse=True)
        tail = _tail(pairs % (n + 1), n, (pairs // (n + 1) + 1) / (cuts + 1))
        smallest[start : start + rows] = tail[where].reshape(rows, cuts).min(axis=1)
    return float(np.quantile(smallest, level))


def ecdf_band(
    n: int, cuts: int = 99, level: float = 0.05
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Simultaneous band that the ECDF of n uniform values leaves with probability `level`.

    Args:
        n: Number of values.
        cuts: Number of evenly spaced points at which the ECDF is looked at.
        level: Probability that a correct posterior leaves the band anywhere.

    Returns:
        The points, the lower and the upper edge of the band, each of shape (cuts,).

    References:
        Saeilynoja et al. 2022, Graphical Test for Discrete Uniformity and its Applications,
        arXiv:2103.10522, eq. 13, with gamma by simulation (their algorithm 1).
    """
    from scipy import stats

    points = np.arange(1, cuts + 1) / (cuts + 1)
    gamma = gamma_quantile(n, cuts, level)
    lower = stats.binom.ppf(gamma / 2, n, points) / n
    return points, lower, stats.binom.isf(gamma / 2, n, points) / n


def holm(p_values: Any) -> np.ndarray:
    """P-values adjusted for the family of tests (Holm's step-down), in the given order.

    Rejecting where the adjusted value is at most `level` rejects any true hypothesis with
    probability at most `level`, however the tests depend on each other.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(2)
        array([0.03, 0.06, 0.06])
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _tail(below: np.ndarray, n: int, cuts: np.ndarray) -> np.ndarray:
    """Twice the smaller binomial tail of seeing `below` of n values under each cut."""
    return 2.0 * np.minimum(special.bdtr(below, n, cuts), special.bdtrc(below - 1, n, cuts))
