"""Gaussian mixture: infer the common mean of two Gaussians, one wide and one narrow."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from sbi_flows.core.typing import Key
from simulators.adapters.sampling import log_interval_mass, truncated_normal
from simulators.adapters.task import Task

SCALES = (1.0, 0.1)
"""Standard deviations of the two components of the mixture."""

CITATION = (
    "Sisson et al. 2007, Sequential Monte Carlo without likelihoods; as in Lueckmann et al. 2021, "
    "Benchmarking Simulation-Based Inference, arXiv:2101.04653, task T.7"
)


@cache
def gaussian_mixture() -> Task:
    """Make the Gaussian mixture task: x ~ N(theta, I) / 2 + N(theta, .01 I) / 2.

    The prior is U(-10, 10)^2. The posterior is the same mixture centred at x, truncated to the box
    (-10, 10)^2. The number .01 is a variance.

    Returns:
        The task: theta of shape (2,), x of shape (2,).

    References:
        Sisson et al. 2007; Lueckmann et al. 2021, arXiv:2101.04653, task T.7.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> gaussian_mixture().simulator(jax.random.key(0), jnp.zeros(2)).shape
        (2,)
    """
    return Task(
        name="gaussian_mixture",
        prior=dist.Uniform(-10.0, 10.0).expand([2]).to_event(1),
        simulator=_simulator,
        citation=CITATION,
        sample_reference=_sample_reference,
    )


def _simulator(key: Key, theta: Array) -> Array:
    component_key, noise_key = jax.random.split(key)
    scale = jnp.where(jax.random.bernoulli(component_key), *SCALES)
    return theta + scale * jax.random.normal(noise_key, (2,))


@partial(jax.jit, static_argnums=2)
def _sample_reference(key: Key, x: Array, n: int) -> Array:
    x = jnp.asarray(x, jnp.result_type(float))
    component_key, wide_key, narrow_key = jax.random.split(key, 3)
    wide, narrow = (
        truncated_normal(k, x, scale, -10.0, 10.0, n)
        for k, scale in zip((wide_key, narrow_key), SCALES, strict=True)
    )
    # Near an edge, the box cuts off more of the wide component and so lowers its weight.
    mass = jnp.stack([jnp.sum(log_interval_mass(x, scale, -10.0, 10.0)) for scale in SCALES])
    is_narrow = jax.random.categorical(component_key, mass, shape=(n, 1)) == 1
    return jnp.where(is_narrow, narrow, wide)
