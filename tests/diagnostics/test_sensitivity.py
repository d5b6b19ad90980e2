"""Sensitivity to data and prior, compared with the conjugate Gaussian."""

import json

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.diagnostics.sensitivity_to_data import _representable
from sbi_flows.posteriors.reweighting import cjs_distance, reweighted
from sbi_flows.prior.prior import as_prior
from tests.gaussian import NOISE

KEY = jax.random.key(4)
X = jnp.array([0.3, -0.8])
WEIGHT, SD = 1 / (1 + NOISE**2), (NOISE**2 / (1 + NOISE**2)) ** 0.5


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def moved(posterior, x, **options):
    return sf.data_sensitivity(KEY, posterior, x, progress=False, **options)


def under(posterior, x=X, **options):
    return sf.prior_sensitivity(KEY, posterior, x, **options)


class Sites:
    """The same draws and densities, with a prior of two named parameters."""

    def __init__(self, posterior, prior):
        self.posterior, self.prior = posterior, as_prior(prior)
        self.sample, self.log_prob = posterior.sample, posterior.log_prob
        self.sample_and_log_prob = posterior.sample_and_log_prob


class Counting:
    """Posterior of one parameter given a dict of a count, a boolean and a float."""

    def __init__(self):
        self.prior = as_prior({"a": dist.Normal(0, 1)})
        self.seen = []

    def sample(self, key, x, n):
        self.seen.append(x)
        count = jnp.asarray(x["count"], float).reshape(-1, 1, 1)
        flag = jnp.asarray(x["flag"], float).reshape(-1, 1, 1)
        bent = jnp.asarray(x["bent"], float).reshape(-1, 1, 1)
        noise = jax.random.normal(key, (1, n, 1))
        # the mean goes with the count, the width with the flag; the bent one turns back at 1
        draws = 0.2 * count + (1.0 + flag) * noise + 3.0 * jnp.abs(bent - 1.0)
        return draws[0] if jnp.ndim(x["flag"]) == 0 else draws


def test_a_mean_moves_by_its_derivative(gaussian):
    """The derivative of the mean by x is the weight of the data, divided by the posterior sd."""
    found = moved(gaussian(), X, unit=1.0, step=0.25, draws=4_000)
    slope = 0.5 * WEIGHT / SD
    np.testing.assert_allclose(found.shift, np.diag([slope, slope]), atol=0.02)
    np.testing.assert_allclose(found.distance, np.diag([slope, slope]), atol=0.02)
    np.testing.assert_allclose(found.width, 1.0, atol=1e-4)
    np.testing.assert_allclose(found.low, X - 0.25, rtol=1e-6)
    assert found.most_influential(1) == {"theta[0]": ("x[0]",), "theta[1]": ("x[1]",)}


def test_a_posterior_that_ignores_the_data_does_not_move(gaussian):
    found = moved(gaussian(blind=True), X, unit=1.0)
    assert np.all(found.shift == 0) and np.all(found.distance == 0)


def test_units_are_those_of_simulations_at_draws(gaussian, simulator):
    """The variance of a repeated measurement is that of the noise plus that of the posterior."""
    found = moved(gaussian(), X, simulator=simulator, draws=4_000)
    half = (NOISE**2 + SD**2) ** 0.5 / 2
    np.testing.assert_allclose(found.high - found.low, 2 * half, rtol=0.06)
    assert "simulations at draws" in found.summary()


def test_whole_numbers_and_booleans_stay_what_they_are():
    x = {"count": 3, "flag": True, "bent": 1.0}
    posterior = Counting()
    found = moved(posterior, x, unit={"count": 0.5, "flag": 1, "bent": 1.0})
    assert found.entries == ("bent", "count", "flag")
    np.testing.assert_allclose(found.low, [0.5, 2.0, 0.0])
    np.testing.assert_allclose(found.high, [1.5, 4.0, 1.0])
    assert {np.asarray(seen["count"]).dtype.kind for seen in posterior.seen[1:]} == {"i"}
    assert {np.asarray(seen["flag"]).dtype.kind for seen in posterior.seen[1:]} == {"b"}
    # the sd at the observation is 2: 2 counts of 0.2; the flag doubles the width
    np.testing.assert_allclose(found.shift[0], [0.0, 0.2, 0.0], atol=0.04)
    np.testing.assert_allclose(found.width[0], [1.0, 1.0, 2.0], atol=1e-3)
    # down and up again: the mean at both ends is the same, half of 3 away
    assert found.distance[0, 0] == pytest.approx(1.5, rel=0.05)
    assert found.most_influential(2)["a"][0] == "bent"


