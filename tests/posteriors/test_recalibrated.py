"""Corrections of wrong posteriors, measured on data sets that they have not seen."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.core.errors import SbiFlowsError
from sbi_flows.posteriors.adapter import as_posterior
from sbi_flows.posteriors.conformal import order_of
from sbi_flows.posteriors.quantile_maps import quantile_map, quantiles_of
from sbi_flows.prior.prior import as_prior

KEY = jax.random.key(3)
LEVELS = (0.5, 0.8, 0.95)
WRONG = {
    "narrow": {"scale": 1 / 1.5},
    "wide": {"scale": 1.5},
    "biased": {"shift": 1.0},
    "narrow and biased": {"scale": (1 / 1.5, 1.0), "shift": (0.0, -0.7)},
}


@pytest.fixture(scope="module")
def calibration(gaussian, simulator):
    return sf.simulate(jax.random.key(1), gaussian().prior, simulator, 10_000, progress=False)


@pytest.fixture(scope="module")
def fresh(gaussian, simulator):
    return sf.simulate(jax.random.key(2), gaussian().prior, simulator, 2_000, progress=False)


@pytest.fixture(scope="module")
def skewed(gaussian):
    """Draws and densities of the wrong shape: a half of the posterior is twice as wide."""

    class Skewed(type(gaussian())):
        def sample_and_log_prob(self, key, x, n):
            draws, _ = super().sample_and_log_prob(key, x, n)
            mean = self.moments(x)[0][..., None, :]
            draws = mean + (draws - mean) * jnp.where(draws > mean, 2.0, 1.0)
            return draws, self.log_prob(draws, x)

        def log_prob(self, theta, x):
            mean, sd = self.moments(jnp.asarray(x))
            if jnp.ndim(theta) > mean.ndim:
                mean, sd = mean[..., None, :], sd[..., None, :]
            width = sd * jnp.where(theta > mean, 2.0, 1.0)
            log = -0.5 * ((theta - mean) / width) ** 2 - jnp.log(width)
            return jnp.sum(log, axis=-1)

    return Skewed(gaussian().prior, (1.0, 1.0), (0.0, 0.0))


@pytest.mark.parametrize("knobs", WRONG.values(), ids=WRONG)
def test_conformal_sets_hold_what_they_promise(gaussian, calibration, fresh, knobs):
    wrong = gaussian(**knobs)
    before = sf.coverage(KEY, wrong, fresh, draws=100)
    assert max(abs(before.at(c) - c) for c in LEVELS) > 0.06
    sets = sf.conformal(KEY, wrong, calibration, draws=100)
    after = sf.coverage(jax.random.key(4), sets, fresh, draws=100)
    for level in LEVELS:
        assert after.at(level) == pytest.approx(level, abs=0.02)
        held = float(jnp.mean(sets.contains(fresh.theta, fresh.x, level)))
        assert held == pytest.approx(level, abs=0.02)
    assert after.ks > 0.01


def test_conformal_sets_of_a_skewed_posterior(skewed, calibration, fresh):
    sets = sf.conformal(KEY, skewed, calibration, draws=100)
    found = sf.coverage(jax.random.key(4), sets, fresh, draws=100)
    assert [found.at(c) for c in LEVELS] == pytest.approx(LEVELS, abs=0.02)


def test_a_set_is_the_posteriors_own_of_another_level(gaussian, calibration):
    """1.5 times too narrow in two dimensions: 1 - (1 - c)^(1.5^2) exactly."""
    sets = sf.conformal(KEY, gaussian(scale=1 / 1.5), calibration, draws=100)
    assert sets.level(0.5) == pytest.approx(1 - 0.5**2.25, abs=0.03)
    x = jnp.zeros(2)
    theta = jnp.linspace(0.0, 2.0, 50)[:, None] * jnp.ones((1, 2))
    inside = np.array([sets.contains(theta, x, c) for c in LEVELS])
    assert (np.diff(inside.astype(int), axis=0) >= 0).all()  # nested
    assert (np.diff(inside.astype(int), axis=1) <= 0).all() and inside[:, 0].all()
    assert not inside[:, -1].any()
    assert not np.isfinite(sets.score(jnp.full((1, 2), jnp.inf), x)).any()


def test_conformal_coverage_is_exact_at_any_number_of_simulations(gaussian):
    """Uniform scores: the share below the k-th of N is k / (N + 1) on average."""
    rng = np.random.default_rng(0)
    for level, n in ((0.5, 4), (0.8, 9), (0.9, 9), (0.7, 9)):
        k = order_of(level, n)
        assert (k - 1) / (n + 1) < level <= k / (n + 1) + 1e-12
        bounds = np.sort(rng.uniform(size=(40_000, n)), axis=1)[:, k - 1]
        assert bounds.mean() == pytest.approx(k / (n + 1), abs=0.005)
    assert order_of(0.07, 99) == 7  # 100 * .07 is more than 7 in floating point
    posterior = as_posterior(gaussian(), jax.ShapeDtypeStruct((2,), float))
    few = sf.ConformalPosterior(posterior, np.linspace(-1.0, 1.0, 9), 0, 100, KEY)
    assert few.level(0.5) == pytest.approx(0.5)
    assert few.level(0.9) == pytest.approx(NormalDist().cdf(1.0))
    with pytest.raises(
        ValueError, match=r"at most 0\.9, the most that 9 calibration simulations allow"
    ):
        few.level(0.95)
    with pytest.raises(ValueError, match="level: expected a number between 0 and 1"):
        few.contains(jnp.zeros(2), jnp.zeros(2), 1.0)


@pytest.mark.parametrize("knobs", WRONG.values(), ids=WRONG)
def test_ranks_are_uniform_after_recalibration(gaussian, calibration, fresh, knobs):
    wrong = gaussian(**knobs)
    right = sf.recalibrate(KEY, wrong, calibration[:1_000], draws=150)
    fresh = fresh[:1_000]
    found = sf.sbc(jax.random.key(4), right, fresh, draws=100)
    assert found.shift == pytest.approx([0.0, 0.0], abs=0.12)
    assert found.width == pytest.approx([1.0, 1.0], rel=0.08)
    draws, log_prob = right.sample_and_log_prob(KEY, fresh.x[:20], 7)
    np.testing.assert_allclose(right.log_prob(draws, fresh.x[:20]), log_prob, atol=2e-3)
    exact = jnp.mean(gaussian().log_prob(fresh.theta, fresh.x))
    lost = float(exact - jnp.mean(right.log_prob(fresh.theta, fresh.x)))
    assert lost < 0.1 < 0.2 < float(exact - jnp.mean(wrong.log_prob(fresh.theta, fresh.x)))


@pytest.mark.slow
def test_a_shape_is_recalibrated_and_the_joint_sets_with_it(skewed, calibration, fresh):
    assert (sf.sbc(KEY, skewed, fresh, draws=100).ks < 1e-6).all()
    right = sf.recalibrate(KEY, skewed, calibration[:1_000], draws=150)
    assert (sf.sbc(KEY, right, fresh[:500], draws=100).ks > 1e-3).all()
    sets = sf.conformal(KEY, right, calibration[1_000:3_000], draws=100)
    found = sf.coverage(KEY, sets, fresh[:500], draws=100)
    assert found.at(0.8) == pytest.approx(0.8, abs=0.05)
    assert found.central[79] == pytest.approx([0.8, 0.8], abs=0.06)


@pytest.mark.slow
def test_check_takes_both(gaussian, simulator, calibration):
    wrong = gaussian(scale=1 / 1.5)
    sizes = {"datasets": 300, "draws": 100, "progress": False}
    right = sf.recalibrate(KEY, wrong, calibration[:2_000], draws=150)
    assert sf.check(jax.random.key(8), right, simulator, **sizes).calibrated
    # sets are corrected, draws are not, and the verdict says so
    sets = sf.conformal(KEY, wrong, calibration, draws=100)
    report = sf.check(jax.random.key(8), sets, simulator, **sizes)
    assert report.coverage.ks > 0.01
    assert report.verdict.startswith("over-confident in every parameter")


@pytest.mark.promotes
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.slow
def test_a_recalibrated_density_integrates_to_one_inside_the_support(gaussian, x64):
    with jax.enable_x64(x64):
        prior = as_prior({"p": dist.Uniform(0.0, 1.0), "rate": dist.LogNormal(0.0, 1.0)})

        class Beta(type(gaussian())):
            """Whatever x, a wrong posterior inside the prior's support."""

            def sample_and_log_prob(self, key, x, n):
                p = jax.random.beta(key, 4.0, 2.0, (len(x), n))
                rate = jnp.exp(0.3 * jax.random.normal(key, (len(x), n)))
                draws = jnp.stack([p, rate], axis=-1)
                return draws, self.log_prob(draws, x)

            def log_prob(self, theta, x):
                p, rate = theta[..., 0], theta[..., 1]
                return dist.Beta(4.0, 2.0).log_prob(p) + dist.LogNormal(0.0, 0.3).log_prob(rate)

        posterior = Beta(prior, (1.0, 1.0), (0.0, 0.0))
        sims = sf.Simulations(prior.sample(KEY, 400), np.zeros((400, 2)))
        right = sf.recalibrate(KEY, posterior, sims, draws=200)
        draws = right.sample(KEY, jnp.zeros((1, 2)), 500)
        assert draws.dtype == (jnp.float64 if x64 else jnp.float32)
        assert bool(jnp.all(prior.contains(draws)))
        p, log_rate = np.linspace(0.0005, 0.9995, 400), np.linspace(-7.0, 7.0, 400)
        grid = np.stack(np.meshgrid(p, np.exp(log_rate), indexing="ij"), axis=-1)
        density = np.exp(right.log_prob(grid.reshape(1, -1, 2), jnp.zeros((1, 2))))
        cell = (p[1] - p[0]) * (log_rate[1] - log_rate[0]) * grid[..., 1].ravel()
        assert np.sum(density[0] * cell) == pytest.approx(1.0, abs=0.03)
        outside = jnp.array([[[-0.1, 1.0], [1.5, 1.0], [0.5, -1.0]]])
        assert bool(jnp.all(jnp.isneginf(right.log_prob(outside, jnp.zeros((1, 2))))))


