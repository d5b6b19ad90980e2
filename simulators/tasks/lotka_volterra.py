"""Lotka-Volterra: infer four rates from ten counts of prey and predators with little noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
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

START = (30.0, 1.0)
INTERVAL = 2.1
TIMES = 10
NOISE = 0.1
LOG_BOUNDS = (math.log(1e-10), math.log(1e4))
TOLERANCE = 3e-6
MAX_STEPS = 1024
MAX_LOG_POPULATION = 40.0

CITATION = (
    "Lotka 1920, Analytical note on certain rhythmic relations in organic systems; as in Lueckmann "
    "et al. 2021, Benchmarking Simulation-Based Inference, arXiv:2101.04653, task T.10"
)


@cache
def lotka_volterra() -> Task:
    """Make the Lotka-Volterra task: four rates from ten counts of prey and predators.

    The numbers of prey, u, and predators, v, start at (u, v)(0) = (30, 1) and follow

        du/dt = alpha u - beta u v,    dv/dt = -gamma v + delta u v.

    At t = 0, 2.1, ..., 18.9, the prey count is LogNormal(log u(t), .1), and the predator count is
    LogNormal(log v(t), .1), where u and v are clipped to [1e-10, 1e4]. Priors: alpha, gamma ~
    LogNormal(-.125, .5), beta, delta ~ LogNormal(-3, .5).

    Returns:
        The task: theta named `alpha`, `beta`, `gamma`, `delta` (1/time), x of shape (20,): ten
        counts of the prey, then ten counts of the predators. The reference sampler is NUTS with the
        same likelihood.

    References:
        Lotka 1920, PNAS 6; Lueckmann et al. 2021, arXiv:2101.04653, task T.10.

    Example:
        >>> lotka_volterra().observation(1).shape, lotka_volterra().labels
        ((20,), ('alpha', 'beta', 'gamma', 'delta'))
    """
    return Task(
        name="lotka_volterra",
        prior=_prior(),
        simulator=_simulator,
        citation=CITATION,
        stored_as="lotka_volterra",
        sample_reference=mcmc.NutsReference(_model, tuple(_prior())),
    )


def _prior() -> dict[str, dist.Distribution]:
    rate, interaction = dist.LogNormal(-0.125, 0.5), dist.LogNormal(-3.0, 0.5)
    return {"alpha": rate, "beta": interaction, "gamma": rate, "delta": interaction}


def log_populations(theta: dict[str, Array]) -> Array:
    """Compute the logs of the clipped populations, shape (20,): ten for prey, ten for predators.

    Example:
        >>> import jax.numpy as jnp
        >>> theta = {"alpha": 0.9, "beta": 0.05, "gamma": 0.9, "delta": 0.05}
        >>> y = log_populations({name: jnp.float32(value) for name, value in theta.items()})
        >>> print(f"{float(jnp.exp(y[0])):.3f}, {float(jnp.exp(y[10])):.3f}")
        30.000, 1.000
    """
    states = ode.solve(
        vector_field,
        jnp.log(jnp.array(START)),
        theta,
        INTERVAL * jnp.arange(TIMES),
        dt0=0.05,
        tolerance=TOLERANCE,
        max_steps=MAX_STEPS,
    )
    return jnp.clip(states.T.reshape(2 * TIMES), *LOG_BOUNDS)


def vector_field(t: Any, y: Array, theta: Mapping[str, Array]) -> Array:
    """Compute the rates of change of the log populations, shape (2,), prey first.

    Populations are clipped at exp(40), because a trial step can reach log populations of thousands.
    An infinite rate would make the error estimate NaN, and the step-size control would stall. With
    a large finite rate, the step-size control rejects the step.

    Args:
        t: Time. The rates do not depend on it.
        y: Log populations, shape (2,), prey first.
        theta: The rates `alpha`, `beta`, `gamma`, `delta`; see `lotka_volterra`.
    """
    prey, predators = jnp.exp(jnp.minimum(y, MAX_LOG_POPULATION))
    return jnp.stack(
        [theta["alpha"] - theta["beta"] * predators, theta["delta"] * prey - theta["gamma"]]
    )


def _simulator(key: Key, theta: dict[str, Array]) -> Array:
    return jnp.exp(log_populations(theta) + NOISE * jax.random.normal(key, (2 * TIMES,)))


def _model(x: Array) -> None:
    theta = {name: numpyro.sample(name, site) for name, site in _prior().items()}
    numpyro.sample("x", dist.LogNormal(log_populations(theta), NOISE).to_event(1), obs=x)
