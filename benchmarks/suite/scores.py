"""Scores of a posterior beside its classifier test and its calibration.

Public names: `mmd`, `normalisation`, `held_out_loss`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import sbi_flows as sf
from sbi_flows.core.precision import FULL
from sbi_flows.core.typing import Key, Obs
from sbi_flows.prior.maps import HALF_WIDTH
from simulators import Task

ROWS = 2_000
"""Rows of either set that enter an MMD."""

GRID = {1: 4096, 2: 400}
"""Points along each of one or two dimensions of an integral."""


def mmd(reference: Any, samples: Any) -> float:
    """Squared maximum mean discrepancy, unbiased: 0 on average for draws of one distribution.

    The kernel is Gaussian with the median distance between reference draws as its length, after
    both sets have been standardised by the reference; at most 2,000 draws of either are used.

    Args:
        reference: Draws of the reference posterior, shape (N, D).
        samples: Draws to judge, shape (M, D).

    References:
        Gretton et al. 2012, A Kernel Two-Sample Test, JMLR 13, eq. 3.

    Example:
        >>> import numpy as np
        >>> draws = np.random.default_rng(0).normal(size=(2, 500, 2))
        >>> abs(mmd(*draws)) < 0.01 < mmd(draws[0], draws[1] + 1.0)
        True
    """
    reference, samples = (np.asarray(rows, np.float64)[:ROWS] for rows in (reference, samples))
    mean, sd = reference.mean(axis=0), reference.std(axis=0)
    sd = np.where(sd > 0, sd, 1.0)
    rows = [jnp.asarray((r - mean) / sd, jnp.float32) for r in (reference, samples)]
    return float(_mmd(*rows))


@jax.jit
def _mmd(a: Array, b: Array) -> Array:
    within, other, across = _squares(a, a), _squares(b, b), _squares(a, b)
    length = jnp.median(within)
    kernels = [jnp.exp(-squares / length) for squares in (within, other, across)]
    n, m = len(a), len(b)
    same = (jnp.sum(kernels[0]) - n) / (n * (n - 1)) + (jnp.sum(kernels[1]) - m) / (m * (m - 1))
    return same - 2.0 * jnp.mean(kernels[2])


def _squares(a: Array, b: Array) -> Array:
    squares = (
        jnp.sum(a**2, axis=1)[:, None]
        + jnp.sum(b**2, axis=1)[None]
        - 2.0 * jnp.matmul(a, b.T, precision=FULL)
    )
    return jnp.maximum(squares, 0.0)


def normalisation(posterior: sf.Posterior, x: Obs, draws: Any) -> float | None:
    """Integral of the posterior's density over the parameters, by a grid; None for D > 2.

    None too where each of the grid's densities would be an ODE to solve, which takes many minutes.

    The grid is even in the prior's standard coordinates. It spans the box around the draws and
    half as much again on either side, inside the prior's support: a density that puts more of its
    mass elsewhere than its draws do integrates to less than 1 there. Modes that are only a few
    steps of the grid wide are not resolved: the sum then strays from 1 by the grid's own error.

    Args:
        posterior: The posterior.
        x: One observation.
        draws: Draws of this posterior, shape (N, D).
    """
    prior = posterior.prior
    solved = getattr(posterior, "solved", False)
    if prior.dim > 2 or prior.standard_dim != prior.dim or solved:
        return None
    points = GRID[prior.dim]
    drawn = np.asarray(prior.to_standard(jnp.asarray(draws)))
    low, high = drawn.min(axis=0), drawn.max(axis=0)
    half = np.where(prior.bounded, HALF_WIDTH, np.inf)
    low, high = low - (high - low) / 2, high + (high - low) / 2
    low, high = np.maximum(low, -half), np.minimum(high, half)
    steps = (np.arange(points)[:, None] + 0.5) / points
    axes = (low + steps * (high - low)).T
    y = jnp.asarray(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, prior.dim))
    y = y.astype(jnp.result_type(float))
    theta = prior.from_standard(y)
    log_density = posterior.log_prob(theta, x) + prior.standard_log_det(y, theta)
    volume = float(np.prod((high - low) / points))
    return float(jnp.sum(jnp.exp(log_density)) * volume)


def held_out_loss(key: Key, posterior: sf.Posterior, task: Task, n: int) -> float:
    """Mean negative log density, in nats, of n fresh pairs of parameters and observations."""
    sims = sf.simulate(key, posterior.prior, task.simulator, n, progress=False).only_valid()
    return -float(jnp.mean(posterior.log_prob(sims.theta, sims.x)))
