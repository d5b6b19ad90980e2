"""Normal set: infer mean and variance of a normal distribution from up to 100 draws of it."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array

from sbi_flows.core.typing import Key
from simulators.adapters import missing
from simulators.adapters.task import Task

TRIALS = 100
"""Number of trials in a simulation."""
SHAPE = 3.0
"""Shape of the inverse-gamma prior of the variance."""
SCALE = 2.0
"""Scale of the inverse-gamma prior of the variance, whose prior mean is 1."""
PRIOR_TRIALS = 0.25
"""Ratio of `variance` to the prior variance of the mean: the equivalent number of trials."""

CITATION = (
    "Gelman et al. 2013, Bayesian Data Analysis, third edition, section 3.3 (normal data with a "
    "conjugate prior distribution)"
)


@cache
def normal_set() -> Task:
    """Make the normal set task: x_t ~ N(mean, variance), for up to 100 exchangeable trials.

    The prior is conjugate: variance ~ InverseGamma(3, 2), and the prior of the mean, given the
    variance, is normal with mean 0 and variance 4 * variance. A missing trial is NaN. The posterior
    given the other trials is normal-inverse-gamma; it is the prior if all trials are missing.

    Returns:
        The task: theta named `variance`, `mean`; x of shape (100,).

    References:
        Gelman et al. 2013, Bayesian Data Analysis, section 3.3.

    Example:
        >>> normal_set().labels, normal_set().observation(1).shape
        (('variance', 'mean'), (100,))
    """
    return Task(
        name="normal_set",
        prior=_prior,
        simulator=_simulator,
        citation=CITATION,
        sample_reference=_sample_reference,
    )


def observation(i: int, trials: int = TRIALS) -> Array:
    """Return observation i with all but the first `trials` trials missing, shape (100,).

    Raises:
        ValueError: i is out of range, or `trials` is not between 0 and 100.

    Example:
        >>> int(jnp.sum(jnp.isnan(observation(1, trials=5))))
        95
    """
    return missing.keep_first(normal_set().observation(i), trials)


def _prior() -> None:
    variance = numpyro.sample("variance", dist.InverseGamma(SHAPE, SCALE))
    numpyro.sample("mean", dist.Normal(0.0, jnp.sqrt(variance / PRIOR_TRIALS)))


def _simulator(key: Key, theta: dict[str, Array]) -> Array:
    return theta["mean"] + jnp.sqrt(theta["variance"]) * jax.random.normal(key, (TRIALS,))


@partial(jax.jit, static_argnums=2)
def _sample_reference(key: Key, x: Array, n: int) -> Array:
    """Draw the variance from its inverse-gamma posterior, then the mean given the variance."""
    is_missing = jnp.isnan(x)
    count = jnp.sum(~is_missing)
    sample_mean = jnp.sum(jnp.where(is_missing, 0.0, x)) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.where(is_missing, 0.0, x - sample_mean) ** 2)
    total = PRIOR_TRIALS + count
    shape = SHAPE + count / 2
    scale = SCALE + squares / 2 + PRIOR_TRIALS * count / total * sample_mean**2 / 2
    variance_key, mean_key = jax.random.split(key)
    variance = scale / jax.random.gamma(variance_key, shape, (n,))
    noise = jax.random.normal(mean_key, (n,))
    mean = count * sample_mean / total + jnp.sqrt(variance / total) * noise
    return jnp.stack([variance, mean], axis=-1)
