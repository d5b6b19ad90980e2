"""Sensors: infer five source strengths from 30 linear sensors, any of which may be missing."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key
from simulators.adapters import missing
from simulators.adapters.task import Task

SENSORS = 30
DIM = 5
NOISE = 0.5
"""Standard deviation of the noise of each sensor."""
DESIGN_SEED = 30_5
ORDER_SEED = 5_30

CITATION = (
    "Bishop 2006, Pattern Recognition and Machine Learning, section 2.3.3 (linear Gaussian models)"
)


@cache
def sensors() -> Task:
    """Make the sensors task: x = H theta + noise, theta ~ N(0, I) in five dimensions.

    H is a fixed matrix of shape (30, 5), whose entries were drawn with mean 0 and variance 1/5. The
    noise has standard deviation 0.5. A missing sensor is NaN. The posterior is Gaussian; it is the
    prior if all sensors are missing.

    Returns:
        The task: theta of shape (5,), x of shape (30,).

    References:
        Bishop 2006, Pattern Recognition and Machine Learning, section 2.3.3.

    Example:
        >>> sensors().dim, sensors().observation(1).shape
        (5, (30,))
    """
    return Task(
        name="sensors",
        prior=dist.Normal(0.0, 1.0).expand([DIM]).to_event(1),
        simulator=_simulator,
        citation=CITATION,
        sample_reference=_sample_reference,
    )


def observation(i: int, present: int = SENSORS) -> Array:
    """Return observation i with all but `present` sensors missing, shape (30,).

    The sensors are removed in a fixed random order, which differs between observations.

    Raises:
        ValueError: i is out of range, or `present` is not between 0 and 30.

    Example:
        >>> int(jnp.sum(jnp.isnan(observation(1, present=10))))
        20
    """
    x = sensors().observation(i)
    order = np.random.RandomState(ORDER_SEED + i).permutation(SENSORS)
    return x.at[order].set(missing.keep_first(x[order], present))


@cache
def design_matrix() -> np.ndarray:
    """Return the matrix H, shape (30, 5), float32.

    Example:
        >>> design_matrix().shape
        (30, 5)
    """
    entries = np.random.RandomState(DESIGN_SEED).randn(SENSORS, DIM)
    return (entries / np.sqrt(DIM)).astype(np.float32)


@full_precision
def _simulator(key: Key, theta: Array) -> Array:
    return jnp.asarray(design_matrix()) @ theta + NOISE * jax.random.normal(key, (SENSORS,))


@partial(jax.jit, static_argnums=2)
def _sample_reference(key: Key, x: Array, n: int) -> Array:
    scale = jnp.full(SENSORS, NOISE)
    return missing.gaussian_posterior(key, jnp.asarray(design_matrix()), scale, x, n)
