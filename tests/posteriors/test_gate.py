"""The warning about observations that are not typical of the simulations."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sbi_flows as sf
from sbi_flows.observations.standardise import fit_standardiser
from sbi_flows.observations.typicality import fit_typicality
from sbi_flows.posteriors.gate import LEVEL, gate

ROWS = np.random.default_rng(0).normal(size=(2_000, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def known():
    standardiser = fit_standardiser(jnp.asarray(ROWS))
    return fit_typicality(jax.random.key(0), lambda f: (f,), standardiser, ROWS)


def ask(known, rows):
    features = jnp.asarray(rows, jnp.float32)
    gate(known, features, lambda: ("a", "b"), lambda: ((np.asarray(features),), None))


@pytest.mark.parametrize("count", [1, 2, 50])
def test_observations_far_away_warn_once_however_many_they_are(known, count):
    rows = 20.0 + np.random.default_rng(count).normal(size=(count, 2))
    with pytest.warns(sf.SbiFlowsWarning, match="not typical of the training simulations"):
        ask(known, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask(known, rows)


@pytest.mark.parametrize("count", [1, 5, 50])
def test_observations_of_the_simulator_warn_as_rarely_as_the_level_says(known, count):
    rng, warned = np.random.default_rng(7), 0
    for _ in range(200):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            ask(known, rng.normal(size=(count, 2)))
        warned += len(found)
    # at most a few of two hundred, at a level of 1%
    assert warned <= 200 * LEVEL + 4 * np.sqrt(200 * LEVEL)
