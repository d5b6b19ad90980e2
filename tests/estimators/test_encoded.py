"""A frozen network in front of an estimator: codes, posteriors, files, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from flax import nnx

import sbi_flows as sf
from sbi_flows.core.errors import ArtefactError, SbiFlowsWarning
from sbi_flows.densities.encoder import Encoder, encoded_rows
from tests.cases import unchecked

pytestmark = pytest.mark.filterwarnings("ignore:the validation loss still fell")

SIDE = 4
PRIOR = {"mean": dist.Normal(0.0, 1.0), "log_sd": dist.Uniform(-1.0, 1.0)}
BRIEF = sf.NPE(PRIOR, sf.MAF(), training=sf.Training(max_epochs=2), members=1)
THETA = jnp.array([0.2, 0.1])


def image(key, theta):
    return theta["mean"] + jnp.exp(theta["log_sd"]) * jax.random.normal(key, (SIDE, SIDE))


class Trained(nnx.Module):
    """A network with BatchNorm and an argument for the mask, as if trained elsewhere."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(SIDE * SIDE, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)

    def __call__(self, x, mask=None):
        lacking = 0.0 if mask is None else 0.1 * jnp.sum(~mask, axis=(1, 2))[:, None]
        return self.norm(self.layer(x.reshape(len(x), -1))) + lacking


def trained():
    network = Trained(nnx.Rngs(3))
    network.eval()
    return network


@pytest.fixture(scope="module")
def sims():
    return sf.simulate(jax.random.key(0), PRIOR, image, 300, progress=False)


@pytest.fixture(scope="module")
def network():
    return trained()


@pytest.fixture(scope="module")
def fitted(sims, network):
    return sf.Encoded(BRIEF, network).fit(jax.random.key(1), sims, progress=False)


def test_is_the_fit_to_the_codes(sims, network, fitted):
    codes = np.asarray(network(sims.x))
    coded = sf.Simulations(sims.theta, codes)
    plain, history = BRIEF.fit(jax.random.key(1), coded, progress=False)
    posterior, own = fitted
    np.testing.assert_allclose(own.validation_loss, history.validation_loss, rtol=1e-4)
    key = jax.random.key(2)
    for rows in (0, slice(0, 3)):
        expected = plain.sample(key, codes[rows], 20)
        np.testing.assert_allclose(posterior.sample(key, sims.x[rows], 20), expected, atol=1e-3)
    expected = plain.log_prob(THETA, codes[0])
    np.testing.assert_allclose(posterior.log_prob(THETA, sims.x[0]), expected, atol=1e-3)


def test_rows_are_encoded_in_order_whatever_their_number(network):
    x = np.asarray(jax.random.normal(jax.random.key(5), (300, SIDE, SIDE)))
    encoder = Encoder.of(network)
    for count in (1, 255, 256, 257, 300):
        codes = encoded_rows(encoder, x[:count], has_mask=False, progress=False)
        np.testing.assert_allclose(codes, network(x[:count]), atol=1e-5)


def test_later_changes_of_the_network_have_no_effect(sims):
    network = trained()
    encoder = Encoder.of(network)
    before = np.asarray(encoder(sims.x[:2]))
    network.layer.kernel[...] = jnp.zeros_like(network.layer.kernel[...])
    np.testing.assert_array_equal(encoder(sims.x[:2]), before)


def test_inside_jax(sims, fitted):
    posterior, x = fitted[0], sims.x[:3]

    def log_prob(posterior, x):
        return posterior.log_prob(THETA, x)

    expected = np.array([log_prob(posterior, row) for row in x])
    np.testing.assert_allclose(jax.jit(log_prob)(posterior, x[0]), expected[0], rtol=1e-4)
    every = jax.vmap(lambda row: log_prob(posterior, row))(x)
    np.testing.assert_allclose(every, expected, rtol=1e-4)
    slope = jax.grad(lambda row: log_prob(posterior, row))(x[0])
    step = jnp.full((SIDE, SIDE), 1e-2)
    ends = log_prob(posterior, x[0] + step) - log_prob(posterior, x[0] - step)
    np.testing.assert_allclose(jnp.sum(slope), ends / 2e-2, rtol=0.05)


