"""The learning curve: predicted gains against known ones, errors, and what a user sees."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

import sbi_flows as sf
from sbi_flows.diagnostics.learning_curve import (
    MIN_UNUSED,
    LearningCurve,
    _split,
    extrapolate,
)

PRIOR = sf.as_prior(dist.Normal(0.0, 1.0).expand([2]))
ENTRIES = 40
FACTORS = np.array([2, 4, 10])
DESIGN = np.random.default_rng(0).normal(size=(ENTRIES, 2)) / 20


def simulate(key, n):
    theta_key, noise_key = jax.random.split(key)
    theta = PRIOR.sample(theta_key, n)
    x = theta @ DESIGN.T + jax.random.normal(noise_key, (n, ENTRIES))
    return sf.Simulations(theta, x)


@dataclasses.dataclass(frozen=True)
class Regressed:
    """Gaussian about a linear regression; `log_prob` as a posterior's."""

    coefficients: np.ndarray
    covariance: np.ndarray
    prior: sf.Prior = PRIOR

    def log_prob(self, theta, x):
        mean = np.c_[np.ones(len(x)), x] @ self.coefficients
        theta = np.asarray(theta)
        residual = theta - np.reshape(mean, (len(x), *[1] * (theta.ndim - 2), 2))
        return jnp.asarray(stats.multivariate_normal(np.zeros(2), self.covariance).logpdf(residual))

    def sample(self, key, x, n):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Regression:
    """Estimator whose excess loss falls with the number of rows as in theory: exponent 1."""

    prior: sf.Prior = PRIOR
    members: int = 1
    validation_fraction: float = 0.1
    interrupted: bool = False
    failed: list = dataclasses.field(default_factory=list)

    def fit(self, key, simulations, *, progress=True, summarise=True):
        self.failed.append(len(simulations) - simulations.num_valid)
        simulations = simulations.only_valid()
        theta, x = np.asarray(simulations.theta), np.asarray(simulations.x)
        design = np.c_[np.ones(len(x)), x]
        coefficients = np.linalg.lstsq(design, theta, rcond=None)[0]
        residual = theta - design @ coefficients
        covariance = residual.T @ residual / (len(x) - design.shape[1])
        history = SimpleNamespace(
            held_out=np.zeros((1, 0), int),
            held_out_log_prob=np.zeros((1, 0)),
            interrupted=self.interrupted,
        )
        return Regressed(coefficients, covariance), history

    def with_prior(self, prior):
        return dataclasses.replace(self, prior=prior)

    def with_checkpoint_folder(self, name):
        return self


@pytest.fixture(scope="module")
def curve():
    sims = simulate(jax.random.key(0), 1_500)
    return sf.learning_curve(jax.random.key(1), Regression(), sims, progress=False)


def test_the_predicted_gain_is_that_of_fits_to_more_simulations(curve):
    assert curve.rows.tolist() == [150, 300, 600, 1_200]
    assert curve.more.tolist() == [1_500, 3_000, 6_000, 15_000]
    assert np.all(np.diff(curve.gain) > 0) and curve.doubt == ""
    new = simulate(jax.random.key(2), 20_000)
    gains = []
    for n in (1_200, *curve.more.tolist()):
        fits = [Regression().fit(None, simulate(jax.random.key(10 + i), n))[0] for i in range(3)]
        gains.append(np.mean([np.mean(fit.log_prob(new.theta, new.x)) for fit in fits]))
    rise = np.array(gains[1:]) - gains[0]
    assert rise[1] > 0.01
    predicted = curve.predicted - curve.gain[-1]
    assert np.all(predicted[:, 0] - 0.01 <= rise) and np.all(rise <= predicted[:, 2] + 0.01)
    assert curve.rise[0] - 0.01 <= gains[2] - gains[1] <= curve.rise[2] + 0.01


ROWS = np.array([1_000, 2_000, 4_000, 8_000])


def made(deficit, error, exponent=0.7):
    """Curve of gains that follow a power law, to 2, 4 and 10 times the rows of the last fit."""
    gain = 2.0 - deficit * (ROWS / ROWS[-1]) ** -exponent
    covariance = np.diag(np.full(4, error**2)) + 0.1  # the rows are those of all fits
    more = ROWS[-1] * FACTORS
    rise, misfit = extrapolate(ROWS, gain, covariance, int(ROWS[-1]), more)
    more = np.append(ROWS[-1], more)
    errors = np.full(4, error)
    return LearningCurve(ROWS, gain, errors, more, gain[-1] + rise, rise[0], misfit, 400, 0)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_the_limit_of_a_curve_is_predicted(exponent):
    curve = made(0.3, 0.005, exponent)
    rise, true = curve.predicted - curve.gain[-1], 0.3 * (1.0 - FACTORS**-exponent)
    assert np.all(rise[:, 0] <= true) and np.all(true <= rise[:, 2])
    np.testing.assert_allclose(rise[0, 1], true[0], rtol=0.2)


