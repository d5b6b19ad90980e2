"""Gaussian linear uniform: a uniform prior on a box and Gaussian noise, in ten dimensions."""

from __future__ import annotations

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from sbi_flows.core.typing import Key
from simulators.adapters.sampling import truncated_normal
from simulators.adapters.task import Task
from simulators.tasks.gaussian_linear import DIM, VARIANCE, add_noise

CITATION = (
    "Lueckmann et al. 2021, Benchmarking Simulation-Based Inference, arXiv:2101.04653, task T.2"
)


@cache
def gaussian_linear_uniform() -> Task:
    """Make the Gaussian linear uniform task: theta ~ U(-1, 1)^10, x ~ N(theta, .1 I).

    The posterior is N(x, .1 I) truncated to the box (-1, 1)^10. The number .1 is a variance.

    Returns:
        The task: theta of shape (10,), x of shape (10,).

    References:
        Lueckmann et al. 2021, arXiv:2101.04653, task T.2.

    Example:
        >>> abs(gaussian_linear_uniform().reference(1, n=100)).max() <= 1
        Array(True, dtype=bool)
    """
    return Task(
        name="gaussian_linear_uniform",
        prior=dist.Uniform(-1.0, 1.0).expand([DIM]).to_event(1),
        simulator=add_noise,
        citation=CITATION,
        sample_reference=_sample_reference,
    )


@partial(jax.jit, static_argnums=2)
def _sample_reference(key: Key, x: Array, n: int) -> Array:
    x = jnp.asarray(x, jnp.result_type(float))
    return truncated_normal(key, x, math.sqrt(VARIANCE), -1.0, 1.0, n)
