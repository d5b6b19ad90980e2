"""The figures of a posterior as a prior, on an exact posterior and a short chain."""

import jax
import numpy as np
import pytest

from benchmarks.demonstrations import inside_jax


@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize("make", [inside_jax.conjugate, inside_jax.bounded])
def test_two_experiments_agree_with_the_joint_analysis(make):
    experiments = make()
    posterior = inside_jax._fit(experiments.prior)
    result = inside_jax.two_experiments(posterior, experiments)
    assert result["c2st"] <= 0.55
    np.testing.assert_allclose(result["mean"], result["exact_mean"], atol=0.05)


@pytest.mark.promotes
@pytest.mark.parametrize("make", [inside_jax.conjugate, inside_jax.bounded])
def test_the_exact_joint_posterior_is_that_of_importance_weights(make):
    experiments = make()
    theta = experiments.prior.sample(jax.random.key(0), (200_000,))
    distance = (theta - experiments.first) ** 2 + (theta - experiments.second) ** 2
    weights = jax.nn.softmax(-0.5 * distance / inside_jax.NOISE**2, axis=0)
    exact = experiments.joint(0)
    np.testing.assert_allclose((weights * theta).sum(axis=0), exact.mean(axis=0), atol=0.02)
