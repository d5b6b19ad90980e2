"""Supports: tolerance at the edge, moves by rounding only, and maps from R^d."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to

import sbi_flows as sf
from sbi_flows.prior.supports import (
    clip_rounding,
    in_support,
    move_inside,
    transform_of,
)

# numpyro promotes ranks in many distributions and transforms
pytestmark = pytest.mark.promotes

KEY = jax.random.key(0)
OWN = {  # supports with a map of our own, and the length of its argument
    "simplex": (constraints.simplex, 3),
    "corr_cholesky": (constraints.corr_cholesky, 6),
    "corr_matrix": (constraints.corr_matrix, 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_own_maps_are_those_of_numpyro(name):
    support, size = OWN[name]
    ours, theirs = transform_of(support), biject_to(support)
    x = jax.random.normal(KEY, (20, size))
    y = ours(x)
    np.testing.assert_allclose(y, theirs(x), atol=2e-6)
    np.testing.assert_allclose(ours._inverse(y), x, atol=2e-4)
    expected = theirs.log_abs_det_jacobian(x, y)
    np.testing.assert_allclose(ours.log_abs_det_jacobian(x, y), expected, atol=2e-4)
    assert ours.inverse_shape(y.shape) == x.shape
    assert np.all(in_support(support, y))


@pytest.mark.parametrize("name", ["simplex", "corr_cholesky"])
def test_own_maps_keep_their_digits_near_the_edge(name):
    support, size = OWN[name]
    ours = transform_of(support)
    x = 5.0 * jax.random.normal(KEY, (200, size))
    np.testing.assert_allclose(ours._inverse(ours(x)), x, rtol=1e-3, atol=1e-3)
    assert np.all(np.isfinite(ours.log_abs_det_jacobian(x, ours(x))))


SINGULAR = jnp.array([[1.0, 1.0], [1.0, 1.0]])
EDGES = {  # a distribution, and values on the closed edge of its support
    "beta": (lambda: dist.Beta(0.2, 0.2), jnp.array([0.0, 1.0, 0.3])),
    "uniform": (lambda: dist.Uniform(-1.0, 2.0), jnp.array([-1.0, 2.0, 0.3])),
    "logit normal": (
        lambda: dist.TransformedDistribution(
            dist.Normal(0.0, 1.0), dist.transforms.SigmoidTransform()
        ),
        jnp.array([0.0, 1.0, 0.3]),
    ),
    "simplex": (
        lambda: dist.Dirichlet(jnp.full(3, 0.5)),
        jnp.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]),
    ),
    "correlations": (lambda: dist.LKJ(2, 0.5), jnp.stack([SINGULAR, jnp.eye(2)])),
    "factor": (
        lambda: dist.LKJCholesky(2, 0.5),
        jnp.array([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]]),
    ),
    "covariances": (
        lambda: dist.Wishart(3.0, jnp.eye(2)),
        jnp.stack([1e-4 * SINGULAR, 2 * SINGULAR]),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EDGES)
def test_coordinates_are_finite_on_a_closed_edge(name):
    make, values = EDGES[name]
    prior = sf.as_prior(make())
    theta = jnp.reshape(values, (len(values), -1))
    assert np.all(prior.contains(theta))
    y = prior.to_standard(theta)
    assert np.all(np.isfinite(y))
    np.testing.assert_allclose(prior.from_standard(y), theta, atol=1e-4)
    log_det = prior.standard_log_det(y, theta)
    assert np.all(np.isfinite(log_det)) and np.all(np.isfinite(prior.log_prob(theta)))


OUTSIDE = {
    "not symmetric": (constraints.corr_matrix, jnp.array([[1.0, 0.3], [0.2, 1.0]])),
    "not positive": (constraints.corr_matrix, jnp.array([[1.0, 1.01], [1.01, 1.0]])),
    "diagonal": (constraints.corr_matrix, jnp.array([[1.1, 0.3], [0.3, 1.0]])),
    "not a covariance": (constraints.positive_definite, jnp.array([[1e6, 1.1e6], [1.1e6, 1e6]])),
    "norm of a row": (constraints.corr_cholesky, jnp.array([[1.0, 0.0], [0.9, 0.9]])),
    "upper entry": (constraints.corr_cholesky, jnp.array([[1.0, 0.1], [0.6, 0.8]])),
    "sum": (constraints.simplex, jnp.array([0.5, 0.6])),
    "negative": (constraints.simplex, jnp.array([1.1, -0.1])),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_tolerance_is_for_rounding_only(name):
    support, value = OUTSIDE[name]
    assert not np.any(np.all(in_support(support, value)))


def test_covariances_of_any_scale_are_inside():
    value = jnp.array([[1e-12, 0.8e-3], [0.8e-3, 1e6]])
    assert np.all(in_support(constraints.positive_definite, value))


@pytest.mark.slow
def test_all_draws_of_a_rough_correlation_matrix_are_inside():
    prior = sf.as_prior(dist.LKJ(3, 0.5))
    theta = prior.sample(jax.random.key(1), 20_000)
    assert np.all(prior.contains(theta))
    assert np.all(np.isfinite(prior.to_standard(theta)))
    assert np.all(np.isfinite(prior.log_prob(theta)))


MOVED = {  # a support, values near an edge, and which of them rounding can explain
    "interval": (constraints.interval(2.0, 3.0), [2.0, 3.0 + 2e-6, 3.1, 1.9, 2.5], [0, 1]),
    "unit interval": (constraints.unit_interval, [-1e-7, 1.0, 5.0, -0.1, 0.5], [0, 1]),
    "half line": (constraints.positive, [0.0, -5e-7, -0.1, 1.0, 2.0], [0, 1]),
    "beyond": (constraints.less_than(10.0), [10.0, 10.00001, 10.1, 9.0, 5.0], [0, 1]),
}


@pytest.mark.parametrize("name", MOVED)
def test_draws_are_moved_by_rounding_only(name):
    support, values, moved = MOVED[name]
    theta = jnp.asarray(values)
    kept = np.asarray(clip_rounding(theta, support))
    changed = np.flatnonzero(kept != np.asarray(theta))
    np.testing.assert_array_equal(changed, moved)
    assert np.all(support(kept[moved]))
    assert np.all(support(np.asarray(move_inside(theta, support))))


def test_ordered_draws_are_set_apart_by_rounding_only():
    theta = jnp.array([[1.0, 1.0, 2.0], [1.0, 0.5, 2.0]])
    kept = np.asarray(clip_rounding(theta, constraints.ordered_vector))
    np.testing.assert_array_equal(constraints.ordered_vector(kept), [True, False])
    np.testing.assert_array_equal(kept[1], theta[1])


@pytest.mark.slow
def test_a_fit_takes_simulations_on_the_edge():
    prior = dist.Beta(0.2, 0.2).expand([1])
    theta = np.random.default_rng(0).beta(0.2, 0.2, (300, 1)).astype(np.float32)
    theta[:5], theta[5:10] = 0.0, 1.0
    x = theta + 0.1 * np.random.default_rng(1).normal(size=(300, 1))
    sims = sf.Simulations(theta, x.astype(np.float32))
    flow, training = sf.MAF(transforms=1, hidden=(4,)), sf.Training(max_epochs=1)
    posterior, _ = sf.NPE(prior, flow, training=training, members=1).fit(KEY, sims, progress=False)
    assert np.all(np.isfinite(posterior.log_prob(jnp.array([[0.0], [1.0]]), jnp.zeros(1))))
