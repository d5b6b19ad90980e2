"""Neural posterior estimation recovers known posteriors, from simulations of every kind."""

import dataclasses
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from scipy import stats

import sbi_flows as sf
from sbi_flows.core.errors import SimulationFailed, TrainingDiverged
from sbi_flows.networks import ResidualMLP
from tests import cases

pytestmark = pytest.mark.promotes

MIXING = np.array([[1.0, 0.6], [0.0, 1.0], [0.5, -0.5]])
NOISE = 0.5
GAUSSIAN = sf.as_prior(dist.Normal(0.0, 1.0).expand([2]))
QUICK = sf.Training(max_epochs=3)
TINY = sf.MAF(transforms=1, hidden=(8,), context_width=0)

# numpyro promotes ranks in the densities of array-valued sites
promotes = pytest.mark.promotes


def linear(key, theta):
    return jnp.asarray(MIXING, jnp.float32) @ theta + NOISE * jax.random.normal(key, (3,))


def conjugate(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the exact posterior of `linear`."""
    covariance = np.linalg.inv(np.eye(2) + MIXING.T @ MIXING / NOISE**2)
    return covariance @ MIXING.T @ x / NOISE**2, covariance


@pytest.fixture(scope="module")
def simulations():
    return sf.simulate(jax.random.key(0), GAUSSIAN, linear, 2000)


@pytest.fixture(scope="module")
def fitted(simulations):
    """One quick fit of the smallest flow."""
    estimator = sf.NPE(GAUSSIAN, TINY, training=QUICK, members=2)
    return estimator.fit(jax.random.key(1), simulations, progress=False)


MARKS = {
    "MAF": [pytest.mark.newest],
    "NSF without trunk": [pytest.mark.slow],
    "mixture": [pytest.mark.slow],
    "coupling MAF": [pytest.mark.slow],
    "coupling NSF": [pytest.mark.slow],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS.get(name, [])) for name in cases.DENSITIES]
)
def test_a_conjugate_gaussian_posterior_is_recovered(name, simulations):
    estimator = sf.NPE(GAUSSIAN, cases.DENSITIES[name], training=QUICK, members=2)
    posterior, _ = estimator.fit(jax.random.key(1), simulations, progress=False)
    x = np.array([0.2, -0.7, 0.6], np.float32)
    mean, covariance = conjugate(x)
    sd = np.sqrt(np.diag(covariance))
    draws = np.asarray(posterior.sample(jax.random.key(2), x, 4000))
    assert draws.shape == (4000, 2)
    np.testing.assert_array_less(np.abs(draws.mean(axis=0) - mean) / sd, 0.15)
    np.testing.assert_allclose(draws.std(axis=0) / sd, 1.0, atol=0.1)
    correlation = covariance[0, 1] / sd.prod()
    assert abs(np.corrcoef(draws.T)[0, 1] - correlation) < 0.07
    # the Kullback-Leibler divergence from the exact posterior
    exact = stats.multivariate_normal(mean, covariance)
    theta = exact.rvs(4000, random_state=0)
    divergence = np.mean(exact.logpdf(theta) - np.asarray(posterior.log_prob(theta, x)))
    assert -0.02 < divergence < 0.04
    # the same programs learn what the start cannot: a spread that depends on the observation
    x = np.asarray(simulations.x)
    noise = np.random.default_rng(1).normal(size=(len(x), 2))
    uneven = sf.Simulations(np.exp(x[:, :2]) * noise, x)
    _, history = estimator.fit(jax.random.key(2), uneven, progress=False)
    assert np.all(history.best_loss < history.start_loss - 0.1)


def squared(key, theta):
    return theta**2 + 0.05 * jax.random.normal(key)


@pytest.mark.slow
def test_training_finds_two_modes_that_the_start_cannot():
    prior = sf.as_prior(dist.Uniform(-1.0, 1.0))
    sims = sf.simulate(jax.random.key(0), prior, squared, 2000)
    training = sf.Training(max_epochs=40, learning_rate=5e-3)
    estimator = sf.NPE(prior, cases.DENSITIES["NSF"], training=training, members=1)
    posterior, history = estimator.fit(jax.random.key(1), sims, progress=False)
    assert history.start_loss[0] == pytest.approx(np.log(2), abs=0.05)
    assert history.best_loss[0] < history.start_loss[0] - 0.6
    draws = np.asarray(posterior.sample(jax.random.key(2), jnp.float32(0.36), 4000))[:, 0]
    assert 0.4 < np.mean(draws > 0) < 0.6
    assert np.mean(np.abs(np.abs(draws) - 0.6) < 0.15) > 0.85


NAMED = sf.as_prior(
    {"rate": dist.LogNormal(1.0, 0.5), "place": dist.Uniform(0.0, 100.0).expand([2])}
)


def survey(key, theta):
    """Counts, a constant, heavy tails and integers beside real numbers."""
    first, second, third = jax.random.split(key, 3)
    return {
        "counts": jax.random.poisson(first, theta["rate"], (4,)),
        "constant": jnp.ones(2),
        "seen": theta["place"] + 5 * jax.random.normal(second, (2,)),
        "outlier": jax.random.cauchy(third) * 1e3,
    }


@pytest.fixture(scope="module")
def named():
    """A fit with a dict prior, partly bounded, and a dict of observations."""
    with jax.numpy_rank_promotion("allow"):
        sims = sf.simulate(jax.random.key(0), NAMED, survey, 2000)
        estimator = sf.NPE(NAMED, TINY, training=QUICK, members=1)
        return *estimator.fit(jax.random.key(1), sims, progress=False), sims


@promotes
def test_named_parameters_from_named_observations(named):
    posterior, _, _ = named
    fresh = sf.simulate(jax.random.key(5), NAMED, survey, 500)
    draws = posterior.sample(jax.random.key(6), fresh.x, 200)
    assert draws.shape == (500, 200, 3)
    assert np.all(NAMED.contains(draws))
    # exact for the places away from the faces: a standard deviation of 5
    middle = np.all((fresh.theta[:, 1:] > 20) & (fresh.theta[:, 1:] < 80), axis=1)
    np.testing.assert_allclose(np.std(draws[middle], axis=1)[:, 1:].mean(axis=0), 5.0, rtol=0.15)
    error = np.mean(draws, axis=1)[:, 1:] - fresh.theta[:, 1:]
    np.testing.assert_allclose(np.std(error, axis=0), 4.8, rtol=0.15)


@promotes
def test_losses_are_in_the_units_of_the_parameters(named):
    """Were the Jacobian of the box left out, they would be off by 2 log(100 / sqrt 12)."""
    posterior, history, _ = named
    fresh = sf.simulate(jax.random.key(7), NAMED, survey, 2000)
    loss = -float(np.mean(posterior.log_prob(fresh.theta, fresh.x)))
    assert history.best_loss[0] == pytest.approx(loss, abs=0.4)
    assert history.train_loss[-1, 0] == pytest.approx(loss, abs=0.4)
    assert loss < -np.mean(NAMED.log_prob(fresh.theta)) - 3


@promotes
def test_constant_and_heavy_tailed_features_do_no_harm(named):
    posterior, _, sims = named
    x = jax.tree.map(lambda leaf: leaf[0], sims.x)
    for strange in ({"outlier": jnp.float32(1e9)}, {"constant": jnp.full(2, 50.0)}):
        (name,) = strange
        with pytest.warns(sf.SbiFlowsWarning, match=rf"not typical .*: {name}"):
            draws, log_prob = posterior.sample_and_log_prob(jax.random.key(3), x | strange, 100)
        assert np.all(np.isfinite(draws))
        assert np.all(np.isfinite(log_prob))


def test_the_same_key_gives_the_same_posterior_and_failed_rows_are_left_out(fitted, simulations):
    posterior, history = fitted
    rng = np.random.default_rng(0)
    order = np.sort(rng.permutation(2100)[:2000])
    theta, x = np.zeros((2100, 2), np.float32), np.full((2100, 3), np.nan, np.float32)
    theta[order], x[order] = simulations.theta, simulations.x
    with_failures = sf.Simulations(theta, x)
    assert with_failures.num_valid == 2000
    estimator = sf.NPE(GAUSSIAN, TINY, training=QUICK, members=2)
    again, again_history = estimator.fit(jax.random.key(1), with_failures, progress=False)
    np.testing.assert_array_equal(history.validation_loss, again_history.validation_loss)
    pairs = zip(jax.tree.leaves(posterior.weights), jax.tree.leaves(again.weights), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_integer_observations(simulations):
    """As good as the rounded numbers allow; the observation may be of any numeric type."""
    rounded = sf.Simulations(simulations.theta, np.round(4 * simulations.x).astype(np.int32))
    estimator = sf.NPE(GAUSSIAN, TINY, training=QUICK, members=2)
    posterior, _ = estimator.fit(jax.random.key(1), rounded, progress=False)
    x = np.array([0.25, -0.75, 0.5])
    mean, covariance = conjugate(x)
    for given in ((4 * x).astype(int), jnp.asarray(4 * x)):
        draws = np.asarray(posterior.sample(jax.random.key(2), given, 2000))
        sd = np.sqrt(np.diag(covariance))
        np.testing.assert_array_less(np.abs(draws.mean(axis=0) - mean) / sd, 0.25)
        np.testing.assert_allclose(draws.std(axis=0) / sd, 1.05, atol=0.15)


class RowMeans(nnx.Module):
    """An embedding of the user's own, for images of 3 x 4, that takes no key."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        assert x.shape[1:] == (3, 4)
        return self.linear(jnp.mean(x, axis=2))


@pytest.mark.slow
def test_a_factory_embeds_images_and_each_member_has_its_own(simulations):
    images = jnp.repeat(simulations.x[:, :, None], 4, axis=2)
    estimator = sf.NPE(GAUSSIAN, TINY, training=QUICK, members=2, embedding=RowMeans)
    sims = sf.Simulations(simulations.theta, images)
    posterior, _ = estimator.fit(jax.random.key(1), sims, progress=False)
    kernel = np.asarray(posterior.weights[0].params["embedding"]["linear"]["kernel"])
    assert kernel.shape == (2, 3, 2)
    assert np.max(np.abs(kernel[0] - kernel[1])) > 0.1
    assert posterior.sample(jax.random.key(2), images[:5], 10).shape == (5, 10, 2)
    with pytest.raises(ValueError, match=r"x: expected shape \(3, 4\), .* got \(3,\)"):
        posterior.sample(jax.random.key(2), images[0, :, 0], 10)


def test_a_module_as_embedding_is_trained_and_stays_as_it_was(simulations):
    module = ResidualMLP(3, 4, width=8, blocks=1, dropout=0.1, rngs=nnx.Rngs(0))
    before = np.asarray(module.enter.kernel[...])
    # members start from the module's weights: only the order of the data tells them apart
    training = sf.Training(max_epochs=3, learning_rate=1e-2)
    estimator = sf.NPE(GAUSSIAN, TINY, training=training, members=2, embedding=module)
    posterior, history = estimator.fit(jax.random.key(1), simulations, progress=False)
    np.testing.assert_array_equal(module.enter.kernel[...], before)
    assert np.any(history.best_epoch > 0)
    trained = np.asarray(posterior.weights[0].params["embedding"]["enter"]["kernel"])
    member = int(np.argmax(history.best_epoch))
    assert 1e-4 < np.max(np.abs(trained[member] - before)) < 1.0
    # weights that were set since then are those that the next fit begins with
    module.enter.kernel[...] = before + 10.0
    posterior, _ = estimator.fit(jax.random.key(1), simulations, progress=False)
    trained = np.asarray(posterior.weights[0].params["embedding"]["enter"]["kernel"])
    assert np.max(np.abs(trained - before - 10.0)) < 1.0
    module.enter.kernel[...] = before
    draws = posterior.sample(jax.random.key(2), jnp.zeros(3), 1000)
    sd = np.sqrt(np.diag(conjugate(np.zeros(3))[1]))
    np.testing.assert_allclose(np.std(draws, axis=0) / sd, 1.0, atol=0.15)


class Scalar(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)[:, 0]


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (Scalar, r"embedding: expected output \(B, F\), got \(2,\) for B = 2"),
        (lambda rngs: jnp.tanh, "embedding: expected a flax nnx.Module, got"),
    ],
)
def test_what_is_no_embedding_is_refused(embedding, message, simulations):
    estimator = sf.NPE(GAUSSIAN, TINY, training=QUICK, embedding=embedding)
    with pytest.raises(ValueError, match=message):
        estimator.fit(jax.random.key(1), simulations, progress=False)


