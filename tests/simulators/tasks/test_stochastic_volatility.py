"""Stochastic volatility: moments, density, and the reference against a filter on a grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer.util import log_density
from scipy import stats

import simulators
from simulators.tasks import stochastic_volatility as sv

THETA = {"mu": -0.5, "phi": 0.9, "log_sigma": -0.7}


def numbers(theta: dict[str, float]) -> dict[str, jax.Array]:
    return {name: jnp.float32(value) for name, value in theta.items()}


def test_log_variances_follow_the_recursion():
    e = np.random.default_rng(0).normal(size=20)
    sigma = np.exp(-0.7)
    expected = [-0.5 + sigma * e[0] / np.sqrt(1 - 0.9**2)]
    for shock in e[1:]:
        expected.append(-0.5 + 0.9 * (expected[-1] + 0.5) + sigma * shock)
    np.testing.assert_allclose(sv.log_variance(numbers(THETA), jnp.asarray(e)), expected, rtol=1e-4)


def test_simulated_returns_have_the_moments_of_the_model():
    """The logarithm of y^2 is h plus the log of a chi-square variable."""
    keys, simulator = jax.random.split(jax.random.key(7), 400), sv.stochastic_volatility().simulator
    x = np.asarray(jax.jit(jax.vmap(lambda key: simulator(key, numbers(THETA))))(keys), float)
    noise = stats.loggamma(0.5)
    z = np.log(x**2 / 2) + 0.5 - noise.mean()
    variance = np.exp(-1.4) / (1 - 0.9**2)
    expected = {0: variance + noise.var(), 1: 0.9 * variance, 10: 0.9**10 * variance}
    means = z.mean(axis=1)
    assert abs(means.mean()) < 4 * means.std() / 20
    for lag, value in expected.items():
        products = np.mean(z[:, : 500 - lag] * z[:, lag:], axis=1)
        assert abs(products.mean() - value) < 4 * products.std() / 20
    assert abs(np.mean(x > 0) - 0.5) < 4 * 0.5 / np.sqrt(x.size)


@pytest.mark.promotes
def test_the_model_has_the_density_of_the_simulator():
    e, x = np.random.default_rng(1).normal(size=(2, 6))
    latent = {**numbers(THETA), "innovations": jnp.asarray(e)}
    got = log_density(sv._model, (jnp.asarray(x),), {}, latent)[0]
    h = np.asarray(sv.log_variance(numbers(THETA), jnp.asarray(e)), float)
    expected = stats.norm.logpdf(-0.5) + stats.norm(np.log(0.3), 0.5).logpdf(-0.7)
    expected += np.log(1 / 0.49) + stats.norm.logpdf(e).sum()
    expected += stats.norm(0, np.exp(h / 2)).logpdf(x).sum()
    assert float(got) == pytest.approx(expected, rel=1e-4)


def filtered(theta: np.ndarray, x: np.ndarray, cells: int = 200) -> np.ndarray:
    """Compute log likelihoods by a hidden Markov model on a grid of log variances.

    Args:
        theta: Values of mu, phi and log_sigma, shape (n, 3).
        x: The returns, shape (points,).
        cells: Number of cells of the grid.

    Returns:
        Log likelihoods, shape (n,), in double precision.
    """
    values = np.empty(len(theta))
    for i, (mu, phi, log_sigma) in enumerate(theta):
        scale = np.exp(log_sigma) / np.sqrt(1 - phi**2)
        z = np.linspace(-6, 6, cells)
        step = stats.norm.pdf(z[:, None], phi * z, np.sqrt(1 - phi**2)) * (z[1] - z[0])
        h = mu + scale * z
        density = np.exp(-0.5 * (h[:, None] + x**2 * np.exp(-h[:, None]) + np.log(2 * np.pi)))
        weight, total = stats.norm.pdf(z) * (z[1] - z[0]), 0.0
        for t in range(len(x)):
            weight = density[:, t] * (step @ weight if t else weight)
            total += np.log(weight.sum())
            weight = weight / weight.sum()
        values[i] = total
    return values


def test_the_filter_against_quadrature_over_two_log_variances():
    x = np.array([0.7, -2.0])
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    first = -0.5 + np.exp(-0.7) / np.sqrt(1 - 0.9**2) * nodes[:, None]
    second = -0.5 + 0.9 * (first + 0.5) + np.exp(-0.7) * nodes
    density = stats.norm.pdf(x[0], 0, np.exp(first / 2))
    density = density * stats.norm.pdf(x[1], 0, np.exp(second / 2))
    expected = np.log(weights @ density @ weights)
    got = filtered(np.array([[-0.5, 0.9, -0.7]]), x)
    np.testing.assert_allclose(got, [expected], atol=1e-6)


@pytest.mark.release
@pytest.mark.promotes
def test_the_reference_agrees_with_importance_sampling_by_the_filter():
    """The weights are those of the exact marginal likelihood, which has no latent variables."""
    task = sv.stochastic_volatility()
    x = np.asarray(task.observation(1), float)
    chains = np.asarray(simulators.stochastic_volatility().reference(1, n=2000), float)

    def unbounded(rows: np.ndarray) -> np.ndarray:
        fraction = (rows[:, 1] - 0.5) / 0.49
        return np.column_stack([rows[:, 0], np.log(fraction / (1 - fraction)), rows[:, 2]])

    u = unbounded(chains)
    proposal = stats.multivariate_t(u.mean(axis=0), 1.2 * np.cov(u.T), df=8, seed=3)
    rows = proposal.rvs(2000)
    phi = 0.5 + 0.49 / (1 + np.exp(-rows[:, 1]))
    theta = np.column_stack([rows[:, 0], phi, rows[:, 2]])
    log_weight = filtered(theta, x) - proposal.logpdf(rows) + stats.logistic.logpdf(rows[:, 1])
    log_weight += stats.norm.logpdf(theta[:, 0])
    log_weight += stats.norm(np.log(0.3), 0.5).logpdf(theta[:, 2])
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    assert 1 / np.sum(weight**2) > 1000
    mean = weight @ rows
    sd = np.sqrt(weight @ (rows - mean) ** 2)
    np.testing.assert_allclose((u.mean(axis=0) - mean) / sd, 0, atol=0.15)
    np.testing.assert_allclose(u.std(axis=0) / sd, 1, atol=0.12)
    order = np.argsort(rows, axis=0)
    for d in range(3):
        cumulative = np.cumsum(weight[order[:, d]])
        levels = np.interp(u[:, d], rows[order[:, d], d], cumulative)
        assert stats.kstest(levels, "uniform").statistic < 0.08
