"""Drift diffusion: infer four parameters of a decision from reaction times and choices."""

from __future__ import annotations

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array

from sbi_flows.core.typing import Key
from simulators.adapters import missing
from simulators.adapters.importance import ImportanceReference
from simulators.adapters.task import Task

TRIALS = 300
"""Number of trials in a simulation."""
BOUNDS = {
    "drift": (-3.0, 3.0),
    "boundary": (0.5, 2.5),
    "bias": (0.3, 0.7),
    "non_decision": (0.1, 0.6),
}
"""Bounds of the uniform priors."""
SWITCH = 0.3
"""Time in units of boundary^2: before it the short-time series is used, after it the long-time one.

The omitted terms of either series are less than 1e-7 of the density for biases in [0.3, 0.7].
"""
LOG_TIMES = (math.log(1.5e-3), math.log(8.0))
"""Logs of the first and the last decision time of a simulation, in units of boundary^2.

The probability of a time outside this range is below 1e-12.
"""
CELLS = 1024
"""Number of cells of the table from which decision times are drawn, for each choice."""

CITATION = (
    "Ratcliff 1978, A theory of memory retrieval, Psychological Review 85; density as in Navarro "
    "and Fuss 2009, Fast and accurate calculations for first-passage times in Wiener diffusion "
    "models, J. Math. Psychol. 53"
)


@cache
def drift_diffusion() -> Task:
    """Make the drift diffusion task: reaction times and choices of up to 300 trials.

    In each trial, evidence starts at bias * boundary and follows dy = drift dt + dW until it leaves
    the interval (0, boundary), which takes the decision time. The choice is 1 at the upper end, and
    0 at the lower end. The reaction time is the sum of the decision time and `non_decision`, in
    seconds. A missing trial is NaN. The priors are uniform: drift in (-3, 3), boundary in
    (0.5, 2.5), bias in (0.3, 0.7), non_decision in (0.1, 0.6).

    Returns:
        The task: theta named `drift`, `boundary`, `bias`, `non_decision`; x of shape (300, 2): the
        reaction time and the choice of each trial. The reference is importance resampling with the
        exact density.

    References:
        Ratcliff 1978, Psychol. Rev. 85:59; Navarro and Fuss 2009, J. Math. Psychol. 53:222.

    Example:
        >>> drift_diffusion().dim, drift_diffusion().observation(1).shape
        (4, (300, 2))
    """
    return Task(
        name="drift_diffusion",
        prior={name: dist.Uniform(*bounds) for name, bounds in BOUNDS.items()},
        simulator=_simulator,
        citation=CITATION,
        sample_reference=_sample_reference,
    )


def observation(i: int, trials: int = TRIALS) -> Array:
    """Return observation i with all but the first `trials` trials missing, shape (300, 2).

    Raises:
        ValueError: i is out of range, or `trials` is not between 0 and 300.

    Example:
        >>> int(jnp.sum(~jnp.isnan(observation(1, trials=20)[:, 0])))
        20
    """
    return missing.keep_first(drift_diffusion().observation(i), trials)


def log_density(x: Array, theta: dict[str, Array]) -> Array:
    """Compute the log density of each trial, shape (trials,).

    Args:
        x: Reaction time and choice of each trial, shape (trials, 2).
        theta: The parameters; see `drift_diffusion`.

    Returns:
        The log density with respect to time, for the choice of the trial. It is -inf for reaction
        times below `non_decision`, and 0 for missing trials.

    References:
        Navarro and Fuss 2009, J. Math. Psychol. 53:222.

    Example:
        >>> theta = {"drift": 1.0, "boundary": 1.0, "bias": 0.5, "non_decision": 0.2}
        >>> theta = {name: jnp.float32(value) for name, value in theta.items()}
        >>> print(jnp.exp(log_density(jnp.array([[0.3, 1.0]]), theta)).round(3))
        [2.834]
    """
    is_missing = jnp.any(jnp.isnan(x), axis=-1)
    decision = jnp.where(is_missing, 1.0, x[:, 0] - theta["non_decision"])
    is_upper = jnp.where(is_missing, 1.0, x[:, 1]) > 0.5
    # the upper end is the lower end of the mirrored process
    drift = jnp.where(is_upper, -theta["drift"], theta["drift"])
    distance = jnp.where(is_upper, 1.0 - theta["bias"], theta["bias"])
    scale = theta["boundary"] ** 2
    log_standard = _log_standard_density(decision / scale, distance) - jnp.log(scale)
    tilt = -drift * theta["boundary"] * distance - 0.5 * drift**2 * decision
    log_prob = jnp.where(decision > 0, log_standard + tilt, -jnp.inf)
    return jnp.where(is_missing, 0.0, log_prob)


