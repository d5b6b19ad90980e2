"""Posteriors under a prior with a condition: no draw and no density where it is violated."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.posteriors import mixtures
from tests.artefacts import ensemble, posterior

# distrax promotes ranks in mixtures
pytestmark = pytest.mark.promotes

KEY = jax.random.key(0)
X = jnp.array([0.3, 1.2, -0.7])
GRID = (np.arange(100) + 0.5) / 100
POINTS = np.stack(np.meshgrid(GRID, GRID, indexing="ij"), axis=-1).reshape(-1, 2)


def rising(theta):
    return theta["a"] < theta["b"]


def made(condition=rising, density=None) -> sf.Posterior:
    side = dist.Uniform(0.0, 1.0)
    prior = sf.constrained({"a": side, "b": side}, condition)
    density = density or sf.GaussianMixture(components=2, width=4, blocks=1)
    return posterior(prior, ensemble(density, prior.bounded))


@pytest.fixture(scope="module")
def triangle() -> sf.Posterior:
    return made()


def test_no_draw_is_outside_and_the_density_is_normalised(triangle):
    at = triangle.at(X)
    draws, log_prob = at.sample_and_log_prob(KEY, 2000)
    assert np.all(draws[:, 0] < draws[:, 1])
    np.testing.assert_allclose(log_prob, at.log_prob(draws), atol=1e-2)
    density = np.exp(at.log_prob(POINTS))
    np.testing.assert_array_equal(density[POINTS[:, 0] >= POINTS[:, 1]], 0.0)
    assert np.mean(density) == pytest.approx(1.0, abs=0.03)
    # draws follow the density
    mean = density @ POINTS / np.sum(density)
    np.testing.assert_allclose(np.mean(draws, axis=0), mean, atol=0.02)
    mode = at.map(starts=50, steps=20)
    assert mode[0] < mode[1]


@pytest.mark.slow
def test_batches_and_transformations(triangle):
    batch = jnp.stack([X, -X, 2 * X])
    draws = triangle.sample(KEY, batch, 50)
    assert draws.shape == (3, 50, 2) and np.all(draws[..., 0] < draws[..., 1])
    at = triangle.at(X)
    compiled = jax.jit(at.sample, static_argnums=1)(KEY, 20)
    np.testing.assert_allclose(compiled, at.sample(KEY, 20), atol=1e-5)
    jitted = jax.jit(lambda t: triangle.log_prob(t, X))(draws[0])
    np.testing.assert_allclose(jitted, triangle.log_prob(draws[0], X), rtol=1e-4)


def test_draws_that_are_never_accepted_are_said(triangle, monkeypatch):
    monkeypatch.setattr(mixtures, "MAX_ROUNDS", 0)
    at = triangle.at(X)
    assert np.all(np.isnan(jax.jit(at.sample, static_argnums=1)(KEY, 51)))
    with pytest.raises(
        sf.errors.SbiFlowsError, match="draws to meet the prior's condition, got fewer"
    ):
        at.sample(KEY, 51)


def test_the_prior_is_given_again_when_a_posterior_is_loaded(triangle, tmp_path):
    path = tmp_path / "triangle.sbif"
    triangle.save(path)
    again = sf.load(path, prior=triangle.prior)
    np.testing.assert_array_equal(again.sample(KEY, X, 5), triangle.sample(KEY, X, 5))
    other = sf.constrained(triangle.prior.base, lambda theta: theta["a"] < 0.5 * theta["b"])
    for prior, message in {
        None: r"its condition is a function\): load\(path, prior=...\) takes it",
        triangle.prior.base: "with a condition, got Prior",
        other: r"expected a condition of probability 0.499, .* got 0\.\d+ in ",
    }.items():
        with pytest.raises(sf.errors.ArtefactError, match=message):
            sf.load(path, prior=prior)


def test_methods_that_move_draws_refuse_a_condition():
    flow = made(density=sf.Diffusion(network=sf.Film(width=8, blocks=1)))
    with pytest.raises(ValueError, match=r"prior without a condition, .* embedding of sets"):
        sf.composed(flow)
    sims = sf.Simulations(np.full((60, 2), 0.5, np.float32), np.zeros((60, 3), np.float32))
    with pytest.raises(ValueError, match=r"prior without a condition, .* sf\.conformal"):
        sf.recalibrate(KEY, flow, sims)
