"""Lynx and hare: the data, the ODE, the noise and the numpyro model."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from scipy import stats
from scipy.integrate import solve_ivp

from sbi_flows.prior import as_prior
from simulators import lynx_hare
from simulators.adapters import mcmc
from simulators.gallery import lynx_hare_model as model

TABLE = """(30,4) (47.2,6.1) (70.2,9.8) (77.4,35.2) (36.3,59.4) (20.6,41.7) (18.1,19) (21.4,13)
(22,8.3) (25.4,9.1) (27.1,7.4) (40.3,8) (57,12.3) (76.6,19.5) (52.3,45.7) (19.5,51.1) (11.2,29.7)
(7.6,15.8) (14.6,9.7) (16.2,10.1) (24.7,8.6)"""
FIT = {"alpha": 0.55, "beta": 0.028, "gamma": 0.8, "delta": 0.024}
# Carpenter 2018: posterior means and standard deviations
STAN = {
    "alpha": (0.55, 0.064),
    "beta": (0.028, 0.0044),
    "gamma": (0.80, 0.092),
    "delta": (0.024, 0.0038),
    "sigma": ([0.25, 0.25], [0.045, 0.045]),
    "z0": ([34.0, 5.9], [2.9, 0.54]),
}


def fitted(**changes):
    theta = {**FIT, "sigma": [0.25, 0.3], "z0": [34.0, 5.9], **changes}
    return {name: jnp.asarray(value, jnp.float32) for name, value in theta.items()}


def exact(theta) -> np.ndarray:
    """Solve with a high-order method at tight tolerance, in double precision."""
    alpha, beta, gamma, delta = (float(theta[n]) for n in ("alpha", "beta", "gamma", "delta"))

    def field(t, y):
        return [alpha - beta * np.exp(y[1]), -gamma + delta * np.exp(y[0])]

    start = np.log(np.asarray(theta["z0"], float))
    got = solve_ivp(field, (0, 20), start, "DOP853", np.arange(21.0), rtol=1e-10, atol=1e-10)
    return got.y.T


def test_data_are_the_table():
    pairs = re.findall(r"\(([\d.]+),([\d.]+)\)", TABLE)
    observed = lynx_hare().observation(1)
    assert observed.dtype == jnp.float32
    np.testing.assert_allclose(jnp.exp(observed), np.array(pairs, float), rtol=1e-5)
    with pytest.raises(ValueError, match="expected 1 to 1 for lynx_hare, got 2"):
        lynx_hare().observation(2)
    with pytest.raises(ValueError, match="lynx_hare: observation 1 is real data"):
        lynx_hare().true_parameters(1)


@pytest.fixture(scope="module")
def solved():
    """Return prior draws and their log populations."""
    prior = as_prior(lynx_hare().prior)
    theta = prior.structured(prior.sample(jax.random.key(5), 2048))
    return theta, jax.jit(jax.vmap(model.solve))(theta)


def test_every_prior_draw_is_solved(solved):
    assert jnp.all(jnp.isfinite(solved[1]))


def test_solutions_are_exact(solved):
    theta, log_populations = solved
    rough = np.argsort(np.min(log_populations, axis=(1, 2)))  # deepest crashes first
    for row in (*rough[:3], *range(5)):
        one = {name: value[row] for name, value in theta.items()}
        np.testing.assert_allclose(log_populations[row], exact(one), atol=0.02, rtol=1e-3)
    np.testing.assert_allclose(model.solve(fitted()), exact(fitted()), atol=5e-4)


def test_prior_moments(solved):
    theta, _ = solved
    for names, (loc, scale) in {
        ("alpha", "gamma"): (1, 0.5),
        ("beta", "delta"): (0.05, 0.05),
    }.items():
        for name in names:
            law = stats.truncnorm(-loc / scale, np.inf, loc, scale)
            assert stats.kstest(np.asarray(theta[name], float), law.cdf).pvalue > 1e-3
    for name, loc in {"sigma": -1.0, "z0": np.log(10.0)}.items():
        assert stats.kstest(np.log(theta[name]).ravel() - loc, "norm").pvalue > 1e-3


def test_too_few_steps_give_nan():
    assert jnp.all(jnp.isnan(model.solve(fitted(), max_steps=8)))


def test_sixteen_steps_suffice_for_a_rough_solution():
    """With a loose tolerance and a larger step limit, the same call is finite."""
    assert jnp.all(jnp.isfinite(model.solve(fitted(), tolerance=1e-2, max_steps=64)))


def test_noise_is_log_normal():
    theta, keys = fitted(), jax.random.split(jax.random.key(1), 500)
    x = jax.jit(jax.vmap(lambda key: lynx_hare().simulator(key, theta)))(keys)
    z = np.asarray((x - model.solve(theta)[None]) / theta["sigma"][None, None], float)
    for species in range(2):
        assert stats.kstest(z[..., species].ravel(), "norm").pvalue > 1e-3


@pytest.mark.promotes
def test_numpyro_model_is_the_same_model():
    theta, x = fitted(), lynx_hare().observation(1)
    got, _ = numpyro.infer.util.log_density(model.numpyro_model, (x,), {}, theta)
    noise = stats.norm(exact(theta), np.asarray(theta["sigma"]))
    prior = as_prior(lynx_hare().prior)
    expected = prior.log_prob(prior.flatten(theta)) + noise.logpdf(np.asarray(x)).sum()
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def assert_published(draws, *, mean_within: float, sd_factor: float) -> None:
    for name, (mean, sd) in STAN.items():
        error = (np.mean(draws[name], axis=0) - np.array(mean)) / np.array(sd)
        assert np.all(np.abs(error) < mean_within), (name, error)
        ratio = np.std(draws[name], axis=0) / np.array(sd)
        assert np.all(np.abs(np.log(ratio)) < np.log(sd_factor)), (name, ratio)


@pytest.mark.promotes
@pytest.mark.release
def test_chains_start_near_the_posterior():
    x = lynx_hare().observation(1)
    starts, covariance = mcmc.starts(jax.random.key(0), model.numpyro_model, x)
    theta = {m: jnp.exp(v) for m, v in starts.items()}  # every parameter is positive
    assert_published(theta, mean_within=0.5, sd_factor=1.5)
    assert covariance.shape == (8, 8)


@pytest.mark.release
@pytest.mark.promotes
def test_nuts_finds_the_published_posterior():
    run = model.nuts(jax.random.key(0), lynx_hare().observation(1), warmup=80, draws=80)
    assert_published(run.get_samples(), mean_within=0.4, sd_factor=1.35)


@pytest.mark.release
@pytest.mark.promotes
def test_reference():
    prior, rows = as_prior(lynx_hare().prior), lynx_hare().reference(1, n=3000)
    assert rows.shape == (3000, 8)
    assert_published(prior.unflatten(rows), mean_within=0.15, sd_factor=1.15)


def test_nuts_checks_the_counts():
    with pytest.raises(ValueError, match=r"log_counts: expected shape \(21, 2\), got \(20, 2\)"):
        model.nuts(jax.random.key(0), jnp.zeros((20, 2)))
    with pytest.raises(ValueError, match="log_counts: expected finite values"):
        model.nuts(jax.random.key(0), jnp.full((21, 2), -jnp.inf))
