"""Hodgkin-Huxley: the equations, the noise, and the reference against the whole prior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.integrate import solve_ivp

from sbi_flows.prior import as_prior
from simulators.tasks import hodgkin_huxley as hh

THETAS = [
    {"g_sodium": 50.0, "g_potassium": 5.0, "g_leak": 0.1, "threshold": -62.0},
    {"g_sodium": 90.0, "g_potassium": 11.0, "g_leak": 0.2, "threshold": -56.0},
    {"g_sodium": 12.0, "g_potassium": 10.0, "g_leak": 0.28, "threshold": -56.0},  # silent
]


def numbers(theta: dict[str, float]) -> dict[str, jax.Array]:
    return {name: jnp.float32(value) for name, value in theta.items()}


def gate_rates(u: float) -> tuple[np.ndarray, np.ndarray]:
    """Pospischil et al. 2008, section 2.2, in their notation; u = v - threshold."""
    opening = [
        -0.32 * (u - 13) / (np.exp(-(u - 13) / 4) - 1),
        0.128 * np.exp(-(u - 17) / 18),
        -0.032 * (u - 15) / (np.exp(-(u - 15) / 5) - 1),
    ]
    closing = [
        0.28 * (u - 40) / (np.exp((u - 40) / 5) - 1),
        4 / (1 + np.exp(-(u - 40) / 5)),
        0.5 * np.exp(-(u - 10) / 40),
    ]
    return np.array(opening), np.array(closing)


def solved(theta: dict[str, float]) -> np.ndarray:
    """Solve the equations with adaptive steps before, during and after the pulse."""

    def field(t, y, current):
        v, (m, h, n) = y[0], y[1:]
        opening, closing = gate_rates(v - theta["threshold"])
        sodium = theta["g_sodium"] * m**3 * h * (53 - v)
        potassium = theta["g_potassium"] * n**4 * (-107 - v)
        dv = sodium + potassium + theta["g_leak"] * (-70 - v) + current
        return [dv, *(opening * (1 - y[1:]) - closing * y[1:])]

    opening, closing = gate_rates(-70 - theta["threshold"])
    y, parts = np.array([-70, *(opening / (opening + closing))]), []
    for start, end, current in ((0, 5, 0.0), (5, 10, 8.5), (10, 60, 0.0)):
        times = np.arange(10 * start + 1, 10 * end + 1) / 10
        solution = solve_ivp(
            field, (start, end), y, "LSODA", times, args=(current,), rtol=1e-8, atol=1e-9
        )
        parts.append(solution.y[0])
        y = solution.y[:, -1]
    return np.concatenate(parts)


@pytest.mark.parametrize("theta", THETAS)
def test_the_voltage_follows_its_equations(theta):
    """Allow a shift of 0.02 ms, which is several mV at the rise of a spike."""
    got, exact = np.asarray(hh.voltage(numbers(theta)), float), solved(theta)
    assert (exact.max() > 0) == (theta is not THETAS[2])
    assert np.sqrt(np.mean((got - exact) ** 2)) < 0.2
    late = np.interp(np.arange(1, 601) / 10 + 0.02, np.arange(1, 601) / 10, exact)
    early = np.interp(np.arange(1, 601) / 10 - 0.02, np.arange(1, 601) / 10, exact)
    low, high = np.minimum(early, late), np.maximum(early, late)
    assert np.all((got > np.minimum(low, exact) - 0.5) & (got < np.maximum(high, exact) + 0.5))


def test_rates_where_their_formulas_divide_by_zero():
    for u in (13.0, 15.0, 40.0):
        at, near = (hh.rates(jnp.float32(u + d), jnp.zeros(())) for d in (0.0, 2e-3))
        for left, right in zip(at, near, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-3)
        slopes = jax.jacfwd(lambda v: hh.rates(v, jnp.zeros(())))(jnp.float32(u))
        assert all(jnp.all(jnp.isfinite(slope)) for slope in slopes)


def test_the_noise_of_a_trace():
    keys, simulator = jax.random.split(jax.random.key(7), 20), hh.hodgkin_huxley().simulator
    x = jax.vmap(lambda key: simulator(key, numbers(THETAS[0])))(keys)
    noise = np.asarray(x - hh.voltage(numbers(THETAS[0]))[None], float) / 10
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3


def fires(theta: jax.Array) -> np.ndarray:
    def peak(row: jax.Array) -> jax.Array:
        return jnp.max(hh.voltage(dict(zip(hh.BOUNDS, row, strict=True))))

    return np.asarray(jax.jit(lambda rows: jax.lax.map(peak, rows, batch_size=500))(theta)) > 0


@pytest.mark.promotes
def test_most_neurons_of_the_prior_fire():
    theta = as_prior(hh.hodgkin_huxley().prior).sample(jax.random.key(0), 500)
    assert 0.9 < fires(theta).mean() < 0.99


@pytest.mark.release
@pytest.mark.promotes
def test_the_reference_agrees_with_weighted_draws_of_the_prior():
    """Importance sampling from the prior needs neither a proposal nor a path of temperatures."""
    x = hh.hodgkin_huxley().observation(2)
    prior = as_prior(hh.hodgkin_huxley().prior).sample(jax.random.key(1), 400_000)

    def log_likelihood(row: jax.Array) -> jax.Array:
        clean = hh.voltage(dict(zip(hh.BOUNDS, row, strict=True)))
        return -0.5 * jnp.sum((x - clean) ** 2) / hh.NOISE**2

    evaluate = jax.jit(lambda rows: jax.lax.map(log_likelihood, rows, batch_size=2000))
    values = np.asarray(evaluate(prior), float)
    weight = np.exp(values - values.max())
    size = weight.sum() ** 2 / np.sum(weight**2)
    assert size > 100
    rows = np.asarray(prior, float)
    sample_reference = hh.hodgkin_huxley().sample_reference
    assert sample_reference is not None
    draws = sample_reference(jax.random.key(2), x, 4000)
    for d in range(4):
        order = np.argsort(rows[:, d])
        cumulative = np.cumsum(weight[order]) / weight.sum()
        levels = np.interp(np.asarray(draws[:, d], float), rows[order, d], cumulative)
        assert stats.kstest(levels, "uniform").statistic < 2.5 / np.sqrt(size)
