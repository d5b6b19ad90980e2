"""Distances between observations and training rows in one feature space.

Public names: `Space`, `Moments`, `fit_space`, `normal_scores`.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri

from sbi_flows.core.arrays import squared_distances

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5)
"""Candidate shrinkage weights of the covariance. The likelihood of held-out rows selects one."""

SCALES = (0.01, 0.03, 0.1, 0.3)
"""Squared widths of the kernels, in units of the median squared distance between rows."""

MAX_CENTRES = 500
"""Maximum number of kernel centres."""


class Moments(NamedTuple):
    """Mean and covariance of the features, by principal directions.

    Attributes:
        center: Means, shape (C,).
        scale: Standard deviations, shape (C,). They are the units of `directions` and `variances`.
        directions: Principal directions, orthonormal rows, shape (K, C).
        variances: Variance along each principal direction, followed by the variance along any
            direction orthogonal to them, shape (K + 1,).
    """

    center: np.ndarray
    scale: np.ndarray
    directions: np.ndarray
    variances: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Space:
    """Training rows in one space: the features, or the output of an embedding.

    Attributes:
        moments: Mean and covariance of part of the training rows.
        rows: Held-out training rows, not used for `moments`, in standard deviations from the mean,
            shape (m, C).
    """

    moments: Moments
    rows: np.ndarray

    def standard(self, values: Any) -> np.ndarray:
        """Express values (B, C) in standard deviations from the mean."""
        return (np.asarray(values, float) - self.moments.center) / self.moments.scale

    def errors(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute Mahalanobis distances and prediction residuals of z (B, C), made by `standard`.

        Returns:
            Squared Mahalanobis distances, shape (B,), and residuals, shape (B, C). A residual is
            the difference between an entry and its linear prediction from all other entries,
            divided by the standard error of the prediction.
        """
        directions, variances = self.moments.directions, self.moments.variances[:-1]
        along = z @ directions.T
        rest = z - along @ directions
        distance = np.sum(along**2 / variances, axis=1) + np.sum(rest**2, axis=1) / self._rest
        solved = (along / variances) @ directions + rest / self._rest
        # if other features determine a feature exactly, its residual is a rounding error: round it
        return distance, np.round(solved / self._root_precision, 4)

    def discrepancy(self, z: np.ndarray) -> np.ndarray:
        """Compute the squared maximum mean discrepancy (B,) between each row of z and `rows`.

        Terms that are the same for every observation are left out. The result is minus twice the
        kernel between the observation and a row, averaged over `rows`. The kernel is a sum of
        rational quadratic kernels of several widths.
        """
        squares = squared_distances(z, self.rows[:MAX_CENTRES]) / self._width
        kernels = sum(1.0 / (1.0 + squares / scale) for scale in SCALES)
        return -2.0 * np.mean(np.asarray(kernels), axis=1)

    def marginal_scores(self, z: np.ndarray) -> np.ndarray:
        """Return the ranks of z (B, C) among `rows` as normal quantiles, shape (B, C)."""
        return normal_scores(self._ordered, z)

    def conditional_scores(self, errors: np.ndarray) -> np.ndarray:
        """Return the normal scores (B, C) of residuals, ranked among the residuals of the rows."""
        return normal_scores(self._errors, errors)

    @property
    def _rest(self) -> float:
        return float(self.moments.variances[-1])

    @cached_property
    def _ordered(self) -> np.ndarray:
        return np.sort(self.rows, axis=0)

    @cached_property
    def _errors(self) -> np.ndarray:
        return np.sort(self.errors(self.rows)[1], axis=0)

    @cached_property
    def _root_precision(self) -> np.ndarray:
        """Square root of the diagonal of the precision matrix, shape (C,)."""
        inside = self.moments.directions**2
        across = np.maximum(1.0 - np.sum(inside, axis=0), 0.0)
        return np.sqrt((1.0 / self.moments.variances[:-1]) @ inside + across / self._rest)

    @cached_property
    def _width(self) -> float:
        """Median squared distance between two rows."""
        some = self.rows[:200]
        pairs = squared_distances(some, some)[~np.eye(len(some), dtype=bool)]
        return max(float(np.median(pairs)), 1e-12) if pairs.size else 1.0


def fit_space(fitted: np.ndarray, kept: np.ndarray, floor: np.ndarray) -> Space:
    """Compute the moments of rows; choose the shrinkage by the likelihood of held-out rows.

    Args:
        fitted: Rows from which the moments are computed, shape (n, C).
        kept: Held-out rows, which become `Space.rows`, shape (m, C).
        floor: Smallest standard deviation of each feature, shape (C,).
    """
    center = fitted.mean(axis=0)
    scale = np.maximum(fitted.std(axis=0), floor)
    z, others = (fitted - center) / scale, (kept - center) / scale
    n, width = z.shape
    # diagonalise the smaller of the two matrices z^T z and z z^T
    if width <= n:
        variances, vectors = np.linalg.eigh(z.T @ z / n)
        directions = vectors.T
    else:
        variances, vectors = np.linalg.eigh(z @ z.T / n)
        real = variances > 1e-10 * max(variances[-1], 1e-300)
        variances = variances[real]
        directions = (z.T @ vectors[:, real] / np.sqrt(n * variances)).T
    variances = np.maximum(variances, 0.0)
    moments = Moments(center, scale, directions, _shrunk(variances, directions, others))
    return Space(moments, ((kept - center) / scale).astype(np.float32))


def _shrunk(variances: np.ndarray, directions: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Shrink variances (K,) along the principal directions towards their mean.

    The shrinkage weight is chosen from `RIDGES`: the one for which the rows `others` have the
    largest likelihood.

    Returns:
        The shrunk variances, followed by the variance orthogonal to the principal directions, shape
        (K + 1,).
    """
    count, width = directions.shape
    mean = max(float(np.sum(variances)) / width, 1e-12)
    others = np.clip(others, -10.0, 10.0)  # features that never varied would dominate the choice
    along = np.mean((others @ directions.T) ** 2, axis=0)
    rest = max(float(np.mean(np.sum(others**2, axis=1)) - np.sum(along)), 0.0)

    def loss(ridge: float) -> float:
        own = (1.0 - ridge) * np.append(variances, 0.0) + ridge * mean
        each = np.append(np.ones(count), width - count)
        return float(np.sum(each * np.log(own)) + np.sum(np.append(along, rest) / own))

    best = min(RIDGES, key=loss)
    return (1.0 - best) * np.append(variances, 0.0) + best * mean


def normal_scores(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the normal quantiles of the ranks of values (B, C) among sorted rows (m, C).

    A value that equals several rows gets the middle of their ranks. Beyond the largest row, the
    distance to it is added to the score; below the smallest row, the distance is subtracted.
    """
    ranks = np.empty(values.shape)
    for i, column in enumerate(ordered.T):
        own = values[:, i].astype(column.dtype)
        low, high = (np.searchsorted(column, own, side=side) for side in ("left", "right"))
        ranks[:, i] = 0.5 * (low + high)
    beyond = np.maximum(values - ordered[-1], 0.0) - np.maximum(ordered[0] - values, 0.0)
    return ndtri((ranks + 0.5) / (len(ordered) + 1)) + beyond