def test_a_count_is_not_moved_below_zero():
    like = jax.ShapeDtypeStruct((3,), jnp.int32)
    low, high = _representable(like, jnp.array([[0, 1, -3]]), np.full(3, -5.2), np.full(3, 2.6))
    np.testing.assert_array_equal(low, [0, 0, -5])
    np.testing.assert_array_equal(high, [3, 3, 3])


def test_a_pixel_is_not_moved_beyond_what_it_holds():
    like = jax.ShapeDtypeStruct((3,), jnp.uint8)
    row = jnp.array([[255, 0, 128]], jnp.uint8)
    low, high = _representable(like, row, np.array([251.0, -4, 124]), np.array([259.0, 4, 132]))
    np.testing.assert_array_equal(low, [251, 0, 124])
    np.testing.assert_array_equal(high, [255, 4, 132])


@pytest.fixture(scope="module")
def fitted():
    """A small flow, trained for a few epochs, with one uninformative feature."""

    def simulate(key, theta):
        noise = jax.random.normal(key, (3,))
        informed = jnp.exp(jnp.stack([theta["a"], theta["b"]]) + 0.3 * noise[:2])
        return {"y": informed, "z": noise[2]}

    prior = {"a": dist.Normal(0, 1), "b": dist.Normal(0, 1)}
    sims = sf.simulate(jax.random.key(1), prior, simulate, 1_000, progress=False)
    npe = sf.NPE(prior, sf.MAF(), training=sf.Training(max_epochs=2), members=1)
    return npe.fit(jax.random.key(2), sims, progress=False)[0]


@pytest.mark.slow
@pytest.mark.promotes
def test_a_fitted_posterior_is_moved_in_units_of_its_training(fitted, gaussian):
    x = {"y": jnp.array([1.5, 0.7]), "z": 0.1}
    found = moved(fitted, x)
    assert found.entries == ("y[0]", "y[1]", "z")
    # positive, skew data are moved by factors
    y = np.array([1.5, 0.7])
    np.testing.assert_allclose(found.high[:2] * found.low[:2], y**2, rtol=1e-3)
    np.testing.assert_allclose(found.high[:2] / y, np.exp(0.5 * 1.09**0.5), rtol=0.08)
    # of log y, one sd of it is 1.09 ** .5 units: theta follows by 1 / 1.09, with an sd of .287
    np.testing.assert_allclose(np.diag(found.shift), 3.3, rtol=0.15)
    assert np.abs(found.shift[:, 2]).max() < 0.6
    sets = sf.ConformalPosterior(fitted, np.zeros(50), 0, 100, KEY)
    np.testing.assert_array_equal(moved(sets, x, draws=100).low, found.low)


def test_the_report_on_the_data_says_what_it_found(gaussian):
    found = moved(gaussian(), X, unit=0.5)
    lines = found.summary().splitlines()
    assert lines[0].startswith("sensitivity to the data: 2 entries, each moved 0.5 down and up")
    assert lines[-1] == "theta[1] is moved most by x[1], x[0]"
    assert repr(found) == found.summary()
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["shift"]["theta[1]"]["x[1]"] == found.shift[1, 1]
    image = found.plot().images[0].get_array()
    np.testing.assert_allclose(image, found.shift)


def test_bad_input_to_data_sensitivity_is_refused(gaussian, simulator):
    with pytest.raises(ValueError, match="expected units or a simulator for this posterior"):
        moved(gaussian(), X)
    with pytest.raises(ValueError, match="unit: expected none beside a simulator"):
        moved(gaussian(), X, unit=1.0, simulator=simulator)
    for unit, said in ((jnp.zeros(2), "positive numbers"), (jnp.ones(3), "shape")):
        with pytest.raises(ValueError, match=f"unit: expected {said}"):
            moved(gaussian(), X, unit=unit)
    with pytest.raises(ValueError, match="step: expected a positive number"):
        moved(gaussian(), X, unit=1.0, step=-1.0)
    with pytest.raises(ValueError, match="draws: expected a whole number of at least 100"):
        moved(gaussian(), X, unit=1.0, draws=50)


