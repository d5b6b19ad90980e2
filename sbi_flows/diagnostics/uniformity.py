"""Tests of uniformity on (0, 1), and a correction for multiple tests.

For a correct posterior, the ranks, density ranks and TARP fractions that `continuous_ranks` returns
are independent and exactly uniform. All calibration checks test this uniformity.

Internal names: `ks_p_value`, `normal_p_values`, `detectable_width`, `log_gamma`,
`gamma_quantile`, `ecdf_band`, `holm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import special

NULL_SEED = 20_230_221
"""Fixed seed of simulated null distributions, so that bands are the same in every run."""

MAX_NULL_ENTRIES = 4_000_000
"""Largest number of random values of a null distribution that are held in memory at once."""


def ks_p_value(uniform: np.ndarray, *, alternative: str = "two-sided") -> float:
    """Return the p-value of a Kolmogorov-Smirnov test of values (N,) against U(0, 1).

    `alternative` has the meaning of `scipy.stats.kstest`: "less" rejects values that are too large.
    """
    from scipy import stats

    return float(stats.kstest(np.asarray(uniform), "uniform", alternative=alternative).pvalue)


def normal_p_values(uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute exact p-values of location and spread of uniform values (N, ...) along axis 0.

    v = Phi^-1(u) is standard normal under the null hypothesis. So the t statistic of its mean and
    the sum of its squared deviations have their textbook distributions. A posterior that is shifted
    changes only the mean of v; one that is too narrow or too wide by a factor changes only its
    standard deviation (exactly so for a normal posterior). The verdict uses this to distinguish the
    two errors. The mean is tested in units of the standard deviation of v; otherwise a posterior
    that is too narrow would also appear biased.

    Returns:
        Two-sided p-values of the location and of the spread, each with the shape of one row.
    """
    v = special.ndtri(np.asarray(uniform, np.float64))
    n = len(v)
    t = v.mean(axis=0) / v.std(axis=0, ddof=1) * np.sqrt(n)
    location = 2.0 * special.stdtr(n - 1, -np.abs(t))
    squares = np.sum((v - v.mean(axis=0)) ** 2, axis=0)
    spread = 2.0 * np.minimum(special.chdtr(n - 1, squares), special.chdtrc(n - 1, squares))
    return np.asarray(location), np.asarray(np.minimum(spread, 1.0))


def detectable_width(n: int, level: float, power: float = 0.95) -> float:
    """Return the smallest factor by which a width must be wrong to be found.

    This is the factor at which the test of the spread of n values by `normal_p_values`, at the
    given level, rejects a posterior that is too narrow with the probability `power`.

    Example:
        >>> round(detectable_width(1_000, 0.05 / 8), 2), round(detectable_width(50, 0.05 / 8), 2)
        (1.1, 1.54)
    """
    largest = special.chdtri(n - 1, level / 2)
    return float(np.sqrt(largest / special.chdtri(n - 1, power)))


def log_gamma(uniform: np.ndarray, draws: int, *, level: float = 0.05) -> float:
    """Return the logarithm of the rank statistic gamma divided by its null quantile.

    A value below 0 rejects uniformity at `level`. The statistic is
    gamma = 2 min_i min{F(R_i; N, z_i), 1 - F(R_i - 1; N, z_i)} with z_i = i / (S + 1), where R_i is
    the number of ranks below i and F the binomial distribution function. Gamma is the smallest
    two-sided tail probability of the ranks' ECDF over all S cuts.

    Args:
        uniform: Continuous ranks in (0, 1), shape (N,).
        draws: Number S of draws that each rank refers to.
        level: Level of the null quantile.

    References:
        Modrak et al. 2023, Simulation-Based Calibration Checking for Bayesian Computation,
        arXiv:2211.02383, eqs. 8 and 9.
        Saeilynoja et al. 2022, Graphical Test for Discrete Uniformity and its Applications,
        arXiv:2103.10522.
    """
    uniform = np.asarray(uniform)
    n = len(uniform)
    counts = np.bincount(np.minimum((uniform * (draws + 1)).astype(int), draws), minlength=draws)
    below = np.cumsum(counts[:draws])
    cuts = np.arange(1, draws + 1) / (draws + 1)
    gamma = max(float(np.min(_two_sided_tail(below, n, cuts))), np.finfo(float).tiny)
    return float(np.log(gamma) - np.log(gamma_quantile(n, draws, level)))


@lru_cache(maxsize=64)
def gamma_quantile(n: int, cuts: int, level: float = 0.05, repeats: int = 2_000) -> float:
    """Simulate the `level` quantile of gamma for n uniform values and evenly spaced cuts.

    The seed is fixed and the result is cached: the same sizes always give the same number.
    """
    rng = np.random.default_rng(NULL_SEED)
    smallest = np.ones(repeats)
    max_rows = max(1, MAX_NULL_ENTRIES // max(n, cuts))
    for start in range(0, repeats, max_rows):
        rows = min(max_rows, repeats - start)
        # Count the values in each of cuts + 1 cells, then below each cut.
        cells = rng.integers(0, cuts + 1, (rows, n)) + (cuts + 1) * np.arange(rows)[:, None]
        counts = np.bincount(cells.ravel(), minlength=rows * (cuts + 1))
        below = np.cumsum(counts.reshape(rows, cuts + 1), axis=1)[:, :cuts]
        # The binomial tail is the expensive part, and few distinct counts occur at each cut.
        pairs, inverse = np.unique(below + (n + 1) * np.arange(cuts), return_inverse=True)
        tail = _two_sided_tail(pairs % (n + 1), n, (pairs // (n + 1) + 1) / (cuts + 1))
        smallest[start : start + rows] = tail[inverse].reshape(rows, cuts).min(axis=1)
    return float(np.quantile(smallest, level))


def ecdf_band(
    n: int, cuts: int = 99, level: float = 0.05
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute a simultaneous band for the ECDF of n uniform values.

    Args:
        n: Number of values.
        cuts: Number of evenly spaced points at which the ECDF is evaluated.
        level: Probability that the ECDF of uniform values leaves the band at any point.

    Returns:
        The points, and the lower and the upper edge of the band, each of shape (cuts,).

    References:
        Saeilynoja et al. 2022, Graphical Test for Discrete Uniformity and its Applications,
        arXiv:2103.10522, eq. 13, with gamma by simulation (their algorithm 1).
    """
    from scipy import stats

    points = np.arange(1, cuts + 1) / (cuts + 1)
    gamma = gamma_quantile(n, cuts, level)
    lower = stats.binom.ppf(gamma / 2, n, points) / n
    return points, lower, stats.binom.isf(gamma / 2, n, points) / n


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Adjust p-values for multiple tests by Holm's step-down method; the order is kept.

    If every hypothesis with an adjusted p-value of at most `level` is rejected, the probability of
    rejecting any true hypothesis is at most `level`. The tests may depend on each other.

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


def _two_sided_tail(below: np.ndarray, n: int, cuts: np.ndarray) -> np.ndarray:
    """Return twice the smaller binomial tail probability at each cut.

    `below` is the number of the n values below each cut.
    """
    return 2.0 * np.minimum(special.bdtr(below, n, cuts), special.bdtrc(below - 1, n, cuts))