def test_they_say_what_they_are_and_count_failures(gaussian, calibration):
    x = np.array(calibration.x[:200])
    x[::4] = np.nan
    sims = sf.Simulations(calibration.theta[:200], x)
    sets = sf.conformal(KEY, gaussian(), sims, draws=100)
    assert (sets.num_simulations, sets.num_failed) == (150, 50)
    assert "calibrated on 150 simulations, 50 failed; regions of highest density: 50% is" in repr(
        sets
    )
    ranks = sf.recalibrate(KEY, gaussian(), sims, draws=100)
    assert (ranks.num_simulations, ranks.num_failed) == (150, 50)
    assert "ranks of 150 simulations, 50 failed)" in repr(ranks)


def test_bad_input_is_refused(gaussian, calibration):
    class Broken(type(gaussian())):
        def sample_and_log_prob(self, key, x, n):
            draws, log_prob = super().sample_and_log_prob(key, x, n)
            return draws * jnp.nan, log_prob * jnp.nan

    broken = Broken(gaussian().prior, (1.0, 1.0), (0.0, 0.0))
    sims = calibration[:100]
    for correct in (sf.conformal, sf.recalibrate):
        with pytest.raises(ValueError, match="at least 50 that succeeded, got 40 of 40"):
            correct(KEY, gaussian(), sims[:40])
        with pytest.raises(ValueError, match="draws: expected at least 20, got 5"):
            correct(KEY, gaussian(), sims, draws=5)
        with pytest.raises(SbiFlowsError, match=r"gave NaN|draws that are not finite"):
            correct(KEY, broken, sims, draws=100)
    right = sf.recalibrate(KEY, gaussian(), sims, draws=100)
    with pytest.raises(ValueError, match=r"theta: expected shape \(\*, 2\)"):
        right.log_prob(jnp.zeros((3, 3)), sims.x[:3])
    with pytest.raises(
        ValueError, match=r"theta: expected \(3, 2\) or \(3, n, 2\) for a batch of 3"
    ):
        right.log_prob(jnp.zeros((2, 2)), sims.x[:3])


def test_a_map_goes_on_beyond_its_draws():
    draws = jax.random.normal(KEY, (3, 2_000))
    own = quantiles_of(draws * 2.0 + 1.0)
    z = jnp.broadcast_to(jnp.array([-8.0, 0.0, 8.0]), (3, 3))
    value, log_slope = own.value(z)
    assert np.asarray(value) == pytest.approx(np.array([[-15.0, 1.0, 17.0]] * 3), abs=4.0)
    back, log_back = own.score(value)
    np.testing.assert_allclose(back, z, atol=1e-3)
    np.testing.assert_allclose(log_slope, -log_back, atol=1e-4)
    same = quantiles_of(jnp.ones((30,)))
    assert bool(jnp.all(jnp.diff(same.values) > 0))
    shift = quantile_map(draws[0], draws[0] + 3.0)
    assert float(shift.value(jnp.array([5.0]))[0][0]) == pytest.approx(8.0, abs=1e-3)