def normal(mean, sd):
    return dist.Normal(jnp.asarray(mean), sd).to_event(1)


def exact(mean, sd, noise=NOISE):
    """Return mean and sd of the posterior at X under a normal prior."""
    precision = 1 / sd**2 + 1 / noise**2
    return (np.asarray(mean) / sd**2 + np.asarray(X) / noise**2) / precision, precision**-0.5


@pytest.mark.promotes  # in numpyro
@pytest.mark.parametrize(("mean", "sd"), [((0.5, 0.0), 1.0), ((0.0, 0.0), 2.0), ((0.2, 1.0), 0.7)])
def test_another_prior_gives_its_own_posterior(gaussian, mean, sd):
    found = under(gaussian(), prior=normal(mean, sd), draws=20_000)["new prior"]
    (old, old_sd), (new, new_sd) = exact((0.0, 0.0), 1.0), exact(mean, sd)
    assert found.reliable and found.effective > 1_000
    np.testing.assert_allclose(found.shift, (new - old) / old_sd, atol=0.05)
    np.testing.assert_allclose(found.width, new_sd / old_sd, atol=0.04)


@pytest.mark.parametrize("power", [0.8, 1.25])
def test_powers_of_prior_and_likelihood_give_their_posteriors(gaussian, power):
    found = under(gaussian(), draws=20_000)
    old, old_sd = exact((0.0, 0.0), 1.0)
    scaled = {
        "prior": exact((0.0, 0.0), power**-0.5),
        "likelihood": exact((0.0, 0.0), 1.0, noise=NOISE / power**0.5),
    }
    for name, (new, new_sd) in scaled.items():
        row = found[f"{name} ** {power:g}"]
        assert row.reliable
        np.testing.assert_allclose(row.shift, (new - old) / old_sd, atol=0.03)
        np.testing.assert_allclose(row.width, new_sd / old_sd, atol=0.02)


def test_each_named_parameter_has_its_own_prior(gaussian):
    prior = {"a": dist.Normal(0, 1), "b": dist.Normal(0, 1)}
    found = under(Sites(gaussian(), prior), draws=20_000)
    # with 1.25 times the precision of one prior alone, only that one moves
    (old, old_sd), (new, _) = exact((0.0, 0.0), 1.0), exact((0.0, 0.0), 1.25**-0.5)
    shifts = (new - old) / old_sd
    np.testing.assert_allclose(found["prior of b ** 1.25"].shift, [0, shifts[1]], atol=0.03)
    other = {"a": dist.Normal(0.5, 1), "b": dist.Normal(1, 1)}
    found = under(Sites(gaussian(), prior), prior=other, draws=20_000)
    # a mean moves by the share of the prior's precision in all
    np.testing.assert_allclose(found["new prior of a"].shift, [0.1 / SD, 0], atol=0.04)
    np.testing.assert_allclose(found["new prior of b"].shift, [0, 0.2 / SD], atol=0.04)
    np.testing.assert_allclose(found["new prior"].shift, [0.1 / SD, 0.2 / SD], atol=0.05)
    same = under(Sites(gaussian(), prior), prior=prior)
    assert [row.name for row in same.rows] == ["new prior"]
    assert "new prior: the same as the posterior's own where the draws are" in repr(same)


def test_sensitivity_tells_a_prior_that_rules_from_one_that_pulls(gaussian):
    """Far from the prior, both matter. If the posterior is the prior, the likelihood does not."""
    far = under(gaussian(), jnp.array([0.0, 6.0]), draws=4_000)
    assert far.diagnosis == {"theta[1]": "prior and data may pull apart"} | {
        k: v for k, v in far.diagnosis.items() if k == "theta[0]"
    }
    assert far.sensitivity["prior"][1] > 5 * far.sensitivity["prior"][0]
    blind = under(gaussian(blind=True))
    assert set(blind.diagnosis.values()) == {"the prior rules, the data say little"}
    assert np.all(blind.sensitivity["likelihood"] == 0)
    assert "the prior rules" in blind.summary()