@pytest.mark.slow
def test_a_fit_that_diverges_leaves_a_posterior_that_works(simulations):
    optimizer = optax.scale_by_schedule(lambda step: jnp.where(step < 10, -1e-2, jnp.nan))
    # 1800 rows are 7 steps an epoch
    training = sf.Training(batch_size=256, max_epochs=3, optimizer=optimizer)
    estimator = sf.NPE(GAUSSIAN, TINY, training=training, members=2)
    with pytest.raises(TrainingDiverged, match="not finite in epoch 2") as caught:
        estimator.fit(jax.random.key(1), simulations, progress=False)
    posterior = caught.value.state
    assert isinstance(posterior, sf.Posterior)
    draws, log_prob = posterior.sample_and_log_prob(jax.random.key(2), jnp.zeros(3), 100)
    assert np.all(np.isfinite(draws))
    assert np.all(np.isfinite(log_prob))


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (nnx.Dropout(0.5, rngs=nnx.Rngs(0)), r"parameters \(nnx.Param\) only, got .*RngKey"),
        (nnx.BatchNorm(3, rngs=nnx.Rngs(0)), "only, got BatchStat. Use LayerNorm in place"),
        (ResidualMLP, "embedding: expected a module or a function of one nnx.Rngs, got"),
        (3, "embedding: expected a module or a function of one nnx.Rngs, got 3"),
    ],
)
def test_an_embedding_that_cannot_be_trained_is_refused_at_once(embedding, message):
    with pytest.raises(ValueError, match=message):
        cases.unchecked(sf.NPE, GAUSSIAN, TINY, embedding=embedding)


