"""Influenza in an English boarding school, 1978: an epidemic with real daily counts.

Public names: `influenza`, `influenza_ode`, `boys_in_bed`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array

from simulators.adapters import ode
from simulators.adapters.external import external_simulator
from simulators.adapters.numpyro_model import NumpyroTask, from_numpyro
from simulators.adapters.task import Task

BOYS = 763
DAYS = 14
STEPS_PER_DAY = 12
"""Number of time steps per day in the stochastic model."""

STAGES = 4
"""Shape parameter of the gamma distribution of the time in bed.

In the ODE, boys in bed pass through this number of stages. With one stage, the distribution would
be exponential: many boys would get up within hours, and some would stay in bed for weeks. The
observed counts exclude an exponential distribution.
"""

COUNTS = np.array([3, 8, 26, 76, 225, 298, 258, 233, 189, 128, 68, 29, 14, 4])
"""Observed number of boys in bed on each of 14 days."""

CITATION = "Anonymous 1978, Influenza in a boarding school, British Medical Journal 1:587 (data)"


def prior() -> dict[str, dist.Distribution]:
    """Return the prior of each parameter, by name.

    Example:
        >>> list(prior())
        ['r0', 'before', 'in_bed', 'first']
    """
    return {
        "r0": dist.LogNormal(math.log(3.0), 0.5),
        "before": dist.LogNormal(math.log(1.0), 0.5),
        "in_bed": dist.LogNormal(math.log(3.0), 0.4),
        "first": dist.LogNormal(math.log(3.0), 0.7),
    }


def boys_in_bed(seed: int, theta: Mapping[str, Any]) -> np.ndarray:
    """Simulate the number of boys in bed on each day, shape (14,).

    In each time step, the numbers of infections and of boys who fall ill are binomial draws. The
    times in bed are gamma draws.

    Args:
        seed: Seed of the random numbers.
        theta: Value of each parameter of `prior`.

    Example:
        >>> boys_in_bed(0, {"r0": 4.0, "before": 1.0, "in_bed": 2.0, "first": 3.0}).shape
        (14,)
    """
    rng = np.random.default_rng(seed)
    infectious = min(max(1, rng.poisson(theta["first"])), BOYS)
    susceptible, onsets = BOYS - infectious, np.zeros(DAYS * STEPS_PER_DAY, int)
    rate = theta["r0"] / theta["before"] / BOYS / STEPS_PER_DAY
    onset_probability = -math.expm1(-1 / (theta["before"] * STEPS_PER_DAY))
    for step in range(len(onsets)):
        infected = rng.binomial(susceptible, -math.expm1(-rate * infectious))
        onsets[step] = rng.binomial(infectious, onset_probability)
        susceptible -= infected
        infectious += infected - onsets[step]
    start = (1 + np.repeat(np.arange(len(onsets)), onsets)) / STEPS_PER_DAY
    end = start + rng.gamma(STAGES, theta["in_bed"] / STAGES, len(start))
    morning = np.arange(1, DAYS + 1)[:, None]
    return np.sum((start <= morning) & (morning < end), axis=1)


@cache
def influenza() -> Task:
    """Make the influenza task: a stochastic epidemic in a closed school of 763 boys.

    The observation is the number of boys in bed on each of 14 days. An infected boy is infectious
    for `before` days on average. Then he falls ill and stays in bed for `in_bed` days on average.
    The time in bed has a gamma distribution of shape 4. If all other boys are susceptible, an
    infectious boy infects `r0` boys on average. About `first` boys are infectious one day before
    the first count. Priors: r0 ~ LogNormal(log 3, .5), before ~ LogNormal(0, .5), in_bed ~
    LogNormal(log 3, .4), first ~ LogNormal(log 3, .7).

    Returns:
        The task: four named parameters, and x of shape (14,) with integer entries. The simulator is
        a NumPy function that runs in worker processes. There is no reference sampler.

    References:
        British Medical Journal 1978, 1:587.

    Example:
        >>> influenza().observation(1)[:3]
        Array([ 3,  8, 26], dtype=int32...)
    """
    return Task(
        name="influenza",
        prior=prior(),
        simulator=external_simulator(boys_in_bed, shape=(DAYS,), dtype=int, timeout=60.0),
        citation=CITATION,
        num_observations=1,
        observed=COUNTS[None],
    )


@cache
def influenza_ode() -> NumpyroTask:
    """Make the influenza task with an ODE and negative binomial counts, as a numpyro model.

    Returns:
        The task: the parameters of `influenza`, and `concentration`, the concentration parameter of
        the negative binomial distribution; x of shape (14,). The reference sampler is NUTS.

    References:
        British Medical Journal 1978, 1:587.

    Example:
        >>> influenza_ode().labels
        ('r0', 'before', 'in_bed', 'first', 'concentration')
    """
    return from_numpyro(_model, ["counts"], data=COUNTS, name="influenza_ode", citation=CITATION)


def _model(counts: Array | None = None) -> None:
    theta = {name: numpyro.sample(name, site) for name, site in prior().items()}
    concentration = numpyro.sample("concentration", dist.LogNormal(math.log(10.0), 1.0))
    numpyro.sample(
        "counts",
        dist.NegativeBinomial2(expected_in_bed(theta), concentration).to_event(1),
        obs=counts,
    )


def expected_in_bed(theta: Mapping[str, Array]) -> Array:
    """Solve the ODE for the expected number of boys in bed on each day, shape (14,).

    The result is NaN if the solver fails.

    Example:
        >>> theta = {"r0": 4.0, "before": 1.0, "in_bed": 2.0, "first": 3.0}
        >>> bool(expected_in_bed(theta).max() > 99)
        True
    """
    first = theta["first"]
    start = jnp.concatenate([jnp.stack([BOYS - first, first]), jnp.zeros(STAGES)])
    times = jnp.arange(DAYS + 1.0)
    states = ode.solve(_field, start, dict(theta), times, dt0=0.05, tolerance=1e-4, max_steps=1024)
    # The negative binomial distribution needs a positive mean.
    return jnp.maximum(jnp.sum(states[1:, 2:], axis=1), 1e-3)


def _field(time: Any, state: Array, theta: Mapping[str, Array]) -> Array:
    """Compute the rates of change: susceptible boys, infectious boys, boys in each stage in bed."""
    susceptible, infectious, in_bed = state[0], state[1], state[2:]
    infections = theta["r0"] / theta["before"] * susceptible * infectious / BOYS
    onsets = infectious / theta["before"]
    outflow = in_bed * (STAGES / theta["in_bed"])
    inflow = jnp.concatenate([onsets[None], outflow[:-1]])
    return jnp.concatenate([jnp.stack([-infections, infections - onsets]), inflow - outflow])
