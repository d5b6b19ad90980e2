"""Priors with a condition: draws, density, JAX transformations, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.prior.box import BoxPrior
from tests.compilations import count_compilations

KEY = jax.random.key(0)


def rising(theta):
    return theta["a"] < theta["b"]


def triangle(high: float = 1.0) -> sf.Prior:
    side = dist.Uniform(0.0, high)
    return sf.constrained({"a": side, "b": side}, rising)


@pytest.fixture(scope="module")
def prior() -> sf.Prior:
    return triangle()


def test_draws_and_density_of_a_triangle(prior):
    theta = np.asarray(prior.sample(KEY, 20_000))
    assert np.all(theta[:, 0] < theta[:, 1])
    # order statistics of two uniform numbers
    np.testing.assert_allclose(np.mean(theta, axis=0), [1 / 3, 2 / 3], atol=0.01)
    assert prior.mass == pytest.approx(0.5, abs=5 * prior.mass_error)
    assert prior.mass_error == pytest.approx(0.5 / np.sqrt(100_000), rel=0.01)
    inside, outside = jnp.array([0.2, 0.9]), jnp.array([0.9, 0.2])
    assert prior.log_prob(inside) == pytest.approx(np.log(2.0), abs=0.03)
    np.testing.assert_array_equal(prior.log_prob(jnp.stack([outside, -inside])), -np.inf)
    np.testing.assert_array_equal(prior.contains(jnp.stack([inside, outside])), [True, False])
    assert prior.contains(prior.center())
    assert "constrained to 49.9% +- 0.2% of its mass" in repr(prior)


def test_a_rare_condition_fills_all_draws():
    rare = sf.constrained(dist.Normal(0.0, 1.0), lambda theta: theta > 2.5)
    draws = rare.sample(KEY, 3000)
    assert np.all(draws > 2.5)
    np.testing.assert_allclose(np.mean(draws), 2.823, atol=0.02)


def test_a_constrained_prior_inside_jax(prior):
    theta = prior.sample(KEY, 5)
    drawn = jax.jit(lambda prior, key: prior.sample(key, 5))(prior, KEY)
    np.testing.assert_allclose(drawn, theta, rtol=1e-6)
    several = jax.vmap(lambda key: prior.sample(key, 3))(jax.random.split(KEY, 2))
    assert np.all(prior.contains(several))
    log_prob = jax.jit(lambda prior, theta: prior.log_prob(theta))(prior, theta)
    np.testing.assert_allclose(log_prob, prior.log_prob(theta), rtol=1e-5)
    y = prior.to_standard(theta)
    np.testing.assert_allclose(prior.from_standard(y), theta, atol=1e-5)


def test_another_prior_with_the_same_condition_compiles_nothing(prior):
    prior.sample(KEY, 6)
    with count_compilations() as compiled:
        other = triangle(2.0)
        other.sample(KEY, 6)
    assert compiled == []
    assert prior.matches(triangle()) and not prior.matches(other)
    assert not prior.matches(prior.base)


def test_an_array_and_a_batch_of_axes():
    ordered = sf.constrained(dist.Normal(0.0, 1.0).expand([3]), lambda t: jnp.all(jnp.diff(t) > 0))
    assert ordered.mass == pytest.approx(1 / 6, abs=0.01)
    assert ordered.contains(ordered.sample(KEY, 6).reshape(2, 3, 3)).shape == (2, 3)


REFUSED = {
    "not a bool": (lambda t: t["a"], "returns one bool for one parameter vector, got float"),
    "an array": (lambda t: jnp.array([True, False]), r"one bool .* got bool of shape \(2,\)"),
    "never": (lambda t: t["a"] < -1.0, "probability of at least 0.0001 .* got 0 of 100,000"),
    "and": (lambda t: t["a"] > 0.1 and t["b"] > 0.1, "JAX can trace, got TracerBool"),
    "a name": (lambda t: t["c"] > 0.0, "JAX can trace, got KeyError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_condition_that_is_none_is_refused(name):
    condition, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        sf.constrained({"a": dist.Uniform(0.0, 1.0), "b": dist.Uniform(0.0, 1.0)}, condition)


def test_restricted_priors_are_not_restricted_again(prior):
    with pytest.raises(ValueError, match=r"without a condition or a box, .* join all conditions"):
        sf.constrained(prior, rising)
    with pytest.raises(ValueError, match="base: expected a prior without a box"):
        BoxPrior(prior, [-1.0, -1.0], [1.0, 1.0])
