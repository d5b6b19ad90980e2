"""SIR: an epidemic in a closed population, observed by repeated tests of a thousand people."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array

from sbi_flows.core.typing import Key
from simulators.adapters import mcmc, ode
from simulators.adapters.task import Task

POPULATION = 1e6
TESTED = 1000
INTERVAL = 17.0
TIMES = 10
TOLERANCE = 1e-6
"""Tolerance of the solver for the susceptible fraction and the log of the infected fraction."""
MAX_STEPS = 1024

CITATION = (
    "Kermack and McKendrick 1927, A contribution to the mathematical theory of epidemics; as in "
    "Lueckmann et al. 2021, Benchmarking Simulation-Based Inference, arXiv:2101.04653, task T.9"
)


@cache
def sir() -> Task:
    """Make the SIR task: contact and recovery rates from ten surveys of an epidemic.

    The numbers of susceptible, infected and recovered people satisfy S + I + R = N = 10^6. With
    I(0) = 1 and R(0) = 0, they follow

        dS/dt = -beta S I / N,    dI/dt = beta S I / N - gamma I.

    At t = 0, 17, ..., 153 days, the observation is x ~ Binomial(1000, I(t) / N). Priors: beta ~
    LogNormal(log .4, .5), gamma ~ LogNormal(log .125, .2). The second argument of LogNormal is the
    standard deviation of the logarithm.

    Returns:
        The task: theta named `beta` and `gamma` (1/day), x of shape (10,), counts as floats. The
        reference sampler is NUTS with the same likelihood.

    References:
        Kermack and McKendrick 1927, Proc. R. Soc. Lond. A 115; Lueckmann et al. 2021,
        arXiv:2101.04653, task T.9.

    Example:
        >>> sir().observation(1).shape, sir().labels
        ((10,), ('beta', 'gamma'))
    """
    return Task(
        name="sir",
        prior=_prior(),
        simulator=_simulator,
        citation=CITATION,
        stored_as="sir",
        sample_reference=mcmc.NutsReference(_model, tuple(_prior())),
    )


def _prior() -> dict[str, dist.Distribution]:
    return {
        "beta": dist.LogNormal(math.log(0.4), 0.5),
        "gamma": dist.LogNormal(math.log(0.125), 0.2),
    }


def log_infected(theta: dict[str, Array]) -> Array:
    """Compute the log of the infected fraction at the ten times of the surveys, shape (10,).

    The ODE is solved for the log of the infected fraction, whose time derivative is
    beta S / N - gamma. The relative error of the infected fraction is then similar for small and
    large fractions.

    Example:
        >>> import jax.numpy as jnp
        >>> early = log_infected({"beta": jnp.float32(0.3), "gamma": jnp.float32(0.1)})
        >>> print(jnp.round(early[1] - early[0], 3))  # 17 days of growth at .2 a day
        3.4
    """
    fractions = jnp.array([(POPULATION - 1) / POPULATION, -math.log(POPULATION)])
    times = INTERVAL * jnp.arange(TIMES)
    states = ode.solve(
        _vector_field, fractions, theta, times, dt0=0.1, tolerance=TOLERANCE, max_steps=MAX_STEPS
    )
    return jnp.minimum(states[:, 1], 0.0)


def _vector_field(t: Any, y: Array, theta: dict[str, Array]) -> Array:
    susceptible, infected = y[0], jnp.exp(jnp.minimum(y[1], 0.0))
    rate = theta["beta"] * susceptible
    return jnp.stack([-rate * infected, rate - theta["gamma"]])


def _simulator(key: Key, theta: dict[str, Array]) -> Array:
    return jax.random.binomial(key, TESTED, jnp.exp(log_infected(theta)))


def _model(x: Array) -> None:
    theta = {name: numpyro.sample(name, site) for name, site in _prior().items()}
    log_p = log_infected(theta)
    # The binomial coefficient does not depend on theta.
    numpyro.factor("x", jnp.sum(x * log_p + (TESTED - x) * jnp.log1p(-jnp.exp(log_p))))
