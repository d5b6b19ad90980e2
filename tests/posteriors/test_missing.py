"""Posteriors given observations that lack entries, against exact Gaussian posteriors."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from tests import cases

SENSORS, NOISE = 6, 0.6
DESIGN = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 1], [1, -1]], np.float32)
PRIOR = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
SMALL = sf.MAF(transforms=2, hidden=(32,), context_width=32, context_blocks=1)


def sensors(key, theta):
    return DESIGN @ theta + NOISE * jax.random.normal(key, (SENSORS,))


def exact(x):
    """Mean and covariance given the sensors that are not NaN."""
    seen = ~np.isnan(x)
    precision = np.eye(2) + DESIGN[seen].T @ DESIGN[seen] / NOISE**2
    covariance = np.linalg.inv(precision)
    return covariance @ DESIGN[seen].T @ x[seen] / NOISE**2, covariance


@pytest.fixture(scope="module")
def fit():
    keys = jax.random.split(jax.random.key(0), 2)
    sims = sf.simulate(keys[0], PRIOR, sensors, 6000, progress=False)
    training = sf.Training(max_epochs=25, batch_size=128)
    npe = sf.NPE(PRIOR, SMALL, training=training, members=1, missing=sf.RandomEntries(0.3))
    return npe.fit(keys[1], sims, progress=False)


@pytest.fixture(scope="module")
def posterior(fit):
    return fit[0]


COMPLETE = np.array([0.9, 0.5, -0.3, -0.8, 0.2, 1.3], np.float32)
MASKS = {
    "complete": (),
    "one missing": (4,),
    "a third missing": (0, 3),
    "one parameter unseen": (2, 3, 4, 5),
    "nothing present": (0, 1, 2, 3, 4, 5),
}


def lacking(name):
    x = COMPLETE.copy()
    x[list(MASKS[name])] = np.nan
    return x


@pytest.mark.parametrize("name", MASKS)
def test_draws_have_the_exact_mean_and_covariance(posterior, name):
    x = lacking(name)
    draws = np.asarray(posterior.sample(jax.random.key(1), x, 4000))
    mean, covariance = exact(x)
    sd = np.sqrt(np.diag(covariance))
    assert np.max(np.abs(draws.mean(axis=0) - mean) / sd) < 0.3
    np.testing.assert_allclose(draws.std(axis=0), sd, rtol=0.2)


def test_batches_jit_grad_and_vmap(posterior):
    rows = np.stack([lacking(name) for name in MASKS])
    at, theta = posterior.at(rows), np.zeros((len(rows), 2), np.float32)
    each = np.array([posterior.log_prob(t, x) for t, x in zip(theta, rows, strict=True)])
    np.testing.assert_allclose(jax.jit(at.log_prob)(theta), each, atol=1e-4)
    by_vmap = jax.vmap(lambda x: posterior.log_prob(jnp.zeros(2), x))(jnp.asarray(rows))
    np.testing.assert_allclose(by_vmap, each, atol=1e-4)
    in_x = jax.grad(lambda x: posterior.log_prob(jnp.zeros(2), x))(jnp.asarray(rows[2]))
    assert np.all(np.isfinite(in_x))
    assert np.all(np.asarray(in_x)[list(MASKS["a third missing"])] == 0.0)
    assert np.any(np.asarray(in_x) != 0.0)


def test_the_value_of_a_missing_entry_does_not_exist(posterior):
    """A zero is a measurement, and NaN is none."""
    x, zero = lacking("one missing"), lacking("one missing")
    zero[4] = 0.0
    theta = np.array([0.5, -0.5], np.float32)
    assert abs(posterior.log_prob(theta, x) - posterior.log_prob(theta, zero)) > 1e-3


def test_saved_and_loaded(posterior, tmp_path):
    posterior.save(tmp_path / "p.sbif")
    loaded = sf.load(tmp_path / "p.sbif")
    x, key = lacking("a third missing"), jax.random.key(2)
    np.testing.assert_array_equal(loaded.sample(key, x, 10), posterior.sample(key, x, 10))
    assert loaded.missing.pattern == sf.RandomEntries(0.3)
    assert np.all(loaded.missing.can_miss)


def test_the_check_hides_entries_as_the_fit_did(posterior):
    report = sf.check(
        jax.random.key(3), posterior, sensors, datasets=400, draws=100, progress=False
    )
    assert report.calibrated and report.num_failed == 0
    sims = sf.simulate(jax.random.key(4), PRIOR, sensors, 400, progress=False)
    hidden = sims.hide(jax.random.key(5), sf.RandomEntries(0.8))
    given = sf.check(jax.random.key(6), posterior, simulations=hidden, draws=100, progress=False)
    # less is known from fewer entries
    assert given.information.gain < report.information.gain - 0.1


@pytest.mark.slow
def test_the_history_is_checked_with_hidden_entries(fit):
    posterior, history = fit
    sims = sf.simulate(jax.random.split(jax.random.key(0), 2)[0], PRIOR, sensors, 6000)
    report = sf.check(
        jax.random.key(7), posterior, simulations=sims, history=history, draws=100, progress=False
    )
    assert report.calibrated


def test_the_gate_knows_masks(posterior):
    for name in MASKS:
        assert not posterior.misspecification(lacking(name)).flagged
    far = lacking("a third missing")
    far[1] = 40.0
    found = posterior.misspecification(far)
    assert found.flagged and "x[1]" in found.off


def test_the_gate_keeps_its_level_whatever_is_missing(posterior):
    sims = sf.simulate(jax.random.key(12), PRIOR, sensors, 400, progress=False)
    for hidden in ((), (0,), (1, 2, 4)):
        x = np.array(sims.x)
        x[:, hidden] = np.nan
        flagged = posterior.misspecification(x).flagged(0.05)
        assert 0.01 < np.mean(flagged) < 0.12


def test_predictive_check_compares_present_entries(posterior):
    x = lacking("a third missing")
    result = sf.predictive_check(jax.random.key(8), posterior, x, sensors, progress=False)
    assert result.labels == ("x[1]", "x[2]", "x[4]", "x[5]") and result.distance_p > 0.01
    with pytest.raises(ValueError, match="at least one entry that is present"):
        sf.predictive_check(
            jax.random.key(8), posterior, lacking("nothing present"), sensors, progress=False
        )


def test_data_sensitivity_moves_present_entries(posterior):
    x = lacking("one parameter unseen")
    result = sf.data_sensitivity(jax.random.key(9), posterior, x, progress=False)
    assert result.entries == ("x[0]", "x[1]")
    assert np.all(np.abs(result.shift[0]) > 3 * np.abs(result.shift[1]))


def test_arviz_holds_the_observation_with_its_gaps(posterior):
    x = lacking("one missing")
    data = posterior.to_arviz(jax.random.key(10), x, n=100)
    np.testing.assert_array_equal(np.asarray(data["observed_data"]["x"]), x)


@pytest.mark.slow
def test_local_check_with_missing_entries(posterior):
    report = sf.check_at(
        jax.random.key(11),
        posterior,
        lacking("a third missing"),
        sensors,
        simulations=1000,
        progress=False,
    )
    assert report.p_value > 0.01


def test_complete_fits_refuse_nan_and_say_what_to_do():
    sims = sf.simulate(jax.random.key(0), PRIOR, sensors, 200, progress=False)
    npe = sf.NPE(PRIOR, sf.MAF(transforms=1), training=sf.Training(max_epochs=1), members=1)
    posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
    with pytest.raises(ValueError, match="missing=True"):
        posterior.sample(jax.random.key(2), lacking("one missing"), 10)


@pytest.mark.parametrize(
    "settings", [{"screening": 0.1}, {"emulator": sf.Emulator()}], ids=lambda s: next(iter(s))
)
def test_settings_that_need_complete_observations_are_refused(settings):
    with pytest.raises(ValueError, match="expected none together with missing="):
        sf.NPE(PRIOR, missing=sf.RandomEntries(0.2), **settings)
    sims = sf.Simulations(np.zeros((50, 2)), np.ones((50, 3)), missing=True)
    with pytest.raises(ValueError, match="with missing entries"):
        sf.NPE(PRIOR, **settings).fit(jax.random.key(0), sims)


def test_patterns_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="missing: expected one such as"):
        cases.unchecked(sf.NPE, PRIOR, missing=0.2)


def test_patterns_that_do_not_suit_the_observation_are_refused():
    sims = sf.simulate(jax.random.key(0), PRIOR, sensors, 50, progress=False)
    with pytest.raises(ValueError, match="at least 9 elements"):
        sf.NPE(PRIOR, missing=sf.RandomSubset(1, 9)).fit(jax.random.key(0), sims)
