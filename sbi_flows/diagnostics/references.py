"""Reference points for TARP: draws from a crude posterior that owes nothing to the one checked.

Public names: `crude_posterior`, `prior_scale`.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from scipy import linalg, special

from sbi_flows.core.arrays import squared_distances
from sbi_flows.core.typing import Key
from sbi_flows.simulations.simulations import Simulations

MAX_FEATURES = 256
MAX_ROWS = 500
RIDGE = 0.1


def prior_scale(theta: Any) -> np.ndarray:
    """Width of the prior in each parameter from its draws (N, D); shape (D,).

    The interquartile range in units of a normal's, as the standard deviation of a heavy-tailed
    prior says nothing; a constant parameter gets 1.
    """
    theta = np.asarray(theta, np.float64)
    low, high = np.quantile(theta, [0.25, 0.75], axis=0)
    scale = np.where(high > low, (high - low) / 1.349, theta.std(axis=0))
    return np.where(scale > 0, scale, 1.0)


def crude_posterior(key: Key, simulations: Simulations) -> np.ndarray:
    """One draw from a crude posterior for each data set, fitted to the simulations alone.

    Kernel ridge regression of theta on x, plus the residual of another, random data set. The point
    depends on x, so that TARP can reject a posterior that ignores x (one equal to the prior passes
    with any reference drawn apart from x), and scatters about as wide as a posterior would, so
    that it looks at the truth from every side. The regression is fitted to the other half of the
    data sets, so that the reference says nothing about its own truth and TARP stays valid however
    poor the fit is.

    Args:
        key: Random key.
        simulations: N data sets that all succeeded.

    Returns:
        Points of shape (N, D), in the parameters' units; they may lie outside the prior's support.
    """
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    theta = np.asarray(simulations.theta, np.float64)
    centre, scale = np.median(theta, axis=0), prior_scale(theta)
    target = np.clip((theta - centre) / scale, -10.0, 10.0)
    features = _scores(rng, simulations.x)
    points = np.empty_like(target)
    order = rng.permutation(len(theta))
    halves = order[::2], order[1::2]
    for fit, held in (halves, halves[::-1]):
        known = fit[:MAX_ROWS]
        predicted = _kernel_ridge(features[known], target[known], features[held])
        # the next data set of a cycle: never itself, and no two data sets swap residuals
        points[held] = predicted + np.roll(target[held] - predicted, 1, axis=0)
    return centre + scale * points


def _scores(rng: np.random.Generator, x: Any) -> np.ndarray:
    """Normal scores of the entries of x, shape (N, P): only their order counts, whatever tails."""
    from scipy import stats

    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(x)]
    flat = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)
    if flat.shape[1] > MAX_FEATURES:
        flat = flat[:, rng.choice(flat.shape[1], MAX_FEATURES, replace=False)]
    return special.ndtri((stats.rankdata(flat, axis=0) - 0.5) / len(flat))


def _kernel_ridge(features: np.ndarray, target: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Predict the target (n, D) of features (n, P) at other features (m, P); shape (m, D)."""
    squared = squared_distances(features, features)
    width = np.median(squared)
    if width <= 0:
        return np.broadcast_to(target.mean(axis=0), (len(at), target.shape[1]))
    kernel = np.exp(-squared / width) + RIDGE * np.eye(len(features))
    weights = linalg.solve(kernel, target - target.mean(axis=0), assume_a="pos")
    return target.mean(axis=0) + np.exp(-squared_distances(at, features) / width) @ weights
