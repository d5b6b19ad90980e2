"""Distances of observations from the training rows in one space of features.

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
"""Candidate shrinkage weights of the covariance; the likelihood of held-out rows selects one."""

SCALES = (0.01, 0.03, 0.1, 0.3)
"""Widths of the kernels, in units of the median squared distance."""

MAX_CENTRES = 500
"""Maximum number of kernel centres."""


class Moments(NamedTuple):
    """Mean and covariance: principal directions with their variances, and one for the rest.

    Attributes:
        center: Means, shape (C,).
        scale: Standard deviations, shape (C,), the units of all other attributes.
        directions: Principal directions, orthonormal rows, shape (K, C).
        variances: Variance along each direction, and of all other directions, shape (K + 1,).
    """

    center: np.ndarray
    scale: np.ndarray
    directions: np.ndarray
    variances: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Space:
    """Training rows in one space: the features, or the output of an embedding.

    Attributes:
        moments: Mean and covariance.
        rows: Rows that the moments were not computed from, in standard deviations, shape (m, C).
    """

    moments: Moments
    rows: np.ndarray

    def standard(self, values: Any) -> np.ndarray:
        """Express values (B, C) in standard deviations from the mean."""
        return (np.asarray(values, float) - self.moments.center) / self.moments.scale

    def errors(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute Mahalanobis distances and prediction residuals of standard values (B, C).

        Returns:
            Squared Mahalanobis distances, shape (B,), and the residual of each value from its
            linear prediction by all others, in units of the prediction's error, shape (B, C).
        """
        directions, variances = self.moments.directions, self.moments.variances[:-1]
        along = z @ directions.T
        rest = z - along @ directions
        distance = np.sum(along**2 / variances, axis=1) + np.sum(rest**2, axis=1) / self._rest
        solved = (along / variances) @ directions + rest / self._rest
        # residuals of exactly determined features are rounding errors: make them tie
        return distance, np.round(solved / self._root_precision, 4)

    def discrepancy(self, z: np.ndarray) -> np.ndarray:
        """Compute the squared maximum mean discrepancy (B,) between each observation and the rows.

        Terms that are the same for every observation are left out. What remains is minus twice the
        mean of the kernel between the observation and each row. The kernel is a sum of rational
        quadratic kernels of several widths.
        """
        squares = squared_distances(z, self.rows[:MAX_CENTRES]) / self._width
        kernels = sum(1.0 / (1.0 + squares / scale) for scale in SCALES)
        return -2.0 * np.mean(np.asarray(kernels), axis=1)

    def marginal_scores(self, z: np.ndarray) -> np.ndarray:
        """Return the normal scores of standard values (B, C) among the rows."""
        return normal_scores(self._ordered, z)

    def conditional_scores(self, errors: np.ndarray) -> np.ndarray:
        """Return the normal scores of residuals (B, C) among those of the rows."""
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
        """Square root of the diagonal of the precision, shape (C,)."""
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
    """Fit the moments of rows (n, C), with shrinkage that is best for held-out rows (m, C).

    Args:
        fitted: Rows that the moments are computed from, shape (n, C).
        kept: Held-out rows, which the space keeps, shape (m, C).
        floor: Smallest standard deviation of each feature, shape (C,).
    """
    center = fitted.mean(axis=0)
    scale = np.maximum(fitted.std(axis=0), floor)
    z, others = (fitted - center) / scale, (kept - center) / scale
    n, width = z.shape
    # the smaller of the two Gram matrices
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
    """Shrink variances (K + 1,) to their mean, by what maximises the likelihood of other rows."""
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
    """Return the ranks of values (B, C) among sorted rows (m, C) as normal quantiles.

    Ties get the middle rank. Beyond all rows, the distance from the outermost row is added.
    """
    ranks = np.empty(values.shape)
    for i, column in enumerate(ordered.T):
        own = values[:, i].astype(column.dtype)
        low, high = (np.searchsorted(column, own, side=side) for side in ("left", "right"))
        ranks[:, i] = 0.5 * (low + high)
    beyond = np.maximum(values - ordered[-1], 0.0) - np.maximum(ordered[0] - values, 0.0)
    return ndtri((ranks + 0.5) / (len(ordered) + 1)) + beyond
