"""Priors of values that single precision cannot hold: Julian dates, GPS seconds."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats

import sbi_flows as sf
from sbi_flows.prior.box import BoxPrior
from sbi_flows.prior.offsets import split_offset
from simulators import external_simulator

T = 1126259462.4
FAR = {
    "uniform": (dist.Uniform(T - 0.2, T + 0.2), scipy.stats.uniform(T - 0.2, 0.4)),
    "normal": (dist.Normal(T, 0.01), scipy.stats.norm(T, 0.01)),
    "expanded": (dist.Normal(T, 0.01).expand([2]).to_event(1), scipy.stats.norm(T, 0.01)),
    "cauchy": (dist.Cauchy(T, 0.01), scipy.stats.cauchy(T, 0.01)),
    "student": (dist.StudentT(5.0, T, 0.01), scipy.stats.t(5.0, T, 0.01)),
    "truncated": (
        dist.TruncatedNormal(T, 0.01, low=T - 0.005, high=T + 0.02),
        scipy.stats.truncnorm(-0.5, 2.0, T, 0.01),
    ),
    "half": (dist.TruncatedNormal(T, 0.01, low=T), scipy.stats.truncnorm(0.0, np.inf, T, 0.01)),
}


SLOW_FAR = {"student", "truncated", "half"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW_FAR)) for n in FAR]
)
def test_draws_and_densities_are_those_in_double_precision(name):
    distribution, expected = FAR[name]
    prior = sf.as_prior(distribution)
    draws = prior.sample(jax.random.key(0), 1_000)
    assert isinstance(draws, np.ndarray) and draws.dtype == np.float64
    assert scipy.stats.kstest(draws[:, 0], expected.cdf).pvalue > 1e-3
    assert np.all(prior.contains(draws))
    log_prob = np.sum(expected.logpdf(draws), axis=1)
    np.testing.assert_allclose(prior.log_prob(draws), log_prob, atol=2e-3)
    y = prior.to_standard(draws)
    np.testing.assert_allclose(prior.from_standard(y), draws, rtol=0, atol=5e-5)
    np.testing.assert_array_equal(prior.flatten(prior.unflatten(draws)), draws)


def test_ordinary_priors_have_no_offset():
    for distribution in (dist.Uniform(0, 1), dist.Normal(1e3, 1.0), dist.Uniform(-1e9, 1e9)):
        assert split_offset(distribution) == (distribution, None)
        assert sf.as_prior(distribution).offset is None


def test_only_the_sites_that_need_it_are_moved():
    prior = sf.as_prior({"a": dist.Normal(0, 1), "t": dist.Uniform(T, T + 1)})
    np.testing.assert_array_equal(prior.offset, [0.0, T + 0.5])
    other = sf.as_prior({"a": dist.Normal(0, 1), "t": dist.Uniform(T + 2, T + 3)})
    assert not prior.matches(other)
    assert prior.matches(sf.as_prior({"a": dist.Normal(0, 1), "t": dist.Uniform(T, T + 1)}))


@external_simulator(shape=(2,), dtype=float)
def arrival(seed, theta):
    noise = np.random.default_rng(seed).normal(size=2)
    return np.array([theta["t0"] + 0.02 * noise[0], theta["a"] + 0.2 * noise[1]])


@pytest.fixture(scope="module")
def fitted():
    prior = sf.as_prior({"t0": dist.Uniform(T - 0.2, T + 0.2), "a": dist.Normal(0, 1)})
    sims = sf.simulate(jax.random.key(1), prior, arrival, 1_200, progress=False)
    npe = sf.NPE(prior, sf.MAF(transforms=1), training=sf.Training(max_epochs=8), members=1)
    return npe.fit(jax.random.key(2), sims[:1_000], progress=False)[0], sims


X = np.array([T + 0.03, 0.5])


@pytest.mark.slow
@pytest.mark.promotes
def test_a_posterior_of_an_arrival_time(fitted, tmp_path):
    posterior, sims = fitted
    assert sims.theta.dtype == np.float64 and sims.x.dtype == np.float64
    draws = posterior.sample(jax.random.key(3), X, 2_000)
    assert isinstance(draws, np.ndarray) and draws.dtype == np.float64
    assert abs(draws[:, 0].mean() - X[0]) < 0.005
    assert 0.015 < draws[:, 0].std() < 0.027
    log_prob = posterior.log_prob(draws[:5], X)
    assert np.all(np.isfinite(log_prob))
    assert posterior.log_prob(draws[0] + np.array([0.15, 0.0]), X) < log_prob[0] - 5
    np.testing.assert_allclose(posterior.map(X), [X[0], 0.48], atol=0.03)
    path = tmp_path / "arrival.sbif"
    posterior.save(path)
    np.testing.assert_array_equal(sf.load(path).sample(jax.random.key(3), X, 2_000), draws)
    data = posterior.to_arviz(jax.random.key(3), X, n=100)
    assert np.ptp(np.asarray(data.posterior["t0"])) > 0.05
    with pytest.raises(ValueError, match="expected a prior without an offset, got"):
        posterior.at(X).to_numpyro()


@pytest.mark.slow
@pytest.mark.promotes
def test_the_diagnostics_of_such_a_posterior(fitted):
    posterior, sims = fitted
    held_out = sims[1_000:]
    sbc = sf.sbc(jax.random.key(4), posterior, held_out, draws=100, progress=False)
    assert np.all(sbc.ks > 1e-4)
    better = sf.recalibrate(jax.random.key(5), posterior, held_out, draws=100, progress=False)
    draws = better.sample(jax.random.key(3), X, 500)
    assert abs(draws[:, 0].mean() - X[0]) < 0.01
    sets = sf.conformal(jax.random.key(6), posterior, held_out, progress=False)
    assert sets.contains(draws.mean(axis=0), X, 0.9)
    assert not sets.contains(draws.mean(axis=0) + np.array([0.15, 0.0]), X, 0.9)


def test_a_compiled_simulator_is_refused_and_told_what_to_do(fitted, tmp_path):
    prior = fitted[0].prior
    simulators = {"simulate": sf.simulate, "store": sf.SimulationStore(tmp_path / "s").simulate}
    for simulate in simulators.values():
        with pytest.raises(
            ValueError, match=r"represent t0, got a JAX function; use simulators\.ext"
        ):
            simulate(jax.random.key(0), prior, lambda key, theta: theta["a"], 10)


def test_a_store_keeps_double_precision(fitted, tmp_path):
    prior = fitted[0].prior
    store = sf.SimulationStore(tmp_path / "s", chunk=10)
    sims = store.simulate(jax.random.key(0), prior, arrival, 20, progress=False)
    assert sims.theta.dtype == np.float64 and len(np.unique(sims.theta[:, 0])) == 20
    assert np.all(np.abs(sims.theta[:, 0] - np.asarray(sims.x[np.arange(20)])[:, 0]) < 0.1)


def test_a_box_keeps_the_offset(fitted):
    prior = fitted[0].prior
    box = BoxPrior(prior, np.array([-0.5, -1.0]), np.array([0.5, 1.0]))
    draws = box.sample(jax.random.key(0), 500)
    assert draws.dtype == np.float64
    assert abs(np.ptp(draws[:, 0]) - 0.4 / np.sqrt(12)) < 0.01


def test_inside_a_transformation_values_are_rounded():
    prior = sf.as_prior(dist.Uniform(T - 0.2, T + 0.2))
    theta = jax.jit(lambda p, key: p.sample(key, 3))(prior, jax.random.key(0))
    assert theta.dtype == jnp.float32 and np.all(np.abs(np.asarray(theta, float) - T) < 128)


UNRESOLVED = {
    "multivariate": dist.MultivariateNormal(jnp.full(2, 2459000.54), 1e-4 * jnp.eye(2)),
    "circular": sf.Circular(2459000.0, 2459001.0),
    "log-normal": dist.LogNormal(14.7, 1e-7),
    "model": lambda: numpyro.sample("t", dist.Uniform(2459000.0, 2459001.0)),
}


@pytest.mark.parametrize("name", UNRESOLVED)
def test_other_priors_that_precision_does_not_resolve_are_refused(name):
    with pytest.raises(ValueError, match="spread is too small for the size of its values"):
        sf.as_prior(UNRESOLVED[name])


def test_parameters_may_be_traced():
    log_prob = jax.jit(lambda m: sf.as_prior(dist.Normal(m, 1.0)).log_prob(jnp.zeros(1)))(0.0)
    np.testing.assert_allclose(log_prob, -0.9189385, rtol=1e-6)


def test_simulations_at_one_parameter_vector_keep_it_exactly(fitted):
    prior, truth = fitted[0].prior, np.array([[T + 0.0321, 0.5]])
    sims = sf.simulate_at(jax.random.key(0), prior, arrival, truth, progress=False)
    np.testing.assert_array_equal(sims.theta, truth)
    assert abs(float(sims.x[0, 0]) - truth[0, 0]) < 0.1
