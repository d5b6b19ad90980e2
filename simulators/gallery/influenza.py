"""Influenza in an English boarding school, 1978: an epidemic with real counts.

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
STEPS = 12
"""Steps a day of the stochastic model."""

STAGES = 4
"""Shape of the gamma distribution of stays in bed, and stages of a stay in the ODE.

With a single one many would be up again within hours and some lie for weeks, which the counts deny.
"""

COUNTS = np.array([3, 8, 26, 76, 225, 298, 258, 233, 189, 128, 68, 29, 14, 4])
"""Boys in bed on each of 14 days."""

CITATION = "Anonymous 1978, Influenza in a boarding school, British Medical Journal 1:587 (data)"


def prior() -> dict[str, dist.Distribution]:
    """The prior, by name.

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
    """Simulate the counts (14,): infections and falling ill by binomial draws, then stays in bed.

    Args:
        seed: Of all randomness.
        theta: As `prior` names it.

    Example:
        >>> boys_in_bed(0, {"r0": 4.0, "before": 1.0, "in_bed": 2.0, "first": 3.0}).shape
        (14,)
    """
    rng = np.random.default_rng(seed)
    infectious = min(max(1, rng.poisson(theta["first"])), BOYS)
    well, ill = BOYS - infectious, np.zeros(DAYS * STEPS, int)
    rate = theta["r0"] / theta["before"] / BOYS / STEPS
    falls_ill = -math.expm1(-1 / (theta["before"] * STEPS))
    for step in range(len(ill)):
        infected = rng.binomial(well, -math.expm1(-rate * infectious))
        ill[step] = rng.binomial(infectious, falls_ill)
        well -= infected
        infectious += infected - ill[step]
    days = (1 + np.repeat(np.arange(len(ill)), ill)) / STEPS
    up = days + rng.gamma(STAGES, theta["in_bed"] / STAGES, len(days))
    morning = np.arange(1, DAYS + 1)[:, None]
    return np.sum((days <= morning) & (morning < up), axis=1)


@cache
def influenza() -> Task:
    """A stochastic epidemic in a closed school of 763 boys, and how many of them were in bed.

    A boy who is infected is infectious for `before` days on average, falls ill and stays in bed for
    `in_bed` days, by a gamma distribution of shape 4; one infectious boy among all others would
    infect `r0` of them. About `first` boys are infectious a day before the first count. Priors: r0
    ~ LogNormal(log 3, .5), before ~ LogNormal(0, .5), in_bed ~ LogNormal(log 3, .4), first ~
    LogNormal(log 3, .7).

    Returns:
        The task: four named parameters, x of shape (14,), whole numbers. The simulator is a plain
        NumPy function that runs in worker processes; there is no reference.

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
    """The same epidemic as an ODE with negative binomial counts, a numpyro model.

    Returns:
        The task: the parameters of `influenza` and `concentration`, that of the counts; x of shape
        (14,). The reference is NUTS.

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
    """Boys in bed (14,) by the ODE; NaN where it was not solved.

    Example:
        >>> theta = {"r0": 4.0, "before": 1.0, "in_bed": 2.0, "first": 3.0}
        >>> bool(expected_in_bed(theta).max() > 99)
        True
    """
    first = theta["first"]
    start = jnp.concatenate([jnp.stack([BOYS - first, first]), jnp.zeros(STAGES)])
    times = jnp.arange(DAYS + 1.0)
    states = ode.solve(_field, start, dict(theta), times, dt0=0.05, tolerance=1e-4, max_steps=1024)
    # a mean that is zero, or below by rounding, has no distribution
    return jnp.maximum(jnp.sum(states[1:, 2:], axis=1), 1e-3)


def _field(time: Any, state: Array, theta: Mapping[str, Array]) -> Array:
    well, infectious, in_bed = state[0], state[1], state[2:]
    infections = theta["r0"] / theta["before"] * well * infectious / BOYS
    ill = infectious / theta["before"]
    better = in_bed * (STAGES / theta["in_bed"])
    arrive = jnp.concatenate([ill[None], better[:-1]])
    return jnp.concatenate([jnp.stack([-infections, infections - ill]), arrive - better])
