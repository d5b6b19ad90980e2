"""Tasks with a known likelihood: their equations, their noise and the published posteriors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.integrate import solve_ivp

import simulators
from sbi_flows.diagnostics.c2st import c2st
from simulators.tasks.bernoulli_glm import design_matrix
from simulators.tasks.lotka_volterra import log_populations
from simulators.tasks.sir import log_infected
from simulators.tasks.slcp import slcp
from simulators.tasks.slcp_distractors import distractors, informative, slcp_distractors
from tests.simulators.tasks.published import published

N = 4000


def simulated(name, theta):
    keys = jax.random.split(jax.random.key(7), N)
    simulator = simulators.get(name).simulator
    return np.asarray(jax.jit(jax.vmap(lambda key: simulator(key, theta)))(keys), float)


@pytest.mark.parametrize(("beta", "gamma"), [(0.4, 0.125), (1.5, 0.1), (0.1, 0.2)])
def test_sir_follows_its_equations(beta, gamma):
    def field(t, y):
        infection = beta * y[0] * y[1] / 1e6
        return [-infection, infection - gamma * y[1]]

    start, times = [1e6 - 1, 1.0], np.arange(0, 154, 17.0)
    exact = solve_ivp(field, (0, 153), start, "DOP853", times, rtol=1e-10, atol=1e-10).y[1] / 1e6
    got = log_infected({"beta": jnp.float32(beta), "gamma": jnp.float32(gamma)})
    np.testing.assert_allclose(got, np.log(exact), atol=3e-3)


def test_sir_counts_are_binomial():
    theta = {"beta": jnp.float32(0.4), "gamma": jnp.float32(0.125)}
    x, p = simulated("sir", theta), np.exp(np.asarray(log_infected(theta), float))
    assert np.all((x >= 0) & (x <= 1000) & (x == np.round(x)))
    variance = 1000 * p * (1 - p)
    assert np.all(np.abs(x.mean(axis=0) - 1000 * p) < 4 * np.sqrt(variance / N) + 1e-3)
    np.testing.assert_allclose(x.var(axis=0)[2:], variance[2:], rtol=0.1)


def test_lotka_volterra_follows_its_equations_and_is_log_normal():
    theta = {"alpha": 0.9, "beta": 0.06, "gamma": 0.8, "delta": 0.04}

    def field(t, y):
        u, v = y
        prey = theta["alpha"] * u - theta["beta"] * u * v
        return [prey, -theta["gamma"] * v + theta["delta"] * u * v]

    times = np.minimum(2.1 * np.arange(10), 18.9)
    exact = solve_ivp(field, (0, 18.9), [30, 1], "DOP853", times, rtol=1e-10, atol=1e-12).y
    theta = {name: jnp.float32(value) for name, value in theta.items()}
    got = log_populations(theta)
    np.testing.assert_allclose(got, np.log(exact).ravel(), atol=2e-3)
    z = (np.log(simulated("lotka_volterra", theta)) - np.asarray(got)) / 0.1
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3


def test_bernoulli_glm_spikes_and_statistics():
    matrix, theta = design_matrix(), jnp.linspace(-1.0, 1.0, 10)
    np.testing.assert_array_equal(matrix[9, 1:], matrix[1:10, 1][::-1])
    spikes = simulated("bernoulli_glm_raw", theta)
    assert set(np.unique(spikes)) == {0.0, 1.0}
    p = 1 / (1 + np.exp(-matrix.astype(float) @ np.asarray(theta)))
    assert np.max(np.abs(spikes.mean(axis=0) - p) / np.sqrt(p * (1 - p) / N)) < 4.5
    np.testing.assert_allclose(simulated("bernoulli_glm", theta), spikes @ matrix, atol=1e-3)


@pytest.mark.promotes
def test_bernoulli_glm_prior():
    draws = np.asarray(simulators.bernoulli_glm().prior.sample(jax.random.key(0), (20_000,)), float)
    assert np.var(draws[:, 0]) == pytest.approx(2.0, rel=0.05)
    difference = np.eye(9) - np.eye(9, k=-1)
    f = difference @ difference + np.diag(np.sqrt(np.arange(9) / 9))
    white = draws[:, 1:] @ f.T
    np.testing.assert_allclose(np.cov(white.T), np.eye(9), atol=0.06)


def test_distractors_hide_the_numbers_of_slcp():
    theta = jnp.array([0.7, -2.9, -1.2, 0.9, -1.0])
    x = simulated("slcp_distractors", theta)
    clean = simulated("slcp", theta)
    found = np.asarray(jax.vmap(informative)(jnp.asarray(x)), float)
    np.testing.assert_allclose(found.mean(axis=0), clean.mean(axis=0), atol=0.1)
    np.testing.assert_allclose(np.cov(found.T), np.cov(clean.T), atol=0.15)
    noise = x[:, np.argsort(distractors().order)[8:]]
    # medians, as the tails have no variance; a mixture of 20 places about 15 apart
    assert 3 < np.median(np.abs(noise - np.median(noise, axis=0))) < 60
    assert np.median(np.abs(noise)) > 5


def test_distractors_do_not_change_the_posterior():
    x, key = slcp_distractors().observation(1), jax.random.key(3)
    got = slcp_distractors().sample_reference(key, x, 50)
    np.testing.assert_array_equal(got, slcp().sample_reference(key, informative(x), 50))


@pytest.mark.newest
def test_the_published_design():
    np.testing.assert_array_equal(design_matrix(), published("bernoulli_glm", "design_matrix"))


@pytest.mark.release
@pytest.mark.promotes
@pytest.mark.parametrize("i", [1, 2])
@pytest.mark.parametrize("name", ["sir", "lotka_volterra", "bernoulli_glm", "bernoulli_glm_raw"])
def test_published_posteriors(name, i):
    file = name.removesuffix("_raw")
    x = published(file, f"x_{i}" if file == name else f"x_raw_{i}")
    posterior = published(file, f"posterior_{i}")
    x = jnp.asarray(x, jnp.float32)
    draws = simulators.get(name).sample_reference(jax.random.key(5), x, len(posterior))
    assert c2st(posterior, draws, jobs=-1) <= 0.53
