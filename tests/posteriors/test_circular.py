"""Posteriors of circular parameters: the seam, transformations, the mode, files, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.scipy.special import i0e

import sbi_flows as sf
from sbi_flows.prior.site_prior import SitePrior
from tests.artefacts import bits, ensemble, opened, written
from tests.artefacts import posterior as random_posterior

pytestmark = pytest.mark.promotes

SMALL = sf.MAF(transforms=1, hidden=(8,), context_width=8, context_blocks=1)
PRIOR = {"angle": sf.Circular(), "level": dist.Normal(0.0, 1.0)}
NOISE = 0.3


def simulated(prior, n, key=0):
    """Return n simulations of cosine and sine of the angle, and the level, with noise."""
    theta = np.asarray(sf.as_prior(prior).sample(jax.random.key(key), n))
    clean = [np.cos(theta[:, 0]), np.sin(theta[:, 0]), *theta[:, 1:].T]
    noise = NOISE * np.random.default_rng(key).normal(size=(n, len(clean)))
    return sf.Simulations(theta, np.stack(clean, axis=1) + noise)


def fitted(density, prior, n=2000, **settings):
    return sf.NPE(prior, density=density, **settings).fit(jax.random.key(1), simulated(prior, n))[0]


@pytest.fixture(scope="module")
def posterior():
    return fitted(SMALL, PRIOR, members=1, training=sf.Training(max_epochs=3))


X = jnp.array([-1.0, 0.02, 0.5])
"""Observation of an angle at the seam."""


def test_the_mode_lies_across_the_seam(posterior):
    draws = posterior.sample(jax.random.key(2), X, 4000)
    assert np.all(np.abs(draws[:, 0]) <= np.pi)
    # kappa = |x| / noise^2; without a circular coordinate the draws would be spread
    mean = np.mean(np.exp(1j * np.asarray(draws[:, 0])))
    kappa = 1.0 / NOISE**2
    assert abs(np.abs(mean) - (1.0 - 0.5 / kappa)) < 0.03
    assert abs(np.angle(-mean)) < 0.1
    sides = np.mean(draws[:, 0] > 0)
    assert 0.3 < sides < 0.7
    ends = jnp.array([[-np.pi + 1e-4, 0.5], [np.pi - 1e-4, 0.5]])
    below, above = posterior.log_prob(ends, X)
    assert abs(below - above) < 0.01
    assert np.isneginf(posterior.log_prob(jnp.array([np.pi + 0.1, 0.5]), X))


def test_draws_and_densities_agree_and_the_density_integrates_to_one(posterior):
    draws, scores = posterior.sample_and_log_prob(jax.random.key(3), X, 500)
    np.testing.assert_allclose(posterior.log_prob(draws, X), scores, atol=5e-3)
    a, b = np.linspace(-np.pi, np.pi, 201), np.linspace(-4.0, 4.0, 201)
    middle = [(e[1:] + e[:-1]) / 2 for e in (a, b)]
    grid = np.stack(np.meshgrid(*middle, indexing="ij"), axis=-1).reshape(-1, 2)
    total = np.sum(np.exp(posterior.log_prob(grid, X))) * (a[1] - a[0]) * (b[1] - b[0])
    assert abs(total - 1.0) < 0.01


def test_jit_grad_and_vmap_of_a_bound_posterior(posterior):
    theta = jnp.array([[3.1, 0.4], [-3.1, 0.4]])
    plain = posterior.log_prob(theta, X)
    bound = jax.jit(lambda post, x: post.at(x).log_prob(theta))(posterior, X)
    np.testing.assert_allclose(bound, plain, rtol=1e-5)
    rows = jax.vmap(lambda t: posterior.at(X).log_prob(t))(theta)
    np.testing.assert_allclose(rows, plain, rtol=1e-5, atol=1e-5)
    step = 1e-2
    slope = jax.grad(lambda a: posterior.at(X).log_prob(jnp.array([a, 0.4])))(2.8)
    ends = [posterior.log_prob(jnp.array([2.8 + s, 0.4]), X) for s in (step, -step)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=0.02, atol=0.02)
    of_x = jax.grad(lambda x: posterior.at(x).log_prob(theta[0]))(X)
    assert np.all(np.isfinite(of_x)) and np.max(np.abs(of_x)) > 0.1


@pytest.mark.slow
def test_the_mode_is_found_at_the_seam(posterior):
    mode = posterior.map(X)
    assert np.pi - abs(float(mode[0])) < 0.15
    draws = posterior.sample(jax.random.key(4), X, 1000)
    assert posterior.log_prob(mode, X) >= np.max(posterior.log_prob(draws, X)) - 0.05


def test_the_posterior_is_a_numpyro_distribution(posterior):
    made = posterior.at(X).to_numpyro()
    theta = posterior.sample(jax.random.key(5), X, 3)
    np.testing.assert_allclose(made.log_prob(theta), posterior.log_prob(theta, X), rtol=1e-5)


def test_save_and_load_keep_all_bits(posterior, tmp_path):
    path = tmp_path / "angle.sbif"
    posterior.save(path)
    again = sf.load(path)
    assert again.prior.circular == (True, False)
    keys = jax.random.key(6), X, 10
    assert bits(again.sample(*keys)) == bits(posterior.sample(*keys))
    document, tensors = opened(path)
    assert document["prior"]["circular"] == [True, False]
    for flags in ([False, False], [True], "all", [1, 0]):
        changed = document | {"prior": document["prior"] | {"circular": flags}}
        with pytest.raises(sf.ArtefactError, match=r"prior\.circular"):
            sf.load(written(tmp_path / "other.sbif", changed, tensors))
    del document["prior"]["circular"]
    with pytest.raises(sf.ArtefactError):
        sf.load(written(tmp_path / "other.sbif", document, tensors))


def test_a_file_from_before_circular_parameters_loads(tmp_path):
    prior = SitePrior({"angle": dist.VonMises(0.0, 1.0)}, is_named=True, has_circular_maps=False)
    made = random_posterior(prior, ensemble(SMALL, prior.bounded))
    path = tmp_path / "old.sbif"
    made.save(path)
    assert "circular" not in opened(path)[0]["prior"]
    again = sf.load(path)
    assert (again.prior.circular, again.prior.bounded) == ((), (False,))
    keys = jax.random.key(8), X, 10
    assert bits(again.sample(*keys)) == bits(made.sample(*keys))


@pytest.mark.slow
def test_double_precision():
    with jax.enable_x64(True):
        prior = sf.as_prior(PRIOR)
        made = random_posterior(prior, ensemble(SMALL, prior.bounded, circular=prior.circular))
        draws, scores = made.sample_and_log_prob(jax.random.key(7), X, 200)
        assert draws.dtype == scores.dtype == jnp.float64
        np.testing.assert_allclose(made.log_prob(draws, X), scores, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("density", [sf.NSF(), sf.MAF()], ids=["NSF", "MAF"])
def test_the_posterior_of_an_angle_at_the_seam_is_exact(density):
    """The exact posterior is a von Mises distribution; the L1 distance is at most 2."""
    made = fitted(density, sf.Circular(), 10_000, members=2)
    edges = np.linspace(-np.pi, np.pi, 1001)
    grid = (edges[1:] + edges[:-1]) / 2
    distances = []
    for x in ([-1.0, 0.1], [-0.9, -0.2], [-1.1, 0.3]):
        kappa, direction = np.hypot(*x) / NOISE**2, np.arctan2(x[1], x[0])
        exact = np.exp(kappa * (np.cos(grid - direction) - 1)) / (2 * np.pi * i0e(kappa))
        estimate = np.exp(made.log_prob(grid[:, None], np.array(x)))
        distances.append(np.sum(np.abs(estimate - exact)) * (edges[1] - edges[0]))
    assert np.mean(distances) < 0.05
