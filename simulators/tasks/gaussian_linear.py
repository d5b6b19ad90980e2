"""Gaussian linear: a conjugate Gaussian prior and Gaussian noise in ten dimensions."""

from __future__ import annotations

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from sbi_flows.core.typing import Key
from simulators.adapters.task import Task

DIM = 10
VARIANCE = 0.1
"""Variance of the prior and of the noise, in each dimension."""

CITATION = (
    "Lueckmann et al. 2021, Benchmarking Simulation-Based Inference, arXiv:2101.04653, task T.1"
)


@cache
def gaussian_linear() -> Task:
    """Make the Gaussian linear task: theta ~ N(0, .1 I) in ten dimensions, x ~ N(theta, .1 I).

    The posterior is N(x / 2, .05 I). The numbers .1 and .05 are variances.

    Returns:
        The task: theta of shape (10,), x of shape (10,).

    References:
        Lueckmann et al. 2021, arXiv:2101.04653, task T.1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> gaussian_linear().simulator(jax.random.key(0), jnp.zeros(10)).shape
        (10,)
    """
    return Task(
        name="gaussian_linear",
        prior=dist.Normal(0.0, math.sqrt(VARIANCE)).expand([DIM]).to_event(1),
        simulator=add_noise,
        citation=CITATION,
        sample_reference=_sample_reference,
    )


def add_noise(key: Key, theta: Array) -> Array:
    """Draw from N(theta, .1 I), in the shape of theta."""
    return theta + math.sqrt(VARIANCE) * jax.random.normal(key, jnp.shape(theta))


@partial(jax.jit, static_argnums=2)
def _sample_reference(key: Key, x: Array, n: int) -> Array:
    return x[None] / 2 + math.sqrt(VARIANCE / 2) * jax.random.normal(key, (n, DIM))
