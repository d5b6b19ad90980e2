"""Values that single precision cannot hold are standardised in double precision on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.core.doubles import needs_double
from sbi_flows.observations.origin import fit_origin
from sbi_flows.observations.standardise import features_of, fit_standardiser

RNG = np.random.default_rng(3)
THETA = RNG.normal(size=(1_000, 1))
Z = THETA + 0.2 * RNG.normal(size=(1_000, 1))
SCALES = {
    "Julian dates": lambda z: 2459000.5 + 0.04 * z,
    "GPS seconds": lambda z: 1126259462.4 + 0.01 * z,
    "nanoseconds": lambda z: np.round(1.7e18 + 1e6 * z).astype(np.int64),
    "1e-31": lambda z: 1e-31 * z,
    "1e-300": lambda z: 1e-300 * z,
    "1e39": lambda z: 1e39 * z,
    "1e300": lambda z: 1e300 * z,
    "logarithms of 1e-35": lambda z: 1e-35 * np.exp(z),
}


@pytest.mark.parametrize("name", SCALES)
def test_features_are_those_of_ordinary_units(name):
    x = SCALES[name](Z)
    sims = sf.Simulations(THETA, x)
    assert sims.num_valid == 1_000
    assert isinstance(sims.x, np.ndarray) and sims.x.dtype == np.float64
    standardiser = fit_standardiser(sims.x)
    features = np.asarray(features_of(standardiser, sims.x))
    if "logarithms" not in name:
        ordinary = fit_standardiser(jnp.asarray(Z))(jnp.asarray(Z))
        np.testing.assert_allclose(features, ordinary, atol=5e-4)
    assert 0.5 < features.std() < 2 and abs(np.median(features)) < 0.1
    assert np.corrcoef(features[:, 0], Z[:, 0])[0, 1] > 0.98
    back = standardiser.inverse(jnp.asarray(features))
    assert back.dtype == np.float64
    np.testing.assert_allclose((back - x) / np.ptp(x), 0.0, atol=1e-5)


def test_ordinary_values_have_no_origin():
    for x in (Z, 300 + Z, 1e6 * Z, np.full((50, 1), 2459000.5), np.arange(9.0)[:, None]):
        assert not needs_double(np.asarray(x, float))
        assert fit_origin(sf.Simulations(np.zeros((len(x), 1)), x).x) is None


@pytest.mark.parametrize("rows", [5, 5_000])
def test_a_value_beyond_single_precision_is_found_in_any_row(rows):
    x = np.zeros((rows, 2))
    x[rows - 2, 1] = 1e39
    assert needs_double(x)
    sims = sf.Simulations(np.zeros((rows, 1)), x)
    assert sims.num_valid == rows


def test_only_the_columns_that_need_it_are_moved():
    x = {"t": 2459000.5 + 0.04 * Z[:, 0], "n": np.round(100 * Z[:, 0]).astype(int), "z": Z}
    sims = sf.Simulations(THETA, x)
    assert sims.x["n"].dtype == jnp.int32 and isinstance(sims.x["z"], jax.Array)
    origin = fit_origin(sims.x)
    assert origin is not None
    np.testing.assert_array_equal(np.asarray(origin.high) != 0, [False, True, False])
    np.testing.assert_array_equal(origin.exponent, 0)
    relative = origin.subtract(sims.x)
    np.testing.assert_allclose(relative["t"], 0.04 * (Z[:, 0] - np.median(Z)), atol=1e-8)
    np.testing.assert_array_equal(relative["z"], np.asarray(Z, np.float32))


@pytest.fixture(scope="module")
def dates():
    prior = dist.Normal(0, 1).expand([1])
    sims = sf.Simulations(THETA, SCALES["Julian dates"](Z))
    npe = sf.NPE(prior, sf.MAF(transforms=1), training=sf.Training(max_epochs=6), members=1)
    return npe.fit(jax.random.key(1), sims[200:], progress=False)[0], sims


@pytest.mark.promotes
def test_a_posterior_given_a_julian_date(dates, tmp_path):
    posterior, _ = dates
    x = np.array([2459000.5 + 0.04 * 0.3])
    draws = np.asarray(posterior.sample(jax.random.key(2), x, 4_000))
    # the conjugate answer
    assert abs(draws.mean() - 0.3 / 1.04) < 0.06
    assert 0.15 < draws.std() < 0.25
    path = tmp_path / "dates.sbif"
    posterior.save(path)
    loaded = sf.load(path)
    assert loaded.observation.dtype == np.float64
    np.testing.assert_array_equal(draws, loaded.sample(jax.random.key(2), x, 4_000))
    batch = np.stack([x, x + 0.04])
    both = np.asarray(posterior.sample(jax.random.key(2), batch, 1_000))
    assert 0.7 < both[1].mean() - both[0].mean() < 1.2
    # the origin survives a round trip through a compiled function
    same = jax.jit(lambda p: p)(posterior)
    np.testing.assert_array_equal(draws, same.sample(jax.random.key(2), x, 4_000))


@pytest.mark.slow
@pytest.mark.promotes
def test_reports_about_a_posterior_given_julian_dates(dates):
    posterior, sims = dates
    ranks = sf.sbc(jax.random.key(3), posterior, sims[:200], progress=False)
    assert ranks.uniform.shape == (200, 1) and ranks.ks > 1e-4
    x = np.array([2459000.5 + 0.04 * 0.3])
    assert not posterior.misspecification(x, level=0.01).flagged
    assert posterior.misspecification(x + 1.0).flagged
    unit = sf.data_sensitivity(jax.random.key(4), posterior, x, progress=False)
    np.testing.assert_allclose(unit.high - unit.low, 0.04, rtol=0.2)


@pytest.mark.slow
@pytest.mark.promotes
def test_a_file_that_is_mapped_into_memory(tmp_path):
    x = SCALES["Julian dates"](Z)
    np.save(tmp_path / "x.npy", x)
    sims = sf.Simulations(THETA, np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert sims.on_disk and sims.x.dtype == np.float64
    prior = dist.Normal(0, 1).expand([1])
    npe = sf.NPE(prior, sf.MAF(transforms=1), training=sf.Training(max_epochs=6), members=1)
    posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
    draws = np.asarray(posterior.sample(jax.random.key(2), np.array([2459000.512]), 2_000))
    assert abs(draws.mean() - 0.3 / 1.04) < 0.08 and draws.std() < 0.3


@pytest.mark.promotes
def test_an_observation_that_was_rounded_is_refused(dates):
    posterior, _ = dates
    message = "NumPy numbers of float64, because single precision cannot hold"
    with pytest.raises(ValueError, match=message):
        posterior.log_prob(jnp.zeros(1), jnp.array([2459000.5]))
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda x: posterior.log_prob(jnp.zeros(1), x))(jnp.array([2459000.5]))
    assert np.isfinite(posterior.log_prob(jnp.zeros(1), [2459000.5]))


def test_a_single_row_is_kept_exactly():
    sims = sf.Simulations(np.zeros((1, 1)), [[2459000.54]])
    assert sims.x[0, 0] == 2459000.54
    assert isinstance(sf.Simulations(np.zeros((1, 1)), [[0.1]]).x, jax.Array)


@pytest.mark.slow
@pytest.mark.promotes
def test_the_emulator_falls_back_with_the_users_simulations():
    prior = sf.as_prior({"t": dist.Uniform(2459000.0, 2459001.0)})
    theta = prior.sample(jax.random.key(0), 200)
    sims = sf.Simulations(theta, np.concatenate([theta, theta], axis=1))
    emulator = sf.Emulator(max_features=1)
    settings = {"members": 1, "training": sf.Training(max_epochs=1)}
    npe = sf.NPE(prior, sf.MAF(transforms=1), emulator=emulator, **settings)
    with pytest.warns(sf.SbiFlowsWarning, match="trained without the emulator"):
        posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
    draws = posterior.sample(jax.random.key(2), np.full(2, 2459000.3), 50)
    assert np.all((draws > 2459000.0) & (draws < 2459001.0))
