"""Circular parameters of priors: intervals, standard coordinates, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.prior.box import BoxPrior
from sbi_flows.prior.circular import HALF_WIDTH, wrap
from sbi_flows.prior.site_prior import SitePrior

pytestmark = pytest.mark.promotes

PRIORS = {
    "angle": sf.Circular,
    "hour": lambda: sf.Circular(0.0, 24.0),
    "phases": lambda: sf.Circular(dist.Uniform(jnp.zeros(2), jnp.array([1.0, 2.0]))),
    "vector": lambda: sf.Circular(0.0, 24.0).expand([2, 2]).to_event(1),
    "beta": lambda: sf.Circular(dist.Beta(2.0, 3.0)),
    "von Mises": lambda: dist.VonMises(1.0, 2.0),
}
ENDS = {"angle": (-np.pi, np.pi), "hour": (0.0, 24.0), "vector": (0.0, 24.0), "beta": (0.0, 1.0)}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("x64", [False, True])
def test_standard_coordinates_are_linear_in_the_value(name, x64):
    with jax.enable_x64(x64):
        prior = sf.as_prior(PRIORS[name]())
        assert prior.circular == prior.bounded == (True,) * prior.dim
        theta = prior.sample(jax.random.key(0), 200)
        assert theta.dtype == (jnp.float64 if x64 else jnp.float32)
        y = prior.to_standard(theta)
        np.testing.assert_allclose(prior.from_standard(y), theta, rtol=1e-5, atol=2e-6)
        low, high = ENDS.get(name, (-np.pi, np.pi))
        if name == "phases":
            low, high = np.zeros(2), np.array([1.0, 2.0])
        np.testing.assert_allclose(
            y, HALF_WIDTH * (2 * (theta - low) / (high - low) - 1), atol=2e-6
        )
        expected = np.sum(np.log((high - low) / (2 * HALF_WIDTH)) * np.ones(prior.dim))
        np.testing.assert_allclose(prior.standard_log_det(y, theta), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ENDS)
def test_the_support_is_the_closed_interval(name):
    prior = sf.as_prior(PRIORS[name]())
    low, high = np.float32(ENDS[name])
    rows = np.stack([np.full(prior.dim, v) for v in (low, high, low - 0.1, high + 0.1)])
    np.testing.assert_array_equal(prior.contains(rows), [True, True, False, False])
    np.testing.assert_array_equal(np.isneginf(prior.log_prob(rows[2:])), True)
    np.testing.assert_allclose(prior.to_standard(rows[1]), HALF_WIDTH, rtol=1e-6)


def test_the_density_is_that_of_the_distribution_inside():
    theta = jnp.linspace(-3.1, 3.1, 7)[:, None]
    np.testing.assert_allclose(sf.as_prior(sf.Circular()).log_prob(theta), -np.log(2 * np.pi))
    inside = sf.as_prior(sf.Circular(dist.VonMises(0.5, 2.0))).log_prob(theta)
    np.testing.assert_allclose(inside, dist.VonMises(0.5, 2.0).log_prob(theta[:, 0]), rtol=1e-6)


def test_an_angle_of_a_model_may_depend_on_other_parameters():
    def model():
        center = numpyro.sample("center", dist.VonMises(0.0, 1.0))
        numpyro.sample("angle", dist.VonMises(center, 20.0))
        numpyro.sample("size", dist.HalfNormal(1.0))

    prior = sf.as_prior(model)
    assert prior.circular == (True, True, False)
    theta = jnp.array([3.0, -3.0, 1.0])
    expected = dist.VonMises(0.0, 1.0).log_prob(3.0) + dist.VonMises(3.0, 20.0).log_prob(-3.0)
    expected += dist.HalfNormal(1.0).log_prob(1.0)
    np.testing.assert_allclose(prior.log_prob(theta), expected, rtol=1e-5)


def test_priors_without_circular_parameters_say_so():
    assert sf.as_prior({"a": dist.Uniform(-np.pi, np.pi), "b": dist.Normal(0, 1)}).circular == ()
    assert SitePrior(
        {"a": dist.VonMises(0.0, 1.0)}, is_named=True, has_circular_maps=False
    ).bounded == (False,)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: sf.Circular(dist.Normal(0, 1)),
            r"on an interval with event shape \(\), got Normal",
        ),
        (lambda: sf.Circular(dist.Uniform(0, 1).expand([2]).to_event(1)), r"event shape \(2,\)"),
        (
            lambda: sf.Circular(dist.Uniform(0, 1), 2.0),
            r"high: expected None if `low` is a distribution, got 2",
        ),
        (lambda: sf.as_prior(sf.Circular(3.0, 1.0)), r"bounds of .* with low < high"),
    ],
)
def test_what_is_no_interval_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_wrap_adds_periods_and_leaves_values_inside_as_they_are():
    y = jnp.array([-HALF_WIDTH, -1.0, 0.0, 1.7, HALF_WIDTH])
    np.testing.assert_array_equal(wrap(y), y)
    for turns in (-2, -1, 1, 3):
        moved = wrap(y + 2 * HALF_WIDTH * turns)
        np.testing.assert_allclose(moved[1:-1], y[1:-1], atol=2e-6)
        np.testing.assert_allclose(np.abs(moved), np.abs(y), atol=2e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(wrap))(5.0 * y[1:-1]), 1.0)


def test_a_box_does_not_cut_circular_coordinates():
    base = sf.as_prior({"angle": sf.Circular(), "a": dist.Uniform(0.0, 1.0)})
    box = BoxPrior(base, [-0.1, -0.1], [0.1, 0.1])
    assert box.circular == (True, False)
    np.testing.assert_allclose(box.mass, 0.1 / HALF_WIDTH, rtol=1e-5)
    theta = box.sample(jax.random.key(0), 2000)
    assert np.ptp(theta[:, 0]) > 6.2 and np.ptp(theta[:, 1]) < 0.06
    np.testing.assert_allclose(box.from_standard(box.to_standard(theta)), theta, atol=1e-5)
