"""Simulators against the moments and densities of their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import simulators
from simulators.tasks.slcp import log_likelihood

N = 20_000


def simulated(name: str, theta: list[float]) -> np.ndarray:
    task, keys = simulators.get(name), jax.random.split(jax.random.key(7), N)
    theta = jnp.asarray(theta)
    return np.asarray(jax.jit(jax.vmap(lambda key: task.simulator(key, theta)))(keys), float)


def assert_mean(values: np.ndarray, expected: float) -> None:
    """Assert that the mean of the draws is within four standard errors of the expected value."""
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - expected) < 4 * error, (np.mean(values), expected, error)


@pytest.mark.parametrize("name", ["gaussian_linear", "gaussian_linear_uniform"])
def test_gaussian_linear(name):
    theta = np.linspace(-1, 1, 10)
    noise = simulated(name, theta) - theta
    assert stats.kstest(noise.ravel() / np.sqrt(0.1), "norm").pvalue > 1e-3
    np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(10), atol=4 / np.sqrt(N))


def test_gaussian_mixture():
    noise = simulated("gaussian_mixture", [3.0, -8.0]) - [3.0, -8.0]
    for d in range(2):
        assert_mean(noise[:, d], 0.0)
        assert_mean(noise[:, d] ** 2, (1 + 0.01) / 2)
        assert_mean(noise[:, d] ** 4, 3 * (1 + 0.01**2) / 2)
    assert_mean(np.prod(noise**2, axis=1), (1 + 0.01**2) / 2)  # one component for both


@pytest.mark.parametrize("theta", [(0.5, 0.3), (-0.5, -0.3), (0.6, -0.9)])
def test_two_moons(theta):
    x = simulated("two_moons", theta)
    cosine = x[:, 0] - 0.25 + abs(theta[0] + theta[1]) / np.sqrt(2)
    sine = x[:, 1] - (theta[1] - theta[0]) / np.sqrt(2)
    assert stats.kstest((np.hypot(sine, cosine) - 0.1) / 0.01, "norm").pvalue > 1e-3
    angle = np.arctan2(sine, cosine) / np.pi + 0.5
    assert stats.kstest(angle, "uniform").pvalue > 1e-3


def test_slcp():
    theta = [0.7, -2.9, -1.2, 0.9, -1.0]
    points = simulated("slcp", theta).reshape(-1, 4, 2)
    s1, s2, rho = 1.2**2, 0.9**2, np.tanh(-1.0)
    for p in range(4):
        a, b = points[:, p, 0] - 0.7, points[:, p, 1] + 2.9
        assert_mean(a, 0.0)
        assert_mean(b, 0.0)
        assert_mean(a**2, s1**2)
        assert_mean(b**2, s2**2)
        assert_mean(a * b, rho * s1 * s2)
    assert_mean((points[:, 0, 0] - 0.7) * (points[:, 1, 0] - 0.7), 0.0)


@pytest.mark.parametrize("theta3", [-2.0, 0.02])
def test_slcp_log_likelihood(theta3):
    theta = np.array([[0.5, -1.0, theta3, 1.5, 2.0], [0.4, -0.5, 1.0, -0.5, -0.3]])
    x = np.array([0.5, -1.2, 0.4999, 0.3, 0.5001, -1.0, 0.502, 1.0])
    expected = []
    for m1, m2, t3, t4, t5 in theta:
        cross = np.tanh(t5) * t3**2 * t4**2
        covariance = np.array([[t3**4, cross], [cross, t4**4]]) + 1e-6 * np.eye(2)
        expected.append(
            stats.multivariate_normal([m1, m2], covariance).logpdf(x.reshape(4, 2)).sum()
        )
    got = log_likelihood(jnp.asarray(theta, jnp.float32), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=2e-3)
