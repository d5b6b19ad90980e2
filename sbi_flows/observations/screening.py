"""Which entries of an observation depend on the parameters, one entry and one parameter at a time.

Public name: `dependent_features`.

Sources: Fan & Lv 2008, "Sure independence screening for ultrahigh dimensional feature space"
(J. R. Stat. Soc. B 70:849), for the idea; Kallenberg & Ledwina 1999, "Data-driven rank tests for
independence" (J. Am. Stat. Assoc. 94:285), for the test, correlations of Legendre polynomials of
the ranks; Benjamini & Hochberg 1995 (J. R. Stat. Soc. B 57:289), for the choice among many.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ROWS = 20_000
"""The most rows that the tests look at, chosen from all of them, always the same."""

DEGREE = 3
"""Highest polynomial of the ranks: trends, changes of spread and of skewness."""


def dependent_features(theta: Any, features: Any, rate: float) -> np.ndarray:
    """Test each feature against each parameter, and keep those that depend on any.

    A feature that says something only together with others, as a measurement of the noise alone
    would, is not found.

    Args:
        theta: Parameters, shape (N, d).
        features: Flat observations, shape (N, C).
        rate: Expected share of independent features among those that are kept, at the most; about
            that, as p-values are those of many rows, and tests that depend on each other negatively
            may exceed it.

    Returns:
        Whether each feature is kept, shape (C,).

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
    if len(theta) > ROWS:
        rows = np.random.default_rng(0).choice(len(theta), ROWS, replace=False)
        theta, features = theta[rows], features[rows]
    return false_discovery_control(_p_values(theta, features)) <= rate


def _p_values(theta: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Of independence of all parameters, for each feature; Bonferroni over the parameters."""
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
    """Polynomials of the ranks that are uncorrelated, of mean 0 and variance 1: (N, up to 3).

    Fewer where a column takes few values: two values have one such polynomial, one has none.
    """
    from scipy.stats import rankdata

    ranks = (2.0 * rankdata(column) - 1.0) / len(column) - 1.0
    powers = np.polynomial.legendre.legvander(ranks, DEGREE)[:, 1:]
    left, size, _ = np.linalg.svd(powers - powers.mean(axis=0), full_matrices=False)
    return np.sqrt(len(column)) * left[:, size > 1e-6 * np.sqrt(len(column))]
