"""Stochastic volatility: infer level, persistence and noise of the volatility of 500 returns."""

from __future__ import annotations

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array

from sbi_flows.core.typing import Key
from simulators.adapters import mcmc
from simulators.adapters.task import Task

POINTS = 500
"""Number of returns."""

CITATION = (
    "Kim, Shephard and Chib 1998, Stochastic volatility: likelihood inference and comparison with "
    "ARCH models, Rev. Econ. Stud. 65"
)


@cache
def stochastic_volatility() -> Task:
    """Make the stochastic volatility task: 500 returns whose log variance is a hidden process.

    The log variance h of the returns y is a stationary autoregressive process:

        h_t = mu + phi (h_{t-1} - mu) + sigma e_t,    y_t = exp(h_t / 2) u_t

    with independent standard normal e and u. The first h has the stationary distribution, with mean
    mu and variance sigma^2 / (1 - phi^2). The priors are mu ~ N(0, 1), phi uniform in (0.5, 0.99)
    and log_sigma ~ N(log 0.3, 0.5), where the second argument of N is the standard deviation.

    Returns:
        The task: theta named `mu`, `phi`, `log_sigma`; x of shape (500,). The reference is NUTS
        over the parameters and the 500 innovations. It takes about half a minute.

    References:
        Kim, Shephard and Chib 1998, Rev. Econ. Stud. 65:361 (the model).

    Example:
        >>> stochastic_volatility().labels, stochastic_volatility().observation(1).shape
        (('mu', 'phi', 'log_sigma'), (500,))
    """
    names = tuple(_prior())
    sampler = partial(mcmc.latent_nuts, dense=names)
    return Task(
        name="stochastic_volatility",
        prior=_prior(),
        simulator=_simulator,
        citation=CITATION,
        sample_reference=mcmc.NutsReference(_model, names, sampler=sampler),
    )


def log_variance(theta: dict[str, Array], innovations: Array) -> Array:
    """Compute the log variance h of each return, shape (points,).

    The sum over earlier innovations takes log2(points) vector operations in place of a loop over
    time.

    Args:
        theta: The parameters; see `stochastic_volatility`.
        innovations: Standard normal numbers, shape (points,). The first one determines the first h,
            and the others are e_2, e_3, ...

    Example:
        >>> theta = {"mu": jnp.ones(()), "phi": jnp.float32(0.6), "log_sigma": jnp.zeros(())}
        >>> h = log_variance(theta, jnp.array([0.8, 0.0, 1.0]))
        >>> print(", ".join(f"{value:.2f}" for value in h))
        2.00, 1.60, 2.36
    """
    phi = theta["phi"]
    first = innovations[:1] / jnp.sqrt(1 - phi**2)
    total = jnp.concatenate([first, innovations[1:]])
    span, pull = 1, phi
    while span < len(total):
        # total_t is the sum of phi^k e_{t-k} over k < span
        total += pull * jnp.concatenate([jnp.zeros_like(total[:span]), total[:-span]])
        span, pull = 2 * span, pull**2
    return theta["mu"] + jnp.exp(theta["log_sigma"]) * total


def _prior() -> dict[str, dist.Distribution]:
    return {
        "mu": dist.Normal(0.0, 1.0),
        "phi": dist.Uniform(0.5, 0.99),
        "log_sigma": dist.Normal(math.log(0.3), 0.5),
    }


def _simulator(key: Key, theta: dict[str, Array]) -> Array:
    hidden_key, return_key = jax.random.split(key)
    h = log_variance(theta, jax.random.normal(hidden_key, (POINTS,)))
    return jnp.exp(h / 2) * jax.random.normal(return_key, (POINTS,))


def _model(x: Array) -> None:
    theta = {name: numpyro.sample(name, site) for name, site in _prior().items()}
    white = dist.Normal(0.0, 1.0).expand(list(x.shape)).to_event(1)
    h = log_variance(theta, numpyro.sample("innovations", white))
    numpyro.sample("x", dist.Normal(0.0, jnp.exp(h / 2)).to_event(1), obs=x)
