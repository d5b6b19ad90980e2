"""Reference points for TARP: draws from a crude posterior, fitted to the simulations alone.

Internal names: `References`, `crude_references`, `crude_posterior`, `prior_scale`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from scipy import linalg, special

from sbi_flows.core.arrays import squared_distances
from sbi_flows.core.typing import Key, Obs
from sbi_flows.simulations.simulations import Simulations

MAX_FEATURES = 256
MAX_REGRESSION_ROWS = 500
RIDGE = 0.1

NORMAL_IQR = 1.349
"""Interquartile range of a standard normal distribution."""


class References(NamedTuple):
    """Reference points of TARP.

    Attributes:
        points: One point for each data set, shape (N, D).
        scale: Unit of each parameter in the distances, shape (D,).
    """

    points: np.ndarray
    scale: np.ndarray


def crude_references(key: Key, simulations: Simulations) -> References:
    """Return draws of `crude_posterior`, with the width of the prior as unit."""
    return References(crude_posterior(key, simulations), prior_scale(simulations.theta))


def prior_scale(theta: Array | np.ndarray) -> np.ndarray:
    """Estimate the width of the prior in each parameter from draws of the prior.

    The width is the interquartile range divided by `NORMAL_IQR`; the standard deviation of a
    heavy-tailed prior may not exist. The width of a constant parameter is 1.

    Args:
        theta: Draws of the prior, shape (N, D).

    Returns:
        Widths in the parameters' units, shape (D,).
    """
    theta = np.asarray(theta, np.float64)
    low, high = np.quantile(theta, [0.25, 0.75], axis=0)
    scale = np.where(high > low, (high - low) / NORMAL_IQR, theta.std(axis=0))
    return np.where(scale > 0, scale, 1.0)


def crude_posterior(key: Key, simulations: Simulations) -> np.ndarray:
    """Draw a reference point for each data set from a crude posterior.

    A reference point is the prediction of a kernel ridge regression of theta on x, plus the
    residual of another, random data set. It depends on x, so that TARP rejects a posterior that
    ignores x; with references independent of x, a posterior equal to the prior would pass.
    Reference points scatter about as widely as a posterior, in all directions from the truth. The
    regression for one half of the data sets is fitted to the other half. A reference point is
    therefore independent of the truth of its data set, and TARP is valid even if the fit is poor.

    Args:
        key: Random key.
        simulations: N simulations, all successful.

    Returns:
        Reference points in the parameters' units, shape (N, D). They may lie outside the prior's
        support.
    """
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    theta = np.asarray(simulations.theta, np.float64)
    center, scale = np.median(theta, axis=0), prior_scale(theta)
    target = np.clip((theta - center) / scale, -10.0, 10.0)
    features = _normal_scores(rng, simulations.x)
    points = np.empty_like(target)
    order = rng.permutation(len(theta))
    halves = order[::2], order[1::2]
    for fit_rows, held_out in (halves, halves[::-1]):
        rows = fit_rows[:MAX_REGRESSION_ROWS]
        predicted = _kernel_ridge(features[rows], target[rows], features[held_out])
        # The residual comes from the next data set of a cycle: never from the data set itself,
        # and no two data sets swap residuals.
        points[held_out] = predicted + np.roll(target[held_out] - predicted, 1, axis=0)
    return center + scale * points


def _normal_scores(rng: np.random.Generator, x: Obs) -> np.ndarray:
    """Return normal scores of at most `MAX_FEATURES` random entries of x, shape (N, P).

    Scores depend only on the order of the values, so that heavy tails have no effect.
    """
    from scipy import stats

    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(x)]
    flat = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)
    if flat.shape[1] > MAX_FEATURES:
        flat = flat[:, rng.choice(flat.shape[1], MAX_FEATURES, replace=False)]
    missing = np.isnan(flat)
    if missing.any():  # missing entries get the middle rank
        flat = np.where(missing, _medians(flat), flat)
    return special.ndtri((stats.rankdata(flat, axis=0) - 0.5) / len(flat))


def _medians(flat: np.ndarray) -> np.ndarray:
    """Return the median (1, P) of the present entries of each column; 0 for an empty column."""
    is_empty = np.isnan(flat).all(axis=0, keepdims=True)
    return np.nanmedian(np.where(is_empty, 0.0, flat), axis=0, keepdims=True)


def _kernel_ridge(features: np.ndarray, target: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Predict targets at points (m, P) from features (n, P) and their targets (n, D)."""
    squared = squared_distances(features, features)
    width = np.median(squared)
    if width <= 0:
        return np.broadcast_to(target.mean(axis=0), (len(points), target.shape[1]))
    kernel = np.exp(-squared / width) + RIDGE * np.eye(len(features))
    weights = linalg.solve(kernel, target - target.mean(axis=0), assume_a="pos")
    return target.mean(axis=0) + np.exp(-squared_distances(points, features) / width) @ weights