@pytest.mark.parametrize("members", [0, -2, 1.5])
def test_an_ensemble_without_members_is_refused(members):
    with pytest.raises(ValueError, match=f"members: expected .* at least 1, got {members}"):
        cases.unchecked(sf.NPE, GAUSSIAN, members=members)


def test_what_is_no_density_or_no_simulations_is_refused(simulations):
    with pytest.raises(ValueError, match=r"density: expected a density such as .*, got str"):
        cases.unchecked(sf.NPE, GAUSSIAN, "nsf")
    with pytest.raises(ValueError, match=r"density: expected .*, got the class NSF$"):
        cases.unchecked(sf.NPE, GAUSSIAN, sf.NSF)
    with pytest.raises(ValueError, match=r"training: expected sf\.Training, got dict"):
        cases.unchecked(sf.NPE, GAUSSIAN, training={"max_epochs": 3})
    # the types are checked in tests alone, before the library's own checks: go round that
    with pytest.raises(ValueError, match=r"simulations: expected sf\.Simulations, got tuple"):
        arrays = (simulations.theta, simulations.x)
        inspect.unwrap(sf.NPE._checked)(sf.NPE(GAUSSIAN), arrays)
    with pytest.raises(ValueError, match="expected a numpyro Distribution"):
        sf.NPE(3.0)


