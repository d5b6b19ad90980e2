"""Scores of a posterior other than C2ST and calibration.

Public names: `mmd`, `normalisation`, `held_out_loss`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

import sbi_flows as sf
from sbi_flows.core.arrays import squared_distances
from sbi_flows.core.typing import Key, Obs
from sbi_flows.prior.maps import HALF_WIDTH
from simulators import Task

MAX_MMD_DRAWS = 2_000
"""Maximum number of draws that an MMD uses from each of its two sets."""

GRID_POINTS = {1: 4096, 2: 400}
"""Number of grid points per dimension, for integrals over one and over two parameters."""


def mmd(reference: Any, samples: Any) -> float:
    """Compute the unbiased estimate of the squared maximum mean discrepancy (MMD).

    Its expectation is 0 if the two sets of draws have the same distribution. Both sets are
    standardised with the mean and standard deviation of the reference. The kernel is exp(-d^2 / m),
    where d is the distance between two draws and m is the median of d^2 over pairs of reference
    draws. At most 2,000 draws of each set are used.

    Args:
        reference: Draws of the reference posterior, shape (N, D).
        samples: Draws of the posterior to test, shape (M, D).

    References:
        Gretton et al. 2012, A Kernel Two-Sample Test, JMLR 13, eq. 3.

    Example:
        >>> import numpy as np
        >>> draws = np.random.default_rng(0).normal(size=(2, 500, 2))
        >>> abs(mmd(*draws)) < 0.01 < mmd(draws[0], draws[1] + 1.0)
        True
    """
    reference, samples = (
        np.asarray(rows, np.float64)[:MAX_MMD_DRAWS] for rows in (reference, samples)
    )
    mean, sd = reference.mean(axis=0), reference.std(axis=0)
    sd = np.where(sd > 0, sd, 1.0)
    a, b = ((rows - mean) / sd for rows in (reference, samples))
    distances = [squared_distances(*pair) for pair in ((a, a), (b, b), (a, b))]
    scale = np.median(distances[0])
    kernel_aa, kernel_bb, kernel_ab = (np.exp(-squares / scale) for squares in distances)
    n, m = len(a), len(b)
    within = (kernel_aa.sum() - n) / (n * (n - 1)) + (kernel_bb.sum() - m) / (m * (m - 1))
    return float(within - 2.0 * kernel_ab.mean())


def normalisation(posterior: sf.Posterior, x: Obs, draws: Any) -> float | None:
    """Integrate the posterior's density over the parameters on a grid.

    The grid is uniform in the prior's standard coordinates. It covers the bounding box of the
    draws, extended by half its width on each side, within the prior's support. For a normalised
    density, the integral is below 1 if some of the mass lies outside the grid. The integral is
    inaccurate if a mode is only a few grid steps wide.

    Args:
        posterior: The posterior.
        x: One observation.
        draws: Draws of this posterior given x, shape (N, D).

    Returns:
        The integral. The result is None for more than two parameters. It is also None for a
        posterior whose density requires an ODE solve at each grid point, because the integral would
        take many minutes.
    """
    prior = posterior.prior
    if prior.dim > 2 or prior.standard_dim != prior.dim or posterior.needs_ode:
        return None
    points = GRID_POINTS[prior.dim]
    standard_draws = np.asarray(prior.to_standard(jnp.asarray(draws)))
    low, high = standard_draws.min(axis=0), standard_draws.max(axis=0)
    bound = np.where(prior.bounded, HALF_WIDTH, np.inf)
    low, high = low - (high - low) / 2, high + (high - low) / 2
    low, high = np.maximum(low, -bound), np.minimum(high, bound)
    steps = (np.arange(points)[:, None] + 0.5) / points
    axes = (low + steps * (high - low)).T
    y = jnp.asarray(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, prior.dim))
    y = y.astype(jnp.result_type(float))
    theta = prior.from_standard(y)
    log_density = posterior.log_prob(theta, x) + prior.standard_log_det(y, theta)
    volume = float(np.prod((high - low) / points))
    return float(jnp.sum(jnp.exp(log_density)) * volume)


def held_out_loss(key: Key, posterior: sf.Posterior, task: Task, n: int) -> float:
    """Compute the mean negative log density of theta given x over n new simulations, in nats."""
    sims = sf.simulate(
        key, posterior.prior, task.simulator, n, missing=task.missing, progress=False
    ).only_valid()
    return -float(jnp.mean(posterior.log_prob(sims.theta, sims.x)))