def test_file(sims, network, fitted, tmp_path):
    posterior, path = fitted[0], tmp_path / "encoded.sbif"
    posterior.save(path)
    again = sf.load(path, network=trained())
    key = jax.random.key(2)
    expected = posterior.sample(key, sims.x[0], 20)
    np.testing.assert_array_equal(again.sample(key, sims.x[0], 20), expected)
    with pytest.raises(ArtefactError, match="load\\(path, network"):
        sf.load(path)
    other = Trained(nnx.Rngs(4))
    other.eval()
    with pytest.raises(ArtefactError, match="codes differ by"):
        sf.load(path, network=other)
    with pytest.raises(ArtefactError, match="expected codes"):
        sf.load(path, network=lambda x: x.reshape(len(x), -1))
    with pytest.warns(SbiFlowsWarning, match="300 of 300 rows were used"):
        sf.coverage(jax.random.key(4), again, simulations=sims, draws=20, progress=False)


@pytest.mark.slow
def test_files_of_networks_for_positive_or_whole_numbers(tmp_path):
    prior = {"rate": dist.Gamma(5.0, 1.0)}
    npe = dataclasses.replace(BRIEF, prior=sf.as_prior(prior))

    def counts(key, theta):
        return jax.random.poisson(key, theta["rate"], (SIDE,)) + 1

    def network(x):
        return jnp.log(x.astype(float)).mean(axis=1, keepdims=True) * jnp.array([[1.0, 1e6]])

    def other(x):
        return network(x) * jnp.array([[1.5, 1.0]])

    sims = sf.simulate(jax.random.key(0), prior, counts, 100, progress=False)
    posterior, _ = sf.Encoded(npe, network).fit(jax.random.key(1), sims, progress=False)
    posterior.save(tmp_path / "counts.sbif")
    again = sf.load(tmp_path / "counts.sbif", network=network)
    key, x = jax.random.key(2), sims.x[0]
    np.testing.assert_array_equal(again.sample(key, x, 5), posterior.sample(key, x, 5))
    with pytest.raises(ArtefactError, match="codes differ by"):
        sf.load(tmp_path / "counts.sbif", network=other)


def test_is_checked_and_corrected_with_observations_before_the_encoding(fitted, network, tmp_path):
    posterior = fitted[0]
    fresh = sf.simulate(jax.random.key(7), PRIOR, image, 200, progress=False)
    conformal = sf.conformal(jax.random.key(8), posterior, fresh)
    levels = conformal.credible_levels(jax.random.key(9), fresh.theta[:50], fresh.x[:50])
    assert levels.shape == (50,)
    conformal.save(tmp_path / "conformal.sbif")
    again = sf.load(tmp_path / "conformal.sbif", network=network)
    np.testing.assert_array_equal(again.scores, conformal.scores)
    assert posterior.misspecification(fresh.x[0] + 100.0).off[0].startswith("code[")
    data = posterior.to_arviz(jax.random.key(3), fresh.x[0], n=40, prior_draws=10)
    assert data["observed_data"]["x"].shape == (SIDE, SIDE)


def test_missing_entries_reach_the_network_as_a_mask(sims, network):
    hidden = sims.hide(jax.random.key(6), sf.RandomEntries(0.3))
    with pytest.raises(ValueError, match="expected an argument `mask`"):
        sf.Encoded(BRIEF, lambda x: x.reshape(len(x), -1)).fit(jax.random.key(1), hidden)
    posterior, _ = sf.Encoded(BRIEF, network).fit(jax.random.key(1), hidden, progress=False)
    x = sims.x[0].at[1, 2].set(jnp.nan)
    mask = ~jnp.isnan(x)
    code = network(jnp.where(mask, x, 0.0)[None], mask[None])[0]
    expected = posterior.posterior.log_prob(THETA, code)
    np.testing.assert_allclose(posterior.log_prob(THETA, x), expected, rtol=1e-4)


