"""Simulations in which NaN marks a missing entry."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from tests import cases

PRIOR = {"a": dist.Normal(0.0, 1.0)}


def dropping(key, theta):
    """Three entries, of which the second is missing in half of the rows."""
    noise, drop = jax.random.split(key)
    x = theta["a"] + jax.random.normal(noise, (3,))
    return jnp.where(jnp.arange(3) == 1, jnp.where(jax.random.bernoulli(drop), x, jnp.nan), x)


def test_nan_marks_an_entry_and_only_infinity_or_nothing_a_row():
    x = np.array([[1.0, np.nan], [np.nan, np.nan], [np.inf, 1.0], [1.0, 2.0]])
    sims = sf.Simulations(np.zeros((4, 1)), x, missing=True)
    assert sims.valid.tolist() == [True, False, False, True]
    assert "missing=1" in repr(sims) and sims.missing
    assert sims[:2].missing and sims.only_valid().missing
    assert sf.Simulations(np.zeros((4, 1)), x).valid.tolist() == [False, False, False, True]


def test_entries_of_a_dict_may_all_be_missing_in_one_array():
    x = {"a": np.array([[np.nan], [np.nan]]), "b": np.array([1.0, np.nan])}
    assert sf.Simulations(np.zeros((2, 1)), x, missing=True).valid.tolist() == [True, False]


def test_the_warning_of_failed_rows_names_the_remedy():
    x = np.full((100, 2), np.nan)
    x[:50] = 1.0
    with pytest.warns(sf.errors.SbiFlowsWarning, match="missing=True"):
        sf.Simulations(np.zeros((100, 1)), x)


def test_simulators_with_nan_of_their_own():
    sims = sf.simulate(jax.random.key(0), PRIOR, dropping, 200, missing=True, progress=False)
    assert sims.num_valid == 200 and 60 < np.isnan(sims.x[:, 1]).sum() < 140
    with pytest.warns(sf.errors.SbiFlowsWarning):
        failed = sf.simulate(jax.random.key(0), PRIOR, dropping, 200, progress=False)
    assert failed.num_valid == 200 - np.isnan(sims.x[:, 1]).sum()


def test_hidden_rows_stay_valid():
    sims = sf.Simulations(np.zeros((400, 1)), np.ones((400, 3)))
    hidden = sims.hide(jax.random.key(1), sf.RandomEntries(0.5))
    assert hidden.missing and hidden.num_valid == 400
    assert np.isnan(hidden.x).all(axis=1).any() and not np.isnan(sims.x).any()


def test_parts_must_agree_on_the_meaning_of_nan():
    parts = [sf.Simulations(np.zeros((2, 1)), np.ones((2, 1)), missing=m) for m in (True, False)]
    with pytest.raises(ValueError, match="missing=True as in the first part"):
        sf.concatenate(parts)
    assert sf.concatenate([parts[0], parts[0]]).missing


def test_stores_know_missing_entries(tmp_path):
    path, key = tmp_path / "store.zarr", jax.random.key(0)
    store = sf.SimulationStore(path, chunk=256, missing=True)
    sims = store.simulate(key, PRIOR, dropping, 300, progress=False)
    assert sims.missing and sims.num_valid == len(sims) and sims.on_disk
    again = sf.SimulationStore(path, missing=True).simulations()
    np.testing.assert_array_equal(np.asarray(again.x[:]), np.asarray(sims.x[:]))
    with pytest.raises(ValueError, match="missing: expected True as in the store, got False"):
        sf.SimulationStore(path)
    with pytest.raises(ValueError, match="missing=True as in the store"):
        store.extend(sf.Simulations(np.zeros((2, 1)), np.ones((2, 3))))
    more = sf.Simulations(np.ones((2, 1)), np.full((2, 3), [1.0, np.nan, 2.0]), missing=True)
    assert store.extend(more).num_valid == len(sims) + 2


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_the_flag_is_true_or_false(value):
    with pytest.raises(ValueError, match="missing: expected True or False"):
        cases.unchecked(sf.Simulations, np.zeros((2, 1)), np.ones((2, 1)), missing=value)