def test_a_uniform_prior_has_no_power_and_says_so(gaussian):
    posterior = gaussian(prior=as_prior(dist.Uniform(-9, 9).expand([2])))
    found = under(posterior)
    assert found["prior ** 0.8"].flat and found["prior ** 1.25"].reliable
    assert np.all(found["prior ** 0.8"].shift == 0) and np.all(found["prior ** 0.8"].width == 1)
    assert np.all(found.sensitivity["prior"] == 0) and not found.diagnosis
    assert "prior: uniform where the draws are, so that no power changes it" in found.summary()
    # the likelihood is the posterior, whose powers change the width by 1 / sqrt(power)
    np.testing.assert_allclose(found["likelihood ** 1.25"].width, 0.8**0.5, atol=0.03)
    assert "nan" not in found.summary().lower()


@pytest.mark.promotes  # in numpyro
def test_weights_that_are_too_uneven_are_not_believed(gaussian):
    found = under(gaussian(), prior=normal((3.0, 0.0), 0.2))
    assert not found["new prior"].reliable
    assert np.all(np.isnan(found["new prior"].shift))
    assert "new prior: the weights are too uneven to say" in found.summary()
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["rows"]["new prior"]["shift"]["theta[0]"] is None
    found.plot()
    plt.gcf().canvas.draw()
    with pytest.raises(sf.WeightsUneven, match="expected one that allows draws"):
        under(gaussian(), prior=dist.Uniform(50, 60).expand([2]))


def test_a_prior_beyond_the_old_support_is_pointed_out(gaussian):
    posterior = gaussian(prior=as_prior(dist.Uniform(-4, 4).expand([2])))
    found = under(posterior, prior=dist.Uniform(-5, 5).expand([2]))
    assert "new prior: 36." in found.notes[-1] or "new prior: 35." in found.notes[-1]
    assert "outside the support of the posterior's own prior" in found.notes[-1]


def test_the_report_on_the_prior_says_what_it_found(gaussian):
    found = under(gaussian())
    assert repr(found) == found.summary()
    assert found.summary().splitlines()[0].startswith("sensitivity to the prior, 4000 draws")
    plain = json.loads(json.dumps(found.to_dict()))
    row = found["prior ** 0.8"]
    assert plain["rows"]["prior ** 0.8"]["shift"]["theta[1]"] == row.shift[1]
    assert found.plot().images[0].get_array().shape == (2, 4)
    with pytest.raises(KeyError, match="expected one of prior"):
        found["nothing"]


def test_bad_input_to_prior_sensitivity_is_refused(gaussian):
    with pytest.raises(ValueError, match="prior: expected the parameters of"):
        under(gaussian(), prior={"a": dist.Normal(0, 1)})
    with pytest.raises(ValueError, match="x: expected one observation, got a batch"):
        under(gaussian(), jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="draws: expected a whole number of at least 500"):
        under(gaussian(), draws=100)
    with pytest.raises(sf.SbiFlowsError, match="draws outside the support"):
        under(gaussian(prior=as_prior(dist.Uniform(0, 1).expand([2]))))


def test_weights_are_those_of_arviz():
    arviz = pytest.importorskip("arviz")
    if not hasattr(arviz, "psislw"):
        pytest.skip("an ArviZ without psislw")
    rng = np.random.default_rng(0)
    for scale in (0.3, 1.0, 3.0):
        log_ratio = scale * rng.standard_t(5, size=2_000)
        expected, k = arviz.psislw(log_ratio)
        found = reweighted(log_ratio)
        assert found.pareto_k == pytest.approx(float(k), abs=1e-6)
        np.testing.assert_allclose(found.weights, np.exp(expected), rtol=1e-6)


def test_weights_that_tie_are_left_alone():
    log_ratio = np.where(np.arange(1_000) < 300, 0.0, -np.inf)
    found = reweighted(log_ratio)
    assert found.pareto_k == 0.0 and found.reliable
    assert found.effective == pytest.approx(300)
    np.testing.assert_allclose(found.weights, np.exp(log_ratio) / 300)
    assert not reweighted(np.where(np.arange(1_000) < 50, 0.0, -np.inf)).reliable


def test_the_distance_is_zero_for_equal_weights_and_grows():
    draws = np.random.default_rng(1).normal(size=(4_000, 1))
    even = np.full(4_000, 1 / 4_000)
    assert cjs_distance(draws, even)[0] < 1e-6
    near, far = (reweighted(s * draws[:, 0]).weights for s in (0.1, 0.5))
    assert 0 < cjs_distance(draws, near)[0] < cjs_distance(draws, far)[0] < 1
    # whatever the units and the sign are
    np.testing.assert_allclose(cjs_distance(-5 * draws, far), cjs_distance(draws, far), rtol=1e-6)