def test_what_is_refused(sims, fitted):
    with pytest.raises(ValueError, match="set BatchNorm and Dropout to evaluation"):
        sf.Encoded(BRIEF, Trained(nnx.Rngs(0))).fit(jax.random.key(1), sims, progress=False)
    with pytest.raises(ValueError, match="codes of shape"):
        sf.Encoded(BRIEF, lambda x: x.mean(axis=(1, 2))).fit(jax.random.key(1), sims)
    with pytest.raises(ValueError, match="finite codes, got"):
        sf.Encoded(BRIEF, lambda x: jnp.log(x[:, 0])).fit(jax.random.key(1), sims, progress=False)
    with pytest.raises(ValueError, match="expected a trained flax"):
        unchecked(sf.Encoded, BRIEF, Trained)
    pattern = dataclasses.replace(BRIEF, missing=sf.RandomEntries(0.2))
    for estimator in (pattern, sf.Stack((pattern, pattern))):
        with pytest.raises(ValueError, match="hide entries of the simulations before"):
            sf.Encoded(estimator, trained())
    with pytest.raises(ValueError, match="expected an estimator"):
        unchecked(sf.Encoded, THETA, trained())
    with pytest.raises(ValueError, match="expected shape"):
        fitted[0].sample(jax.random.key(2), jnp.zeros(SIDE), 5)
    with pytest.raises(ValueError, match="got NaN"):
        fitted[0].sample(jax.random.key(2), jnp.full((SIDE, SIDE), jnp.nan), 5)


def test_failed_rows_and_rows_on_disk(sims, network, tmp_path):
    np.save(tmp_path / "x.npy", np.asarray(sims.x).astype(np.float32))
    lazy = np.load(tmp_path / "x.npy", mmap_mode="r")
    valid = np.arange(300) % 7 != 0
    fits = []
    for x in (lazy, sims.x):
        given = sf.Simulations(sims.theta, x, valid=valid)
        fits.append(sf.Encoded(BRIEF, network).fit(jax.random.key(1), given, progress=False))
    losses = [history.validation_loss for _, history in fits]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_dropout_in_training_is_found(sims):
    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(x[:, 0])

    network = Dropping(nnx.Rngs(0))
    with pytest.raises(ValueError, match="set BatchNorm and Dropout to evaluation"):
        sf.Encoded(BRIEF, network).fit(jax.random.key(1), sims, progress=False)
    network.eval()
    posterior, _ = sf.Encoded(BRIEF, network).fit(jax.random.key(1), sims, progress=False)
    assert posterior.sample(jax.random.key(2), sims.x[0], 3).shape == (3, 2)


def test_columns_of_tables_are_matched_by_name():
    prior = {"mean": dist.Normal(0.0, 1.0)}
    npe = dataclasses.replace(BRIEF, prior=sf.as_prior(prior))
    theta = np.asarray(jax.random.normal(jax.random.key(0), (100, 1)))
    x = pd.DataFrame({"near": theta[:, 0] + 0.1, "far": 100.0 + theta[:, 0] ** 2})
    given = sf.Simulations(theta, x)
    posterior, _ = sf.Encoded(npe, lambda x: x).fit(jax.random.key(1), given, progress=False)
    key, row = jax.random.key(2), x.iloc[:1]
    expected = posterior.sample(key, row, 5)
    np.testing.assert_array_equal(posterior.sample(key, row[["far", "near"]], 5), expected)


def test_numbers_that_the_network_would_round_are_refused():
    dates = 2459000.5 + np.linspace(0.0, 0.1, 300 * SIDE).reshape(300, SIDE)
    given = sf.Simulations(np.zeros((300, 2)), dates)
    with pytest.raises(ValueError, match="single precision holds"):
        sf.Encoded(BRIEF, lambda x: x).fit(jax.random.key(1), given)


def test_a_stack_can_be_encoded(sims, network):
    mixture = dataclasses.replace(BRIEF, density=sf.GaussianMixture())
    stack = sf.Stack((BRIEF, mixture))
    posterior, _ = sf.Encoded(stack, network).fit(jax.random.key(1), sims, progress=False)
    assert posterior.sample(jax.random.key(2), sims.x[0], 7).shape == (7, 2)
