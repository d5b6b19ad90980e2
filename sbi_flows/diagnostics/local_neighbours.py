"""Standardised coordinates of a posterior, and a search for data sets with similar posteriors.

Internal names: `Frame`, `local_frame`, `in_frame`, `nearest`, `MOMENT_DRAWS`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key

MOMENT_DRAWS = 64
"""Number of posterior draws from which the `Frame` of one data set is computed."""

MAX_COMPONENTS, NUM_PROJECTIONS = 32, 64
"""Maximum number of features, and number of random projections.

More features are replaced by `MAX_COMPONENTS` principal components, which are computed from the
random projections.
"""

MIN_VARIANCE_SHARE, MAX_AXES = 0.05, 12
"""Limits of the principal axes that define distances.

The first is the minimum variance of an axis relative to the first axis, the second is the maximum
number of axes.
"""

REGRESSION_RIDGE = 10.0


class Frame(NamedTuple):
    """Coordinates in which the draws of each of B posteriors have mean 0 and covariance about 1.

    Attributes:
        mean: Posterior means, shape (B, d).
        whitening: Whitening matrices, shape (B, d, d).
        sd: Posterior standard deviations, shape (B, d).
    """

    mean: Array | np.ndarray
    whitening: Array | np.ndarray
    sd: Array | np.ndarray


@jax.jit
@full_precision
def local_frame(draws: Array) -> Frame:
    """Compute the frame of draws (B, m, d) of B posteriors.

    Whitening matrices are symmetric inverse roots of the correlation matrices, so that each
    coordinate stays close to its parameter. The correlations are shrunk towards zero, because
    they are estimated from only `MOMENT_DRAWS` draws.
    """
    m, dim = draws.shape[1:]
    shrinkage = max(0.05, dim / (dim + MOMENT_DRAWS))
    mean = jnp.mean(draws, axis=1)
    z = draws - mean[:, None]
    sd = jnp.maximum(jnp.std(draws, axis=1), jnp.finfo(draws.dtype).tiny ** 0.5)
    z = z / sd[:, None]
    correlation = jnp.einsum("bni,bnj->bij", z, z) / m
    shrunk = (1.0 - shrinkage) * correlation + shrinkage * jnp.eye(dim)[None]
    values, vectors = jnp.linalg.eigh(shrunk)
    root = jnp.einsum("bij,bj,bkj->bik", vectors, values**-0.5, vectors)
    return Frame(mean, root / sd[:, None], sd)


@jax.jit
@full_precision
def in_frame(frame: Frame, y: Array | np.ndarray) -> Array:
    """Transform parameters (B, d) to B frames, or (n, d) to one frame.

    Absolute values |z| above 3 become 3 + log(|z| - 2). The logarithm limits the influence of
    single truths far from all draws.
    """
    whitening = jnp.broadcast_to(frame.whitening, (len(y), *frame.whitening.shape[1:]))
    z = jnp.einsum("bij,bj->bi", whitening, y - frame.mean)
    return jnp.clip(z, -3.0, 3.0) + jnp.sign(z) * jnp.log1p(jnp.maximum(jnp.abs(z) - 3.0, 0.0))


def nearest(
    key: Key,
    features: np.ndarray,
    moments: np.ndarray,
    truth_and_draw: tuple[np.ndarray, np.ndarray],
    share: float,
    min_count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the data sets nearest to the observation, and their weights.

    Data sets are near each other if their posteriors are similar. Similarity is measured by the
    mean and width of the checked posterior, and by a linear regression that predicts parameters and
    their squares from features and their squares. The regression is fitted to the average of truth
    and draw, so that it cannot distinguish truths from draws.

    Args:
        key: Random key.
        features: Features of the N data sets and, last, of the observation, shape (N + 1, C).
        moments: Posterior means and scaled logarithms of posterior standard deviations, for the
            same rows as `features`, shape (N + 1, 2 d).
        truth_and_draw: Truths and draws in standard coordinates, shape (N, d) each.
        share: Share of the data sets to return.
        min_count: Minimum number of data sets to return.

    Returns:
        Row numbers (k,), the nearest first, and weights (k,) that decrease from 1 to nearly 0.
    """
    arrays = jax.tree.map(jnp.asarray, (features, moments, truth_and_draw))
    positions = np.asarray(_positions(key, *arrays), float)
    positions = positions - positions[:-1].mean(axis=0)
    variances, axes = np.linalg.eigh(positions[:-1].T @ positions[:-1] / len(positions))
    chosen = np.flatnonzero(variances >= MIN_VARIANCE_SHARE * variances[-1])[-MAX_AXES:]
    positions = positions @ axes[:, chosen]
    distance = np.sqrt(np.sum((positions[:-1] - positions[-1]) ** 2, axis=1))
    count = min(len(distance), max(min_count, round(share * len(distance))))
    rows = np.argsort(distance, kind="stable")[:count]
    # The factor 1.1 keeps weights positive if all data sets are equally far.
    radius = max(1.1 * distance[rows[-1]], 1e-12)
    weight = (1.0 - (distance[rows] / radius) ** 3) ** 3
    return rows, weight / weight[0]


@jax.jit
@full_precision
def _positions(
    key: Key, features: Array, moments: Array, truth_and_draw: tuple[Array, Array]
) -> Array:
    """Return coordinates that define distances between data sets, shape (N + 1, 4 d)."""
    v = _principal_components(key, features)
    rows = jnp.concatenate([v, v**2 - 1.0], axis=1)
    training = rows[:-1]
    targets = [sum(truth_and_draw), sum(y**2 for y in truth_and_draw)]
    target = jnp.concatenate(targets, axis=1) / 2
    target -= jnp.mean(target, axis=0)[None]
    ridge = REGRESSION_RIDGE * jnp.eye(rows.shape[1])
    predicted = rows @ jnp.linalg.solve(training.T @ training + ridge, training.T @ target)
    return jnp.concatenate([moments, predicted], axis=1)


def _principal_components(key: Key, features: Array) -> Array:
    """Scale features (N + 1, C) to unit variance; replace many features by principal components."""
    rows = features - jnp.mean(features, axis=0)[None]
    if rows.shape[1] > MAX_COMPONENTS:
        start = jax.random.normal(key, (rows.shape[1], NUM_PROJECTIONS), rows.dtype)
        basis = jnp.linalg.qr(rows.T @ (rows @ start))[0]
        projected = rows @ basis
        axes = jnp.linalg.eigh(projected.T @ projected)[1]
        rows = projected @ axes[:, ::-1][:, :MAX_COMPONENTS]
    sd = jnp.std(rows, axis=0)
    return jnp.clip(rows / jnp.where(sd > 1e-6, sd, 1.0)[None], -10.0, 10.0)
