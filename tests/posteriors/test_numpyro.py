"""A posterior at an observation as a numpyro distribution over the prior's support."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import biject_to
from numpyro.infer import MCMC, NUTS

import sbi_flows as sf
from sbi_flows.posteriors.numpyro import PosteriorDistribution, PriorSupport
from tests.artefacts import ensemble, posterior
from tests.cases import DENSITIES, PRIORS

pytestmark = pytest.mark.promotes

X = jnp.array([0.3, 1.2, -0.7])
NAMES = ["uniform", "normal", "lognormal", "beta", "simplex", "dict"]


def at(prior, density=DENSITIES["mixture"]):
    made = sf.as_prior(prior)
    return posterior(made, ensemble(density, made.bounded)).at(X)


@pytest.mark.parametrize("name", NAMES)
def test_unconstrained_coordinates_lead_to_the_support_and_back(name):
    prior = sf.as_prior(PRIORS[name]())
    transform = biject_to(PriorSupport(prior))
    shape = (prior.dim,) if prior.is_named else prior.event_shapes["theta"]
    u = jax.random.normal(jax.random.key(0), (4, prior.standard_dim))

    @jax.jit
    def compute(prior, u):
        transform = biject_to(PriorSupport(prior))
        values = transform(u)
        flat = values.reshape(4, -1)
        slopes = jax.vmap(jax.jacobian(lambda v: transform(v).ravel()))(u)
        log_det = transform.log_abs_det_jacobian(u, values)
        return values, prior.contains(flat), transform._inverse(values), log_det, slopes

    values, inside, again, log_det, slopes = compute(prior, u)
    assert values.shape == (4, *shape)
    assert transform.forward_shape((4, prior.standard_dim)) == values.shape
    assert transform.inverse_shape(values.shape) == u.shape
    assert np.all(inside)
    np.testing.assert_allclose(again, u, atol=2e-3)
    if prior.dim == prior.standard_dim:
        expected = np.linalg.slogdet(np.asarray(slopes, float))[1]
        np.testing.assert_allclose(log_det, expected, atol=2e-3)


@pytest.mark.slow
def test_its_value_has_the_parameters_shape():
    for name, shape in {"normal": (), "uniform": (2,), "dict": (7,)}.items():
        made = at(PRIORS[name]()).to_numpyro()
        draws = made.sample(jax.random.key(1), (3, 2))
        assert made.event_shape == shape
        assert draws.shape == (3, 2, *shape)
        assert np.all(made.support(draws))
        assert made.log_prob(draws).shape == (3, 2)
        assert made.sample(jax.random.key(1)).shape == shape


def test_it_is_a_pytree_with_the_density_of_the_posterior():
    bound = at(PRIORS["uniform"]())
    made = bound.to_numpyro()
    theta = jnp.array([[0.5, 1.0], [9.0, 0.0]])
    inside = jax.jit(lambda made, theta: made.log_prob(theta))(made, theta)
    assert isinstance(jax.tree.map(lambda leaf: leaf, made), PosteriorDistribution)
    np.testing.assert_allclose(inside, bound.log_prob(theta), rtol=1e-5)
    assert np.isneginf(inside[1])


@pytest.mark.slow
def test_nuts_on_it_alone_gives_the_posterior():
    """Its density and its transform together: a chain without data draws the posterior."""
    prior = dist.Uniform(0.0, 1.0).expand([2])
    bound = at(prior)
    first = bound.to_numpyro()

    def model():
        numpyro.sample("theta", first)

    sampler = MCMC(NUTS(model), num_warmup=300, num_samples=2_000, progress_bar=False)
    sampler.run(jax.random.key(2))
    chain = np.asarray(sampler.get_samples()["theta"])
    draws = np.asarray(bound.sample(jax.random.key(3), 4_000))
    assert np.all((chain > 0.0) & (chain < 1.0))
    np.testing.assert_allclose(chain.mean(axis=0), draws.mean(axis=0), atol=0.06)
    np.testing.assert_allclose(chain.std(axis=0), draws.std(axis=0), atol=0.04)