@pytest.mark.parametrize(
    ("deficit", "error", "start"),
    [
        (0.0, 0.005, "enough simulations: with 16,000 simulations"),
        (0.3, 0.005, "more simulations help: with 16,000 simulations"),
        (0.1, 0.05, "cannot tell whether more simulations help: 16,000 simulations"),
    ],
)
def test_the_verdict_says_whether_more_simulations_help(deficit, error, start):
    curve = made(deficit, error)
    assert curve.verdict.startswith(start)
    assert (curve.rise[0] >= MIN_UNUSED) == start.startswith("more")


def test_a_curve_that_does_not_flatten_has_a_lower_limit():
    curve = made(0.3, 0.005)
    assert not curve.is_steepening
    steep = dataclasses.replace(curve, gain=np.array([1.0, 1.1, 1.3, 1.6]))
    low = f"by {curve.rise[0]:.2g} nats or more; the curve does not flatten yet"
    assert steep.is_steepening and steep.verdict.endswith(low)


def test_a_curve_that_cannot_be_trusted_is_not():
    curve = made(0.0, 0.005)
    broken = np.array([1.0, 1.2, 1.3, 0.9])  # the last fit failed
    misfit = extrapolate(ROWS, broken, 1e-4 * np.eye(4), 8_000, ROWS[-1:] * 2)[1]
    for reason, change in {
        "do not follow a power law": {"misfit": misfit},
        "learned nothing": {"gain": np.zeros(4)},
        "the density of 50 held-out rows is zero": {"num_left_out": 50},
    }.items():
        assert curve.doubt == ""
        text = dataclasses.replace(curve, **change).verdict
        assert text.startswith("cannot tell whether more simulations help") and reason in text


def test_the_report_prints_saves_and_plots(curve):
    text = repr(curve)
    assert text.startswith(curve.verdict) and "300 held-out rows" in text
    assert text.count("predicted") == 4
    assert json.loads(json.dumps(curve.to_dict()))["rows"] == curve.rows.tolist()
    ax = curve.plot()
    assert ax.get_xlabel() == "simulations" and len(ax.lines) >= 2


def test_the_same_key_gives_the_same_curve_and_failed_rows_are_shared_out(curve):
    sims = simulate(jax.random.key(0), 1_500)
    failed = np.full((80, ENTRIES), np.nan)
    more = sf.Simulations(
        np.concatenate([sims.theta, np.zeros((80, 2))]), np.concatenate([sims.x, failed])
    )
    estimator = Regression()
    again = sf.learning_curve(jax.random.key(1), estimator, more, progress=False)
    np.testing.assert_array_equal(again.gain, curve.gain)
    assert estimator.failed == [10, 20, 40, 80]


def test_few_rows_are_refused_and_rows_on_disk_accepted(tmp_path):
    key, estimator = jax.random.key(0), Regression()
    sims = simulate(key, 1_000)
    with pytest.raises(ValueError, match="at least 1,000 valid rows, got 900"):
        sf.learning_curve(key, estimator, sims[:900])
    np.save(tmp_path / "x.npy", np.asarray(sims.x))
    stored = sf.Simulations(sims.theta, np.load(tmp_path / "x.npy", mmap_mode="r"))
    on_disk = sf.learning_curve(key, estimator, stored, progress=False)
    in_memory = sf.learning_curve(key, estimator, sims, progress=False)
    np.testing.assert_array_equal(on_disk.gain, in_memory.gain)


def test_an_interrupted_fit_ends_the_curve():
    sims = simulate(jax.random.key(0), 1_000)
    with pytest.raises(KeyboardInterrupt):
        sf.learning_curve(jax.random.key(1), Regression(interrupted=True), sims, progress=False)


def test_rows_that_a_small_fit_would_refuse_are_left_out():
    sims = simulate(jax.random.key(0), 1_000)
    x = np.array(sims.x)
    x[::3, 0], x[::331, 1] = np.nan, np.nan  # one common gap, and one of four rows
    gaps = sf.Simulations(sims.theta, x, missing=True)
    parts, held_out = _split(jax.random.key(3), gaps)
    lacks = [np.isnan(np.asarray(s.x)).any(axis=0)[:2] for s in (parts[0], held_out)]
    assert lacks[0][0] and np.all(lacks[0] >= lacks[1])
    assert 190 <= len(held_out) <= 200


@pytest.mark.slow
def test_entries_are_hidden_as_in_the_fits():
    sims = simulate(jax.random.key(0), 1_000)
    npe = sf.NPE(
        PRIOR,
        sf.MAF(transforms=1),
        members=1,
        training=sf.Training(max_epochs=1),
        missing=sf.RandomEntries(0.3),
    )
    curve = sf.learning_curve(jax.random.key(1), npe, sims, progress=False)
    assert np.all(np.isfinite(curve.gain)) and curve.num_left_out == 0
