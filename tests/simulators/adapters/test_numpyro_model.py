"""Tasks made from numpyro models: prior, simulator, exact posterior and joint density."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.stats import norm

import sbi_flows as sf
from simulators import from_numpyro

pytestmark = pytest.mark.promotes

SIGMA = np.array([1.0, 0.5, 2.0])


def schools(sigma, y=None):
    """A hierarchical model with a plate and a deterministic site."""
    centre = numpyro.sample("centre", dist.Normal(0.0, 1.0))
    with numpyro.plate("school", len(sigma)):
        effect = numpyro.sample("effect", dist.Normal(centre, 1.0))
        numpyro.deterministic("doubled", 2 * effect)
        numpyro.sample("y", dist.Normal(effect, sigma), obs=y)


DATA = np.array([2.0, 1.0, -1.0], np.float32)


@pytest.fixture(scope="module")
def task():
    return from_numpyro(schools, ["y"], SIGMA, data=DATA)


def exact():
    """Mean and covariance of (centre, effects) given `DATA`."""
    ones = np.ones(3)
    prior = np.block([[np.ones((1, 1)), ones[None]], [ones[:, None], np.eye(3) + 1.0]])
    design = np.eye(4)[1:]
    gain = prior @ design.T @ np.linalg.inv(design @ prior @ design.T + np.diag(SIGMA**2))
    return gain @ DATA, prior - gain @ design @ prior


def test_latent_sites_are_the_parameters_and_observed_ones_the_data(task):
    assert task.name == "schools"
    assert task.labels == ("centre", "effect[0]", "effect[1]", "effect[2]")
    np.testing.assert_array_equal(task.observation(1), DATA)
    with pytest.raises(ValueError, match="observation: expected 1 to 1 for schools, got 2"):
        task.observation(2)
    theta = {"centre": jnp.float32(3.0), "effect": jnp.array([1.0, 2.0, 3.0])}
    keys = jax.random.split(jax.random.key(0), 4000)
    x = jax.vmap(task.simulator, in_axes=(0, None))(keys, theta)
    np.testing.assert_allclose(x.mean(axis=0), theta["effect"], atol=0.12)
    np.testing.assert_allclose(x.std(axis=0), SIGMA, rtol=0.06)


def test_parameters_that_depend_on_others_are_simulated_like_the_rest(task):
    sims = sf.simulate(jax.random.key(0), task.prior, task.simulator, 4000, progress=False)
    covariance = np.cov(np.column_stack([sims.theta, sims.x]).T)
    expected = np.ones((7, 7))
    expected[1:4, 1:4] += np.eye(3)
    expected[4:, 4:] += np.eye(3) + np.diag(SIGMA**2)
    expected[1:4, 4:] += np.eye(3)
    expected[4:, 1:4] += np.eye(3)
    np.testing.assert_allclose(covariance, expected, atol=0.35)


@pytest.mark.slow
def test_its_reference_is_the_exact_posterior(task):
    draws = np.asarray(task.reference(1, 4000))
    mean, covariance = exact()
    sd = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose((draws.mean(axis=0) - mean) / sd, 0.0, atol=0.12)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.1)


def test_the_joint_density_is_that_of_the_model(task):
    theta = {"centre": 0.5, "effect": np.array([1.0, 0.0, -1.0])}
    expected = norm.logpdf(0.5) + norm.logpdf(theta["effect"] - 0.5).sum()
    expected += norm.logpdf((DATA - theta["effect"]) / SIGMA).sum() - np.log(SIGMA).sum()
    assert task.log_joint(theta, DATA) == pytest.approx(float(expected), rel=1e-5)


def counts(events=None, size=None):
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    numpyro.sample("events", dist.Poisson(rate).expand([3]).to_event(1), obs=events)
    numpyro.sample("size", dist.Exponential(rate), obs=size)


@pytest.mark.slow
def test_several_observed_sites_are_a_dict():
    data = {"events": np.array([1, 0, 4]), "size": np.float32(0.5)}
    task = from_numpyro(counts, ["events", "size"], data=data)
    np.testing.assert_array_equal(task.observation(1)["events"], data["events"])
    sims = sf.simulate(jax.random.key(0), task.prior, task.simulator, 50, progress=False)
    assert {k: v.shape for k, v in sims.x.items()} == {"events": (50, 3), "size": (50,)}
    assert np.issubdtype(sims.x["events"].dtype, np.integer)
    # a gamma prior is conjugate to both
    draws = np.asarray(task.reference(1, 4000))
    assert draws.mean() == pytest.approx((2 + 5 + 1) / (1 + 3 + 0.5), rel=0.05)


def test_a_site_with_data_in_the_model_is_simulated():
    def model():
        place = numpyro.sample("place", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(place, 0.1), obs=5.0)

    task = from_numpyro(model, ["y"])
    assert task.num_observations == 10
    x = [float(task.observation(i)) for i in (1, 2)]
    assert len({*x, 5.0}) == 3


def with_factor():
    place = numpyro.sample("place", dist.Normal(0.0, 1.0))
    numpyro.factor("bonus", -place)
    numpyro.sample("y", dist.Normal(place, 0.1))


def discrete():
    kind = numpyro.sample("kind", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(kind, 0.1))


@pytest.mark.parametrize(
    ("model", "observed", "settings", "message"),
    [
        (with_factor, ["y"], {}, r"which leaves out \['bonus'\] \(factors"),
        (discrete, ["y"], {}, "prior site 'kind': expected a continuous distribution"),
        (counts, ["event"], {}, r"observed: expected names out of \['events', 'rate', 'size'\]"),
        (counts, [], {}, "observed: expected names out of"),
        (lambda y: counts(y), ["events"], {}, "model: expected a model that runs without its data"),
        (counts, ["events", "size"], {"data": np.ones(3)}, r"data: expected a dict of \['events'"),
        (discrete, ["kind"], {"data": np.ones(3)}, r"data: expected shape \(\), got \(3,\)"),
    ],
)
def test_models_that_cannot_be_tasks_are_refused(model, observed, settings, message):
    with pytest.raises(ValueError, match=message):
        from_numpyro(model, observed, **settings)
