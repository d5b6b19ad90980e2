"""Draws given several independent observations, beside their exact posterior."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.stats import truncnorm

import sbi_flows as sf
from tests.artefacts import ensemble, posterior

pytestmark = pytest.mark.promotes

NOISE = 0.5
FLOW = sf.Diffusion(network=sf.Film(width=32, blocks=1, dropout=0.0))
PRIORS = {
    "normal": dist.Normal(0.0, 1.0).expand([2]).to_event(1),
    "box": dist.Uniform(-1.0, 1.0).expand([2]).to_event(1),
}


def noisy(key, theta):
    return theta + NOISE * jax.random.normal(key, theta.shape)


def folded(key, theta):
    return jnp.abs(theta) + NOISE * jax.random.normal(key, theta.shape)


def fitted(prior, simulator, flow=FLOW, *, members=1, epochs=1):
    training = sf.Training(max_epochs=epochs, patience=epochs, ema_decay=0.98)
    npe = sf.NPE(prior, flow, training=training, members=members)
    sims = sf.simulate(jax.random.key(0), prior, simulator, 2_000, progress=False)
    return npe.fit(jax.random.key(1), sims, progress=False)[0]


def exact(name, x):
    """Means and standard deviations of the posterior given all of x (N, 2)."""
    mean, scale = x.mean(axis=0), NOISE / math.sqrt(len(x))
    if name == "box":
        found = truncnorm((-1 - mean) / scale, (1 - mean) / scale, mean, scale)
        return found.mean(), found.std()
    precision = 1 + scale**-2
    return mean * scale**-2 / precision, np.full(2, precision**-0.5)


@pytest.fixture(scope="module")
def boxed():
    return fitted(PRIORS["box"], noisy)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["normal", "box"])
def test_composed_draws_are_those_of_the_posterior_given_all(name, boxed):
    fit = boxed if name == "box" else fitted(PRIORS[name], noisy)
    # one of the parameters presses on a face of the box
    x = np.array([0.9, -0.3]) + NOISE * np.random.default_rng(0).normal(size=(5, 2))
    draws = np.asarray(sf.sample_composed(jax.random.key(2), fit, x, 3_000))
    mean, sd = exact(name, x)
    assert draws.shape == (3_000, 2)
    assert name == "normal" or np.all(np.abs(draws) <= 1.0)
    np.testing.assert_allclose((draws.mean(axis=0) - mean) / sd, 0.0, atol=0.25)
    np.testing.assert_allclose(draws.std(axis=0) / sd, 1.0, atol=0.12)
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.08


@pytest.mark.slow
def test_both_modes_are_drawn_and_narrow_with_each_observation():
    prior = dist.Normal(0.0, 1.0).expand([1])
    two_sided = fitted(prior, folded, members=2, epochs=40)
    x = np.array([[1.3], [0.8], [1.1], [1.6]])
    draws = np.asarray(sf.sample_composed(jax.random.key(2), two_sided, x, 4_000))[:, 0]
    grid = np.linspace(-4, 4, 4_001)
    misfit = np.sum((x - np.abs(grid)) ** 2, axis=0) / NOISE**2
    mass = np.exp(-0.5 * (misfit + grid**2))
    mean, square = (np.sum(mass * np.abs(grid) ** k) / mass.sum() for k in (1, 2))
    sd = math.sqrt(square - mean**2)
    assert np.mean(draws > 0) == pytest.approx(0.5, abs=0.2)
    assert np.abs(draws).mean() == pytest.approx(mean, abs=0.5 * sd)
    assert np.abs(draws).std() == pytest.approx(sd, rel=0.3)
    # a single observation leaves much more
    alone = np.asarray(two_sided.sample(jax.random.key(3), x[2], 2_000))
    assert np.abs(alone).std() > 1.5 * sd


@pytest.mark.slow
def test_the_same_key_gives_the_same_draws_as_many_as_asked_for(boxed):
    x = np.array([[0.3, 0.1], [0.8, 0.0]])

    def draws(key):
        return sf.sample_composed(jax.random.key(key), boxed, x, 7, levels=8, steps=1)

    first, again, other = draws(2), draws(2), draws(3)
    assert first.shape == (7, 2)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.slow
def test_what_cannot_be_composed_is_refused(boxed):
    with pytest.raises(
        ValueError, match=r"x: expected a set of observations \(N, \*event\), got one"
    ):
        sf.sample_composed(jax.random.key(0), boxed, np.ones(2), 5)
    with pytest.raises(ValueError, match="levels: expected a whole number of at least 1, got 0"):
        sf.sample_composed(jax.random.key(0), boxed, np.ones((2, 2)), 5, levels=0)
    small = sf.MAF(transforms=1, hidden=(8,))
    spline = fitted(PRIORS["normal"], noisy, small)
    with pytest.raises(ValueError, match=r"posterior of sf\.FlowMatching .*, got MAF"):
        sf.sample_composed(jax.random.key(0), spline, np.ones((2, 2)), 5)


def unfitted() -> sf.posteriors.ComposedPosterior:
    """Sets of two-dimensional observations, by networks of random weights."""
    flow = sf.Diffusion(
        network=sf.Film(width=6, blocks=1, frequencies=2), solver=sf.Solver(steps=3)
    )
    prior = sf.as_prior(PRIORS["box"])
    return sf.composed(posterior(prior, ensemble(flow, prior.bounded)), levels=3, steps=2)


SETS = jnp.linspace(-1.0, 1.0, 12).reshape(2, 2, 3)
"""Two sets of two observations of length 3."""


@pytest.mark.slow
def test_sets_come_alone_or_in_batches():
    made, key = unfitted(), jax.random.key(0)
    assert made.is_single(SETS[0])
    assert not made.is_single(SETS)
    draws, log_prob = made.sample_and_log_prob(key, SETS, 4)
    assert (draws.shape, log_prob.shape) == ((2, 4, 2), (2, 4))
    alone = made.sample(key, SETS[0], 4)
    np.testing.assert_array_equal(
        alone, sf.sample_composed(key, made.posterior, SETS[0], 4, levels=3, steps=2)
    )
    with pytest.raises(ValueError, match="x: expected a set of observations"):
        made.sample(key, SETS[0, 0], 4)


def test_its_density_is_the_product_over_the_prior():
    made, theta = unfitted(), jnp.array([[0.2, -0.4], [2.0, 0.0]])
    each = jnp.stack([made.posterior.log_prob(theta, x) for x in SETS[0]])
    expected = each.sum(axis=0) - made.prior.log_prob(theta)
    together = made.log_prob(theta, SETS[0])
    np.testing.assert_allclose(together[0], expected[0], rtol=1e-4)
    assert np.isneginf(together[1])


@pytest.mark.slow
def test_it_is_saved_and_loaded(tmp_path):
    made, key = unfitted(), jax.random.key(0)
    made.save(tmp_path / "sets.sbif")
    again = sf.load(tmp_path / "sets.sbif")
    assert isinstance(again, sf.posteriors.ComposedPosterior)
    assert (again.levels, again.steps) == (3, 2)
    np.testing.assert_array_equal(again.sample(key, SETS[0], 4), made.sample(key, SETS[0], 4))


@pytest.mark.slow
def test_it_is_checked_on_sets_and_gated(boxed):
    made = sf.composed(boxed, levels=32, steps=2)

    def simulate_set(key, theta):
        return jax.vmap(lambda k: noisy(k, theta))(jax.random.split(key, 3))

    report = sf.check(
        jax.random.key(2), made, simulate_set, datasets=100, draws=100, progress=False
    )
    assert report.num_datasets == 100
    assert report.sharpness.contraction.min() > 0.3
    with pytest.warns(sf.SbiFlowsWarning, match=r"x\[1\]: not typical"):
        made.sample(jax.random.key(3), jnp.array([[0.1, 0.2], [30.0, 0.0]]), 3)
    found = made.misspecification(jnp.array([[0.1, 0.2], [30.0, 0.0]]))
    np.testing.assert_array_equal(found.flagged(), [False, True])
