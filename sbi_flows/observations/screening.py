"""Screening: find features that depend on a parameter, by testing each feature with each parameter.

Public name: `dependent_features`.

Sources: Fan & Lv 2008, "Sure independence screening for ultrahigh dimensional feature space"
(J. R. Stat. Soc. B 70:849), for screening; Kallenberg & Ledwina 1999, "Data-driven rank tests for
independence" (J. Am. Stat. Assoc. 94:285), for the test, which uses correlations of Legendre
polynomials of the ranks; Benjamini & Hochberg 1995 (J. R. Stat. Soc. B 57:289), for the control of
the false discovery rate.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MAX_ROWS = 20_000
"""Maximum number of rows in the tests; larger data are subsampled with a fixed seed."""

DEGREE = 3
"""Highest degree of the polynomials. Degrees 1, 2, 3 find changes of mean, spread and skewness."""


def dependent_features(theta: Any, features: Any, rate: float) -> np.ndarray:
    """Return which features depend on at least one parameter, by tests of each pair.

    The tests miss a feature that is informative only in combination with other features, such as a
    measurement of the noise.

    Args:
        theta: Parameters, shape (N, d).
        features: Flat observations, shape (N, C).
        rate: False discovery rate: expected fraction of the selected features that are in fact
            independent of all parameters. The rate is approximately right if N is large and the
            tests are not strongly negatively dependent.

    Returns:
        True for each feature that depends on a parameter, bool of shape (C,).

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> theta = rng.normal(size=(500, 2))
        >>> noise = rng.normal(size=(500, 4))
        >>> x = noise * [1, 1, 1, 0] + noise[:, :1] * [0, 0, 0, 1] * theta[:, 1:] + theta[:, :1] * [
        ...     1, 0, 0, 0]
        >>> dependent_features(theta, x, 0.01)
        array([ True, False, False,  True])
    """
    from scipy.stats import false_discovery_control

    theta, features = np.asarray(theta), np.asarray(features)
    if len(theta) > MAX_ROWS:
        rows = np.random.default_rng(0).choice(len(theta), MAX_ROWS, replace=False)
        theta, features = theta[rows], features[rows]
    return false_discovery_control(_p_values(theta, features)) <= rate


def _p_values(theta: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Compute p-values (C,) for independence of all parameters, with a Bonferroni correction."""
    from scipy.stats import chi2

    parameters = [_scores(column) for column in theta.T]
    p = np.ones((features.shape[1], len(parameters)))
    for j, column in enumerate(features.T):
        scores = _scores(column)
        for d, other in enumerate(parameters):
            freedom = scores.shape[1] * other.shape[1]
            if freedom:
                statistic = np.sum((scores.T @ other) ** 2) / len(theta)
                p[j, d] = chi2.sf(statistic, freedom)
    return np.minimum(1.0, len(parameters) * p.min(axis=1))


def _scores(column: np.ndarray) -> np.ndarray:
    """Compute k uncorrelated polynomials of the ranks, with mean 0 and variance 1, shape (N, k).

    k is at most `DEGREE`. It is smaller for a column with few distinct values: 1 for two values, 0
    for a constant column.
    """
    from scipy.stats import rankdata

    ranks = (2.0 * rankdata(column) - 1.0) / len(column) - 1.0
    powers = np.polynomial.legendre.legvander(ranks, DEGREE)[:, 1:]
    left, size, _ = np.linalg.svd(powers - powers.mean(axis=0), full_matrices=False)
    return np.sqrt(len(column)) * left[:, size > 1e-6 * np.sqrt(len(column))]