def _log_standard_density(time: Array, distance: Array) -> Array:
    """Compute the log density of leaving (0, 1) at 0, for no drift and a start at `distance`."""
    early = jnp.clip(time, 1e-6, SWITCH)
    total = jnp.zeros(())
    for k in (1, -1, 2, -2):
        total += (1.0 + 2 * k / distance) * jnp.exp(-2 * k * (k + distance) / early)
    log_early = jnp.log(distance) - distance**2 / (2 * early) - 1.5 * jnp.log(early)
    log_early += jnp.log1p(total) - 0.5 * math.log(2 * math.pi)
    late = jnp.maximum(time, SWITCH)
    angle = math.pi * distance
    total = jnp.zeros(())
    for k in (2, 3, 4):
        decay = jnp.exp(-0.5 * (k**2 - 1) * math.pi**2 * late)
        total += k * jnp.sin(k * angle) / jnp.sin(angle) * decay
    log_late = jnp.log(math.pi * jnp.sin(angle)) - 0.5 * math.pi**2 * late + jnp.log1p(total)
    return jnp.where(time < SWITCH, log_early, log_late)


def _simulator(key: Key, theta: dict[str, Array]) -> Array:
    """Draw choices and times from a table of the joint density on a grid of log times."""
    cell_key, jitter_key = jax.random.split(key)
    start, end = LOG_TIMES
    width = (end - start) / CELLS
    time = jnp.exp(start + width * (jnp.arange(CELLS) + 0.5))
    distance = jnp.stack([theta["bias"], 1.0 - theta["bias"]])[:, None]
    # the drift changes the density by a factor of time, and by one factor for each choice
    push = theta["drift"] * theta["boundary"]
    tilt = jnp.stack([-push, push])[:, None] * distance - 0.5 * push**2 * time[None]
    log_mass = jnp.log(time)[None] + _log_standard_density(time[None], distance) + tilt
    cumulative = jnp.cumsum(jnp.ravel(jnp.exp(log_mass - jnp.max(log_mass))))
    level = cumulative[-1] * jax.random.uniform(cell_key, (TRIALS,))
    cell = jnp.minimum(jnp.searchsorted(cumulative, level, side="right"), 2 * CELLS - 1)
    choice, place = jnp.divmod(cell, CELLS)
    jitter = jax.random.uniform(jitter_key, (TRIALS,))
    decision = theta["boundary"] ** 2 * jnp.exp(start + width * (place + jitter))
    return jnp.stack([theta["non_decision"] + decision, choice.astype(decision.dtype)], axis=-1)


def _latest_start(x: Array) -> Array:
    """Return the largest possible `non_decision`: the first reaction time, or the prior's bound."""
    return jnp.minimum(BOUNDS["non_decision"][1], jnp.nanmin(x[:, 0], initial=jnp.inf))


def _non_decision(fraction: Array, x: Array) -> Array:
    low = BOUNDS["non_decision"][0]
    return low + fraction * (_latest_start(x) - low)


def _model(x: Array) -> None:
    names = ("drift", "boundary", "bias")
    theta = {name: numpyro.sample(name, dist.Uniform(*BOUNDS[name])) for name in names}
    # uniform up to the first reaction time, so that the support does not depend on theta
    fraction = numpyro.sample("fraction", dist.Uniform(0.0, 1.0))
    theta["non_decision"] = _non_decision(fraction, x)
    numpyro.factor("likelihood", jnp.sum(log_density(x, theta)))


_importance = ImportanceReference(_model, ("drift", "boundary", "bias", "fraction"))


def _sample_reference(key: Key, x: Array, n: int) -> Array:
    x = jnp.asarray(x, jnp.result_type(float))
    rows = _importance(key, x, n)
    return rows.at[:, 3].set(_non_decision(rows[:, 3], x))
