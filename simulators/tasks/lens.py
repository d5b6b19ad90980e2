"""Lens: infer a gravitational lens and the galaxy behind it from a noisy image of the arcs."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array

from sbi_flows.core.typing import Key
from simulators.adapters.importance import ImportanceReference
from simulators.adapters.task import Task

SIZE = 32
"""Number of pixels along each side of the image."""
HALF_WIDTH = 2.5
"""Half of the image's width in arc seconds."""
NOISE = 1.0
"""Standard deviation of the noise of a pixel."""
BOUNDS = {
    "x": (-0.5, 0.5),
    "y": (-0.5, 0.5),
    "einstein_radius": (0.8, 1.6),
    "source_radius": (0.15, 0.4),
    "brightness": (3.0, 10.0),
}
"""Bounds of the uniform priors: arc seconds, and noise standard deviations for the brightness."""

CITATION = (
    "Narayan and Bartelmann 1996, Lectures on Gravitational Lensing, astro-ph/9606001 (singular "
    "isothermal sphere)"
)


@cache
def lens() -> Task:
    """Make the lens task: an image of 32 x 32 pixels of arcs around a gravitational lens.

    The lens is a singular isothermal sphere at the centre of the image. A ray seen at angle
    a = (a_x, a_y) comes from b = a - einstein_radius a / |a|. The source is a Gaussian centred at
    (x, y), so the image is

        brightness exp(-|b - (x, y)|^2 / (2 source_radius^2)) + noise

    at the centres of the pixels, which are 0.16 arc seconds wide. The noise has standard
    deviation 1. The priors are uniform: x, y in (-0.5, 0.5), einstein_radius in (0.8, 1.6),
    source_radius in (0.15, 0.4), all in arc seconds, and brightness in (3, 10). The reference
    leaves out pixels that are NaN.

    Returns:
        The task: theta named `x`, `y`, `einstein_radius`, `source_radius`, `brightness`; x of shape
        (32, 32), whose first axis is y. The reference is importance resampling with the exact
        likelihood.

    References:
        Narayan and Bartelmann 1996, astro-ph/9606001.

    Example:
        >>> lens().dim, lens().observation(1).shape
        (5, (32, 32))
    """
    return Task(
        name="lens",
        prior=_prior(),
        simulator=_simulator,
        citation=CITATION,
        sample_reference=ImportanceReference(_model, tuple(BOUNDS)),
    )


def image(theta: dict[str, Array]) -> Array:
    """Compute the image without noise, shape (32, 32).

    Example:
        >>> theta = {name: jnp.float32(low) for name, (low, high) in BOUNDS.items()}
        >>> print(f"{float(image(theta).max()):.1f}")
        3.0
    """
    axis = HALF_WIDTH * ((2 * np.arange(SIZE) + 1) / SIZE - 1)
    across, up = jnp.asarray(axis[None, :]), jnp.asarray(axis[:, None])
    # the number of pixels is even: no pixel lies on the centre
    factor = 1.0 - theta["einstein_radius"] / jnp.hypot(across, up)
    squares = (factor * across - theta["x"]) ** 2 + (factor * up - theta["y"]) ** 2
    return theta["brightness"] * jnp.exp(-0.5 * squares / theta["source_radius"] ** 2)


def _prior() -> dict[str, dist.Distribution]:
    return {name: dist.Uniform(*bounds) for name, bounds in BOUNDS.items()}


def _simulator(key: Key, theta: dict[str, Array]) -> Array:
    return image(theta) + NOISE * jax.random.normal(key, (SIZE, SIZE))


def _model(x: Array) -> None:
    theta = {name: numpyro.sample(name, site) for name, site in _prior().items()}
    residual = jnp.where(jnp.isnan(x), 0.0, x - image(theta)) / NOISE
    numpyro.factor("likelihood", -0.5 * jnp.sum(residual**2))
