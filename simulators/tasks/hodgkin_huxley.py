"""Hodgkin-Huxley: infer four properties of a neuron from a noisy trace of its voltage."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, lax

from sbi_flows.core.typing import Key
from simulators.adapters.task import Task
from simulators.adapters.tempering import TemperedReference

POINTS = 600
"""Number of recorded voltages."""
INTERVAL = 0.1
"""Interval between two recorded voltages, in ms."""
STEPS = 4
"""Number of integration steps in an interval."""
PULSE = (5.0, 10.0)
"""Start and end of the current pulse, in ms."""
CURRENT = 8.5
"""Current during the pulse, in uA/cm^2."""
NOISE = 10.0
"""Standard deviation of the noise of a recorded voltage, in mV."""
SODIUM, POTASSIUM, LEAK = 53.0, -107.0, -70.0
"""Reversal potentials, in mV."""
CAPACITANCE = 1.0
"""Capacitance of the membrane, in uF/cm^2."""
BOUNDS = {
    "g_sodium": (10.0, 100.0),
    "g_potassium": (3.0, 12.0),
    "g_leak": (0.05, 0.3),
    "threshold": (-65.0, -55.0),
}
"""Bounds of the uniform priors: mS/cm^2 for the conductances, and mV for the threshold."""

CITATION = (
    "Hodgkin and Huxley 1952, A quantitative description of membrane current, J. Physiol. 117; "
    "rates as in Pospischil et al. 2008, Minimal Hodgkin-Huxley type models for different classes "
    "of cortical and thalamic neurons, Biol. Cybern. 99"
)


@cache
def hodgkin_huxley() -> Task:
    """Make the Hodgkin-Huxley task: the voltage of a neuron that receives a pulse of current.

    The voltage v of the membrane, in mV, follows

        C dv/dt = g_sodium m^3 h (53 - v) + g_potassium n^4 (-107 - v) + g_leak (-70 - v) + I(t)

    with C = 1 uF/cm^2. The current I is 8.5 uA/cm^2 for 5 < t < 10 ms, and zero otherwise. Each
    gate m, h, n follows an equation like dm/dt = a(v) (1 - m) - b(v) m; see `rates`. At t = 0 the
    voltage is -70 mV and the gates are in equilibrium. The voltage is recorded at t = 0.1, 0.2,
    ..., 60 ms, with independent normal noise of standard deviation 10 mV, which is typical of
    optical recordings rather than of electrodes. For most draws from the prior the neuron fires
    once; for about 1 in 20 it does not fire.

    The priors are uniform: g_sodium in (10, 100), g_potassium in (3, 12), g_leak in (0.05, 0.3),
    all in mS/cm^2, and threshold in (-65, -55) mV. The reference leaves out voltages that are NaN.

    Returns:
        The task: theta named `g_sodium`, `g_potassium`, `g_leak`, `threshold`; x of shape (600,) in
        mV. The reference is sequential Monte Carlo with the exact likelihood.

    References:
        Hodgkin and Huxley 1952, J. Physiol. 117:500; Pospischil et al. 2008, Biol. Cybern. 99:427;
        Goncalves et al. 2020, eLife 9:e56261 (inference of the conductances).

    Example:
        >>> hodgkin_huxley().dim, hodgkin_huxley().observation(1).shape
        (4, (600,))
    """
    return Task(
        name="hodgkin_huxley",
        prior=_prior(),
        simulator=_simulator,
        citation=CITATION,
        sample_reference=TemperedReference(_model, tuple(BOUNDS)),
    )


def rates(v: Array, threshold: Array) -> tuple[Array, Array]:
    """Compute the rates at which the gates m, h, n open and close.

    Args:
        v: Voltage in mV, a scalar.
        threshold: The parameter V_T in mV, a scalar, which shifts all rates along the voltage.

    Returns:
        The opening rates a and the closing rates b in 1/ms, each of shape (3,).

    References:
        Pospischil et al. 2008, Biol. Cybern. 99:427, section 2.2.

    Example:
        >>> opening, closing = rates(jnp.float32(-47.0), jnp.float32(-60.0))
        >>> print(", ".join(f"{rate:.2f}" for rate in (*opening, *closing)))
        1.28, 0.16, 0.13, 7.59, 0.02, 0.46
    """
    u = v - threshold
    opening = (
        1.28 * _decay_ratio((u - 13) / 4),
        0.128 * jnp.exp(-(u - 17) / 18),
        0.16 * _decay_ratio((u - 15) / 5),
    )
    closing = (
        1.4 * _decay_ratio((40 - u) / 5),
        4 * jax.nn.sigmoid((u - 40) / 5),
        0.5 * jnp.exp(-(u - 10) / 40),
    )
    return jnp.stack(opening), jnp.stack(closing)


def voltage(theta: dict[str, Array]) -> Array:
    """Compute the voltage without noise, shape (600,), in mV.

    In each time step of 0.025 ms, the gates relax at the rates of the present voltage, and then the
    voltage relaxes at the new conductances. Both relaxations are exact exponentials. The gates are
    half a step ahead of the voltage, so the method has second order.

    Args:
        theta: The parameters; see `hodgkin_huxley`.

    References:
        Hines 1984, Efficient computation of branched nerve equations, Int. J. Biomed. Comput. 15
        (the staggered steps).

    Example:
        >>> theta = {name: jnp.float32(low) for name, (low, _) in BOUNDS.items()}
        >>> print(f"{float(voltage(theta).max()):.0f}")
        26
    """
    step_size = INTERVAL / STEPS
    middle = step_size * (np.arange(POINTS * STEPS) + 0.5)
    current = CURRENT * ((middle > PULSE[0]) & (middle < PULSE[1]))
    first = jnp.full((), LEAK, jnp.result_type(float))
    opening, closing = rates(first, theta["threshold"])

    def step(state: tuple[Array, Array], current: Array) -> tuple[tuple[Array, Array], Array]:
        v, gates = state
        opening, closing = rates(v, theta["threshold"])
        total = opening + closing
        gates = opening / total + (gates - opening / total) * jnp.exp(-step_size * total)
        sodium = theta["g_sodium"] * gates[0] ** 3 * gates[1]
        potassium = theta["g_potassium"] * gates[2] ** 4
        total = sodium + potassium + theta["g_leak"]
        drive = sodium * SODIUM + potassium * POTASSIUM + theta["g_leak"] * LEAK + current
        v = drive / total + (v - drive / total) * jnp.exp(-step_size / CAPACITANCE * total)
        return (v, gates), v

    start = (first, opening / (opening + closing))
    return lax.scan(step, start, jnp.asarray(current, first.dtype))[1][STEPS - 1 :: STEPS]


def _decay_ratio(u: Array) -> Array:
    """Compute u / (1 - exp(-u)), which is 1 at u = 0."""
    is_small = jnp.abs(u) < 1e-3
    safe = jnp.where(is_small, 1.0, u)
    return jnp.where(is_small, 1.0 + u / 2, safe / -jnp.expm1(-safe))


def _prior() -> dict[str, dist.Distribution]:
    return {name: dist.Uniform(*bounds) for name, bounds in BOUNDS.items()}


def _simulator(key: Key, theta: dict[str, Array]) -> Array:
    return voltage(theta) + NOISE * jax.random.normal(key, (POINTS,))


def _model(x: Array) -> None:
    theta = {name: numpyro.sample(name, site) for name, site in _prior().items()}
    residual = jnp.where(jnp.isnan(x), 0.0, x - voltage(theta)) / NOISE
    numpyro.factor("likelihood", -0.5 * jnp.sum(residual**2))
