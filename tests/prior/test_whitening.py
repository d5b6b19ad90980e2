"""Standard coordinates of priors without a CDF have mean 0 and identity covariance."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from tests.cases import FREE
from tests.compilations import count_compilations

# numpyro promotes ranks in many distributions and transforms
pytestmark = pytest.mark.promotes

SDS = np.array([1e-6, 1e6])


def wide() -> dist.Distribution:
    """Return a correlated normal with standard deviations of 1e-6 and 1e6."""
    return dist.MultivariateNormal(jnp.array([3e-6, -2e6]), jnp.array([[1e-12, 0.8], [0.8, 1e12]]))


def tiny_hierarchy() -> None:
    scale = numpyro.sample("scale", dist.HalfNormal(1e-12))
    with numpyro.plate("group", 2):
        numpyro.sample("f", dist.Normal(0.0, scale))


PRIORS = {
    "normal": wide,
    "two normals": lambda: wide().expand([2]),
    "student": lambda: dist.MultivariateStudentT(
        5.0, jnp.zeros(2), jnp.array([[1e-3, 0.0], [2.0, 1.0]])
    ),
    "simplex": lambda: dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])),
    "factor": lambda: dist.LKJCholesky(3, 2.0),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(jnp.array([0.5, 0.5])), dist.Normal(jnp.array([1e5, 1.1e5]), 1e3)
    ),
    "dict": lambda: {"a": wide(), "b": dist.Normal(0.0, 1.0), "c": dist.Weibull(1e-5, 2.0)},
    "hierarchy": lambda: tiny_hierarchy,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_draws_are_standard(name):
    prior = sf.as_prior(PRIORS[name]())
    theta = prior.sample(jax.random.key(7), 10_000)
    y = np.clip(np.asarray(prior.to_standard(theta)), -6, 6)
    np.testing.assert_allclose(np.mean(y, axis=0), 0.0, atol=0.1)
    covariance = np.atleast_2d(np.cov(y.T))
    np.testing.assert_allclose(covariance, np.eye(len(covariance)), atol=0.15)


@pytest.mark.parametrize(
    ("name", "free"),
    [("normal", (0, 1)), pytest.param("simplex", FREE["simplex"], marks=pytest.mark.slow)],
)
def test_log_det_is_that_of_the_jacobian(name, free):
    with jax.enable_x64(True):
        prior = sf.as_prior(PRIORS[name]())
        y = jnp.array([0.3, -1.2])
        jacobian = jax.jacobian(prior.from_standard)(y)[np.asarray(free)]
        expected = np.linalg.slogdet(np.asarray(jacobian))[1]
        found = prior.standard_log_det(y, prior.from_standard(y))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_map_of_a_normal_is_exact():
    prior = sf.as_prior(wide())
    y = prior.to_standard(jnp.array([[3e-6, -2e6], [4e-6, -2e6]]))
    # one standard deviation of the first entry, and -0.8 / 0.6 of the rest of the second one
    np.testing.assert_allclose(y, [[0.0, 0.0], [1.0, -0.8 / 0.6]], atol=1e-3)
    log_prob = prior.log_prob(jnp.array([4e-6, -2e6]))
    pushed = log_prob + prior.standard_log_det(y[1], jnp.array([4e-6, -2e6]))
    expected = jnp.sum(jax.scipy.stats.norm.logpdf(y[1]))
    np.testing.assert_allclose(pushed, expected, rtol=1e-3)


def test_an_equal_prior_made_anew_compiles_nothing():
    def make(shift: float) -> sf.Prior:
        return sf.as_prior(dist.Dirichlet(jnp.array([1.0 + shift, 2.0, 3.0])))

    first = make(0.0)
    with count_compilations() as compiled:
        second, other = make(0.0), make(0.5)
    assert compiled == []
    assert jax.tree.structure(first) == jax.tree.structure(second) == jax.tree.structure(other)
    assert first.matches(second) and not first.matches(other)


def test_a_prior_is_made_under_a_trace():
    def log_prob(theta: jax.Array) -> jax.Array:
        return sf.as_prior(dist.Gamma(2.0, 3.0)).log_prob(theta)

    theta = jnp.array([0.7])
    expected = dist.Gamma(2.0, 3.0).log_prob(0.7)
    np.testing.assert_allclose(jax.jit(log_prob)(theta), expected, rtol=1e-5)

    def traced(scale: jax.Array) -> jax.Array:
        prior = sf.as_prior(dist.MultivariateNormal(jnp.zeros(2), scale * jnp.eye(2)))
        return prior.log_prob(jnp.zeros(2))

    np.testing.assert_allclose(jax.jit(traced)(2.0), -np.log(2 * np.pi * 2.0), rtol=1e-5)


@pytest.mark.slow
def test_a_posterior_recovers_parameters_of_very_different_scales():
    """Both theta_i / sd_i are observed with noise of sd 0.5."""
    prior = dist.MultivariateNormal(jnp.zeros(2), jnp.array([[1e-12, 0.8], [0.8, 1e12]]))

    def simulator(key: jax.Array, theta: jax.Array) -> jax.Array:
        return theta / jnp.asarray(SDS) + 0.5 * jax.random.normal(key, (2,))

    sims = sf.simulate(jax.random.key(0), prior, simulator, 2000, progress=False)
    npe = sf.NPE(prior, sf.MAF(transforms=1), training=sf.Training(max_epochs=10), members=1)
    posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
    x = np.array([0.5, -0.3])
    draws = np.asarray(posterior.sample(jax.random.key(2), jnp.asarray(x), 4000)) / SDS
    covariance = np.linalg.inv(np.linalg.inv([[1.0, 0.8], [0.8, 1.0]]) + 4.0 * np.eye(2))
    np.testing.assert_allclose(np.std(draws, axis=0), np.sqrt(np.diag(covariance)), rtol=0.15)
    np.testing.assert_allclose(np.mean(draws, axis=0), covariance @ (4.0 * x), atol=0.1)
