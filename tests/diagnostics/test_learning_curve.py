"""The learning curve: predicted gains against known ones, errors, and what a user sees."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.diagnostics.learning_curve import MIN_UNUSED, LearningCurve, extrapolate

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
        return dist.MultivariateNormal(mean, self.covariance).log_prob(jnp.asarray(theta))

    def sample(self, key, x, n):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Regression:
    """Estimator whose excess loss falls with the number of rows as in theory: exponent 1."""

    prior: sf.Prior = PRIOR
    members: int = 1
    validation_fraction: float = 0.1
    interrupted: bool = False
    sizes: list = dataclasses.field(default_factory=list)

    def fit(self, key, simulations, *, progress=True, summarise=True):
        theta, x = np.asarray(simulations.theta), np.asarray(simulations.x)
        design = np.c_[np.ones(len(x)), x]
        coefficients = np.linalg.lstsq(design, theta, rcond=None)[0]
        residual = theta - design @ coefficients
        covariance = residual.T @ residual / (len(x) - design.shape[1])
        self.sizes.append(len(x))
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
    assert np.all(np.diff(curve.gain) > 0)
    new = simulate(jax.random.key(2), 20_000)
    gains = []
    for n in (1_200, *(1_200 * f for f in FACTORS.tolist())):
        fits = [Regression().fit(None, simulate(jax.random.key(10 + i), n))[0] for i in range(3)]
        gains.append(np.mean([np.mean(fit.log_prob(new.theta, new.x)) for fit in fits]))
    rise = np.array(gains[1:]) - gains[0]
    assert rise[0] > 0.01
    assert np.all(curve.rise[:, 0] - 0.01 <= rise) and np.all(rise <= curve.rise[:, 2] + 0.01)


def test_the_limit_of_a_curve_is_not_passed():
    rows = np.array([1_000, 2_000, 4_000, 8_000])
    for exponent in (0.5, 1.0):
        deficit = 0.3 * (rows / rows[-1]) ** -exponent
        rise = extrapolate(rows, 2.0 - deficit, np.full(4, 0.005), FACTORS)
        true = 0.3 * (1.0 - FACTORS**-exponent)
        assert np.all(rise[:, 0] <= true) and np.all(true <= rise[:, 2])
        np.testing.assert_allclose(rise[0, 1], true[0], rtol=0.2)


@pytest.mark.parametrize(
    ("deficit", "error", "start"),
    [
        (0.0, 0.005, "enough simulations: with 3,200 simulations"),
        (0.3, 0.005, "more simulations help: with 3,200 simulations"),
        (0.1, 0.05, "cannot tell whether more simulations help: 3,200 simulations"),
    ],
)
def test_the_verdict_says_whether_more_simulations_help(deficit, error, start):
    rows = np.array([200, 400, 800, 1_600])
    gain, errors = 2.0 - deficit * (rows / rows[-1]) ** -0.7, np.full(4, error)
    rise = extrapolate(rows, gain, errors, FACTORS)
    curve = LearningCurve(rows, gain, errors, FACTORS, rise, 400, 0)
    assert curve.verdict.startswith(start)
    assert (rise[0, 0] >= MIN_UNUSED) == start.startswith("more")


def test_the_report_prints_saves_and_plots(curve):
    text = repr(curve)
    assert text.startswith(curve.verdict) and "300 held-out rows" in text
    assert "12,000 (predicted)" in text
    assert json.loads(json.dumps(curve.to_dict()))["rows"] == curve.rows.tolist()
    ax = curve.plot()
    assert ax.get_xlabel() == "simulations" and len(ax.lines) >= 2


def test_the_same_key_gives_the_same_curve_and_failed_rows_are_left_out(curve):
    sims = simulate(jax.random.key(0), 1_500)
    failed = np.full((100, ENTRIES), np.nan)
    more = sf.Simulations(
        np.concatenate([sims.theta, np.zeros((100, 2))]), np.concatenate([sims.x, failed])
    )
    again = sf.learning_curve(jax.random.key(1), Regression(), more, progress=False)
    np.testing.assert_array_equal(again.gain, curve.gain)


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
    assert estimator.sizes == 2 * [100, 200, 400, 800]


def test_an_interrupted_fit_ends_the_curve():
    sims = simulate(jax.random.key(0), 1_000)
    with pytest.raises(KeyboardInterrupt):
        sf.learning_curve(jax.random.key(1), Regression(interrupted=True), sims, progress=False)


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
