"""Ornstein-Uhlenbeck: infer rate, mean and noise of a process observed at irregular times."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array, lax

from sbi_flows.core.typing import Key
from simulators.adapters.importance import ImportanceReference
from simulators.adapters.task import Task

POINTS = 1000
"""Number of times on the regular grid."""
INTERVAL = 0.1
"""Interval between two times of the grid."""
PROBABILITY = 0.5
"""Probability that a point is observed."""

CITATION = "Uhlenbeck and Ornstein 1930, On the theory of the Brownian motion, Phys. Rev. 36"


@cache
def ornstein_uhlenbeck() -> Task:
    """Make the Ornstein-Uhlenbeck task: a stationary series of 1,000 points, half of them missing.

    The process dy = rate (mean - y) dt + sigma dW is observed without noise at t = 0, 0.1, ...,
    99.9. Each point is observed with probability 1/2; the others are NaN. The first point has the
    stationary distribution, with mean `mean` and variance sigma^2 / (2 rate). The priors are
    log_rate ~ N(0, 1), mean ~ N(0, 1) and log_sigma ~ N(0, 0.5), where the second argument is the
    standard deviation.

    Returns:
        The task: theta named `log_rate`, `mean`, `log_sigma`; x of shape (1000,), of which about
        500 entries are NaN. The reference is importance resampling with the exact likelihood.

    References:
        Uhlenbeck and Ornstein 1930, Phys. Rev. 36:823.

    Example:
        >>> ornstein_uhlenbeck().labels, ornstein_uhlenbeck().observation(1).shape
        (('log_rate', 'mean', 'log_sigma'), (1000,))
    """
    return Task(
        name="ornstein_uhlenbeck",
        prior=_prior(),
        simulator=_simulator,
        citation=CITATION,
        sample_reference=ImportanceReference(_model, tuple(_prior())),
        missing=True,
    )


def log_likelihood(theta: dict[str, Array], x: Array) -> Array:
    """Compute the log likelihood of the points of x (points,) that are not NaN.

    Let x_last be the last observed point before a point, d the time between them, and m and s^2 the
    mean and variance of the stationary distribution. Given x_last, the point has mean
    m + (x_last - m) exp(-rate d) and variance s^2 (1 - exp(-2 rate d)).

    Example:
        >>> theta = {name: jnp.zeros(()) for name in _prior()}
        >>> print(log_likelihood(theta, jnp.array([jnp.nan, 0.0, jnp.nan])).round(3))
        -0.572
    """
    is_seen = ~jnp.isnan(x)
    place = jnp.arange(len(x))
    last_seen = lax.cummax(jnp.where(is_seen, place, -1))
    previous = jnp.concatenate([jnp.full(1, -1, last_seen.dtype), last_seen[:-1]])
    is_first = previous < 0
    values = jnp.where(is_seen, x, 0.0)
    decay = jnp.exp(theta["log_rate"]) * INTERVAL * (place - previous)
    pull = jnp.where(is_first, 0.0, jnp.exp(-decay))
    mean = theta["mean"] + pull * (values[previous] - theta["mean"])
    log_stationary = theta["log_sigma"] - 0.5 * (jnp.log(2.0) + theta["log_rate"])
    shrinkage = jnp.where(is_first, 1.0, -jnp.expm1(-2 * decay))
    scale = jnp.exp(log_stationary) * jnp.sqrt(shrinkage)
    return jnp.sum(jnp.where(is_seen, dist.Normal(mean, scale).log_prob(values), 0.0))


def _prior() -> dict[str, dist.Distribution]:
    return {
        "log_rate": dist.Normal(0.0, 1.0),
        "mean": dist.Normal(0.0, 1.0),
        "log_sigma": dist.Normal(0.0, 0.5),
    }


def _simulator(key: Key, theta: dict[str, Array]) -> Array:
    noise_key, seen_key = jax.random.split(key)
    rate = jnp.exp(theta["log_rate"])
    stationary = jnp.exp(theta["log_sigma"]) / jnp.sqrt(2 * rate)
    pull = jnp.exp(-rate * INTERVAL)
    step_scale = jnp.sqrt(-jnp.expm1(-2 * rate * INTERVAL))
    noise = jax.random.normal(noise_key, (POINTS,))

    def step(z: Array, white: Array) -> tuple[Array, Array]:
        z = pull * z + step_scale * white
        return z, z

    _, rest = lax.scan(step, noise[0], noise[1:])
    path = theta["mean"] + stationary * jnp.concatenate([noise[:1], rest])
    is_seen = jax.random.bernoulli(seen_key, PROBABILITY, (POINTS,))
    return jnp.where(is_seen, path, jnp.nan)


def _model(x: Array) -> None:
    theta = {name: numpyro.sample(name, site) for name, site in _prior().items()}
    numpyro.factor("likelihood", log_likelihood(theta, x))
