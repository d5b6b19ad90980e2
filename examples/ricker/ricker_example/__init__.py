"""Ricker map: counts with Poisson noise of a population with chaotic dynamics.

References:
    Wood 2010, Statistical inference for noisy nonlinear ecological dynamic systems, Nature 466.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from simulators import Task

YEARS = 50


def ricker() -> Task:
    """Make the Ricker task.

    Returns:
        The task: theta named `log_growth`, `noise` and `scale`; x of shape (50,), yearly counts.

    Example:
        >>> ricker().observation(1).shape
        (50,)
    """
    return Task(
        name="ricker",
        prior={
            "log_growth": dist.Uniform(2.0, 5.0),
            "noise": dist.Uniform(0.05, 0.6),
            "scale": dist.Uniform(4.0, 20.0),
        },
        simulator=simulate,
        citation="Wood 2010, Nature 466:1102",
    )


def simulate(key: jax.Array, theta: dict[str, jax.Array]) -> jax.Array:
    """Simulate the counts of 50 years, shape (50,).

    The population follows N' = N exp(log_growth - N + noise * e) with e ~ N(0, 1), from N = 1. Each
    count is Poisson(scale * N).
    """
    noise_key, count_key = jax.random.split(key)

    def year(population: jax.Array, shock: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_rate = theta["log_growth"] - population + theta["noise"] * shock
        population = population * jnp.exp(log_rate)
        return population, population

    shocks = jax.random.normal(noise_key, (YEARS,))
    _, populations = jax.lax.scan(year, jnp.ones(()), shocks)
    return jax.random.poisson(count_key, theta["scale"] * populations).astype(jnp.float32)
