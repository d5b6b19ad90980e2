"""The whole model of a member: embedding, linear start and density."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbi_flows.densities.conditional import Blueprint, initial_weights
from sbi_flows.densities.sizes import Sizes
from tests.cases import DENSITIES

pytestmark = pytest.mark.promotes

BOUNDED = (True, False, True)
FEATURES = 4
BLUEPRINT = Blueprint(DENSITIES["MAF"], None, Sizes(BOUNDED, jax.tree.structure(0), ((FEATURES,),)))
WITHOUT_START = dataclasses.replace(BLUEPRINT, linear_start=False)


def test_without_a_linear_start_the_model_is_the_same_before_a_fit():
    key = jax.random.key(0)
    default, without = BLUEPRINT.build(key), WITHOUT_START.build(key)
    features = jax.random.normal(jax.random.key(1), (5, FEATURES))
    y = jax.random.uniform(jax.random.key(2), (5, 3), minval=-1.7, maxval=1.7)
    for a, b in zip(default.whiten(y, features), without.whiten(y, features), strict=True):
        np.testing.assert_array_equal(a, b)
    mean, expected = (
        m.start_bijector(features, at_mean=True).forward(y) for m in (without, default)
    )
    np.testing.assert_array_equal(mean, expected)
    log_prob = without(features).log_prob(y)
    np.testing.assert_array_equal(log_prob, default(features).log_prob(y))
    assert np.all(np.isfinite(log_prob))


def test_without_a_linear_start_noise_is_moved_only_where_the_prior_is_bounded():
    model = WITHOUT_START.build(jax.random.key(0))
    y = jnp.array([[1.7, 4.0, -1.7]])
    # the noise does not depend on the features, so that NaN does not reach it
    noise, log_det = model.whiten(y, jnp.full((1, FEATURES), jnp.nan))
    assert noise[0, 1] == 4.0
    assert noise[0, 0] > 2.0
    assert noise[0, 2] < -2.0
    assert np.all(np.isfinite(log_det))
    draws = model.start_bijector(jnp.zeros((1, FEATURES))).forward(10 * jnp.ones((1, 3)))
    np.testing.assert_allclose(draws, [[np.sqrt(3.0), 10.0, np.sqrt(3.0)]], rtol=1e-6)


def test_without_a_linear_start_all_weights_are_trainable():
    key = jax.random.key(0)
    params, rest = initial_weights(WITHOUT_START, key, None)
    same, start = initial_weights(BLUEPRINT, key, None)
    assert jax.tree.structure(params) == jax.tree.structure(same)
    assert jax.tree.leaves(rest) == []
    assert start["start"].weight.shape == (FEATURES, 3)