def test_simulations_that_do_not_fit_the_prior_are_refused(simulations):
    key = jax.random.key(0)
    three = sf.NPE(dist.Normal(0.0, 1.0).expand([3]))
    with pytest.raises(ValueError, match=r"theta: expected 3 columns for .*theta\[2\].*, got 2"):
        three.fit(key, simulations)
    outside = int(np.sum(np.any(np.abs(simulations.theta) > 1, axis=1)))
    assert outside > 100
    box = sf.NPE(dist.Uniform(-1.0, 1.0).expand([2]))
    with pytest.raises(ValueError, match=f"inside the prior's support, got {outside} rows outside"):
        box.fit(key, simulations)


@pytest.mark.parametrize("valid", [0, 9])
def test_too_few_valid_rows_are_refused(valid):
    x = np.full((50, 3), np.nan)
    x[:valid] = 0.0
    sims = sf.Simulations(np.zeros((50, 2)), x)
    with pytest.raises(SimulationFailed, match=f"at least 10 finite .* got {valid} of 50"):
        sf.NPE(GAUSSIAN).fit(jax.random.key(0), sims)


def test_an_estimator_is_a_frozen_description():
    estimator = sf.NPE(dist.Normal(0.0, 1.0))
    assert isinstance(estimator.prior, sf.Prior)
    assert (estimator.density, estimator.training) == (sf.NSF(), sf.Training())
    with pytest.raises(AttributeError):
        estimator.members = 3


def test_a_fit_gives_no_warning(simulations):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator = sf.NPE(GAUSSIAN, TINY, training=QUICK, members=2)
        estimator.fit(jax.random.key(3), simulations, progress=False)


def test_a_description_can_be_varied():
    npe = sf.NPE(dist.Normal(0.0, 1.0), members=2, emulator=sf.Emulator())
    varied = dataclasses.replace(npe, members=3)
    assert (varied.members, varied.prior, varied.density) == (3, npe.prior, npe.density)
    assert dataclasses.replace(varied, members=2) == npe
