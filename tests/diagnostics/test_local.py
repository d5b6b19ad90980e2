"""The local check passes posteriors that are right at the observation and names errors there."""

import dataclasses
import json
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.diagnostics import LocalCheck
from sbi_flows.diagnostics.local_errors import LocalPairs, errors_of

KEY = jax.random.key(0)
X_O = jnp.array([0.5, -0.3])
SIZES = {"simulations": 2_000, "progress": False}


def check_at(posterior, simulator, x: Any = X_O, *, key=KEY, **options: Any) -> LocalCheck:
    return sf.check_at(key, posterior, x, simulator, **{**SIZES, **options})


@dataclasses.dataclass(frozen=True)
class Switched:
    """Return draws of `left` where the first entry of x is below zero, and of `right` elsewhere."""

    left: Any
    right: Any

    @property
    def prior(self):
        return self.left.prior

    def sample(self, key, x, n):
        left, right = (p.sample(key, x, n) for p in (self.left, self.right))
        return jnp.where((x[..., 0] < 0)[..., None, None], left, right)


@dataclasses.dataclass(frozen=True)
class Bent:
    """Draws of another shape: standardised draws z are replaced by `bend(z, key)`."""

    posterior: Any
    bend: Any

    @property
    def prior(self):
        return self.posterior.prior

    def sample(self, key, x, n):
        mean, sd = (m[..., None, :] for m in self.posterior.moments(x))
        z = (self.posterior.sample(key, x, n) - mean) / sd
        return mean + sd * self.bend(z, key)


def correlated(z, key):
    del key
    return jnp.stack([z[..., 0], 0.6 * z[..., 0] + 0.8 * z[..., 1]], axis=-1)


def two_humps(z, key):
    side = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, z.shape), 0.9, -0.9)
    return side + (1 - 0.9**2) ** 0.5 * z


@pytest.fixture(scope="module")
def gaussian(gaussian):
    """Make posteriors that share one prior, so that programs are compiled once."""
    return partial(gaussian, prior=sf.as_prior(dist.Normal(0, 1).expand([2])))


@pytest.fixture(scope="module")
def narrow(gaussian, simulator):
    return check_at(gaussian(scale=1 / 1.5), simulator)


def test_the_exact_posterior_passes(gaussian, simulator):
    found = check_at(gaussian(), simulator)
    assert found.consistent and found.p_value > 0.05 and found.findings == ()
    assert found.verdict.startswith("consistent with the true posterior at this observation")
    np.testing.assert_allclose(found.shift, 0.0, atol=0.25)
    np.testing.assert_allclose(found.width, 1.0, atol=0.2)
    assert found.statistic < 2 * np.quantile(found.null, 0.95)
    assert (found.num_simulations, found.num_near, found.num_failed) == (2_000, 500, 0)


def test_the_same_key_gives_the_same_result(gaussian, simulator, narrow):
    again = check_at(gaussian(scale=1 / 1.5), simulator)
    np.testing.assert_array_equal(again.null, narrow.null)
    np.testing.assert_array_equal(again.probability, narrow.probability)


@pytest.mark.release
def test_p_values_of_the_exact_posterior_are_uniform(gaussian, simulator):
    posterior, options = gaussian(), {"permutations": 19}
    sims = sf.simulate(jax.random.key(1), posterior.prior, simulator, 16_000, progress=False)
    found = [
        check_at(posterior, None, key=key, simulations=sims[400 * i : 400 * (i + 1)], **options)
        for i, key in enumerate(jax.random.split(jax.random.key(2), 40))
    ]
    p = np.array([f.p_value for f in found])
    # P(more than 6 of 40 at .05) = .003
    assert np.sum(p <= 0.05) <= 6
    assert 0.35 < p.mean() < 0.65


@pytest.mark.parametrize("permutations", [19, 99])
def test_p_values_of_parameters_hold_their_level_together(permutations):
    rng = np.random.default_rng(0)

    def smallest():
        truth, draw = rng.normal(size=(2, 60, 6))
        swapped = rng.random((60, 1 + permutations)) < 0.5
        swapped[:, 0] = False
        pairs = LocalPairs(truth, draw, np.ones(60), swapped)
        return errors_of(pairs, truth, np.full(swapped.shape, 0.5)).p.min()

    # 27 numbers each; 400 tests at .05 reject 20 on average
    assert 8 <= sum(smallest() <= 0.05 for _ in range(400)) <= 34


@pytest.mark.parametrize("scale, kind", [(1 / 1.5, "over-confident"), (1.5, "under-confident")])
def test_a_wrong_width_is_named(gaussian, simulator, scale, kind):
    found = check_at(gaussian(scale=scale), simulator)
    assert not found.consistent and found.p_value == pytest.approx(1 / 101)
    assert {(f.kind, f.parameter) for f in found.findings} == {
        (kind, "theta[0]"),
        (kind, "theta[1]"),
    }
    np.testing.assert_allclose(found.width, scale, rtol=0.2)
    assert (
        f"not the true posterior at this observation (local C2ST p 0.010, level 0.05): {kind}"
        in (found.verdict)
    )


def test_a_shift_is_named_with_its_parameter(gaussian, simulator):
    found = check_at(gaussian(shift=(0.5, 0.0)), simulator)
    first = found.findings[0]
    assert (first.kind, first.parameter, first.effect) == ("biased", "theta[0]", found.shift[0])
    assert [f for f in found.findings if f.parameter == "theta[1]"] == []
    assert found.shift[0] == pytest.approx(0.5, abs=0.2)
    assert "posterior sd too high" in found.verdict


def test_a_wrong_correlation_is_named(gaussian, simulator):
    found = check_at(Bent(gaussian(), correlated), simulator)
    assert [f.test for f in found.findings] == ["correlation"]
    assert found.errors.correlation[0] == pytest.approx(0.6, abs=0.2)
    assert "correlation of theta[0] and theta[1] wrong (0." in found.verdict
    assert "too high" in found.verdict


def test_a_wrong_shape_with_correct_moments_is_found(gaussian, simulator):
    found = check_at(Bent(gaussian(), two_humps), simulator)
    assert [(f.kind, f.parameter) for f in found.findings] == [("mis-shaped", None)]
    assert re.search(
        r"\): mis-shaped, for example too (few|many) draws near theta\[", found.verdict
    )


def test_a_posterior_that_ignores_the_data_is_found(gaussian, simulator):
    """The prior is calibrated on average over data sets, but wrong at each observation."""
    found = check_at(gaussian(blind=True), simulator, jnp.array([1.5, 0.0]))
    assert "under-confident in every parameter" in found.verdict
    assert found.shift[0] < -0.5  # the truth is higher than zero, in units of the prior


def test_the_verdict_is_local(gaussian, simulator):
    switched = Switched(gaussian(), gaussian(scale=1 / 1.5))
    left, right = (check_at(switched, simulator, jnp.array([x, 0.0])) for x in (-1.0, 1.0))
    assert left.consistent
    assert not right.consistent and "over-confident" in right.verdict


@pytest.mark.release
def test_level_power_and_locality_with_the_default_size(gaussian, simulator):
    def rejected(posterior, x=X_O, times=10):
        keys = jax.random.split(jax.random.key(2), times)
        found = [check_at(posterior, simulator, x, key=k, simulations=10_000) for k in keys]
        return np.mean([not f.consistent for f in found])

    assert rejected(gaussian(), times=60) <= 0.15  # P(more than 9 of 60) = .001
    for wrong in (gaussian(scale=1 / 1.5), gaussian(shift=(0.5, 0.0))):
        assert rejected(wrong) == 1.0
    assert rejected(Bent(gaussian(), correlated)) == 1.0
    switched = Switched(gaussian(), gaussian(scale=1 / 1.5))
    assert rejected(switched, jnp.array([-1.0, 0.0])) <= 0.2
    assert rejected(switched, jnp.array([1.0, 0.0])) == 1.0


def test_the_report_as_text_and_as_json(narrow):
    assert repr(narrow) == narrow.summary()
    assert "nearest 500 of 2000 simulations" in narrow.summary()
    assert "x0.6" in narrow.summary()
    plain = json.loads(json.dumps(narrow.to_dict()))
    assert plain["consistent"] is False and len(plain["null"]) == 100
    assert plain["width"]["theta[1]"] == pytest.approx(narrow.width[1])
    assert narrow.draws.shape == (2_000, 2) and narrow.probability.shape == (2_000,)


def test_the_figure_has_a_curve_a_parameter(narrow):
    figure = narrow.plot()
    assert [ax.get_xlabel() for ax in figure.axes] == list(narrow.labels)
    curve = figure.axes[0].lines[1].get_ydata()
    # too few draws in the tails, too many in the middle
    assert min(curve[0], curve[-1]) > 0.52 and curve[10] < 0.5
    assert len(narrow.plot(most=1).axes) == 1


def test_failed_simulations_are_left_out(gaussian, simulator):
    def failing(key, theta):
        x = simulator(key, theta)
        return jnp.where(x[1] > 1.5, jnp.nan, x)

    with pytest.warns(sf.SbiFlowsWarning, match="simulations failed"):
        found = check_at(gaussian(), failing)
    assert found.num_failed > 50
    assert found.num_failed + found.num_simulations == 2_000
    assert f"{found.num_failed} simulations failed and were left out" in found.summary()
    x = np.full((500, 2), np.nan)
    x[:399] = 0.5
    with pytest.raises(sf.SimulationFailed, match="399 of 500 simulations succeeded: too few"):
        check_at(gaussian(), None, simulations=sf.Simulations(np.zeros((500, 2)), x))


PRIOR = {"rate": dist.LogNormal(0.0, 0.5), "p": dist.Uniform(0.0, 1.0)}


def measured(key, theta):
    noise = 0.2 * jax.random.normal(key, (3,))
    return {"log": jnp.log(theta["rate"]) + noise[:2], "p": theta["p"] + noise[2]}


def rates(low, high):
    return {"log": jnp.array([low, high]), "p": jnp.array(0.4)}


class Unlearned:
    """Posterior that equals the prior for all data."""

    prior = sf.as_prior(PRIOR)

    def sample(self, key, x, n):
        batch = x["p"].shape
        return self.prior.sample(key, int(np.prod(batch)) * n).reshape(*batch, n, 2)


def test_constrained_parameters_and_data_of_several_parts():
    sims = sf.simulate(KEY, Unlearned.prior, measured, 2_000, progress=False)
    found = check_at(Unlearned(), None, rates(0.9, 1.1), simulations=sims)
    assert found.labels == ("rate", "p") and not found.consistent
    assert found.shift[0] < -0.5  # rates are large there
    with pytest.raises(ValueError, match="x: expected a dict of arrays with the keys"):
        check_at(Unlearned(), None, {"p": jnp.array(0.4)}, simulations=sims)


@pytest.mark.slow
def test_a_fitted_posterior_is_checked():
    sims = sf.simulate(KEY, PRIOR, measured, 6_000, progress=False)
    npe = sf.NPE(PRIOR, sf.MAF(transforms=2), training=sf.Training(max_epochs=20), members=1)
    posterior, _ = npe.fit(jax.random.key(1), sims[:4_000], progress=False)
    x = rates(0.1, -0.1)
    found = sf.check_at(KEY, posterior, x, simulations=sims[4_000:], progress=False)
    assert found.labels == ("rate", "p") and found.num_simulations == 2_000
    assert found.consistent
    with pytest.raises(ValueError, match="x: expected shape"):
        sf.check_at(KEY, posterior, {**x, "log": jnp.zeros(3)}, measured)


def test_invalid_settings_are_refused(gaussian, simulator):
    def never(key, theta):
        raise AssertionError("simulated")

    def refused(match, posterior=None, simulator=never, **options):
        with pytest.raises(ValueError, match=match):
            check_at(posterior or gaussian(), simulator, **options)

    refused("simulations: expected a whole number of at least 400, got 399", simulations=399)
    refused("permutations: expected a whole number of at least 19, got 18", permutations=18)
    refused(
        "permutations: expected at least 99 for a level of 0.01, got 50",
        permutations=50,
        level=0.01,
    )
    refused("level: expected a number between 0 and 1, got 0", level=0.0)
    refused("x_o: expected one observation, got a batch", x=jnp.zeros((4, 2)))
    refused("simulator: expected a simulator, or its simulations, got None", simulator=None)


def test_draws_that_are_not_finite_are_refused(gaussian, simulator):
    def with_nan(z, key):
        return jnp.where(z > 2.0, jnp.nan, z)

    with pytest.raises(sf.SbiFlowsError, match="draws at the observation that are not finite"):
        check_at(Bent(gaussian(), with_nan), simulator)


@pytest.mark.slow
def test_one_parameter_in_double_precision(gaussian, simulator):
    with jax.enable_x64(True):
        exact = gaussian(1, prior=None)
        found = check_at(exact, simulator, np.zeros(1))
        narrow = check_at(gaussian(1, scale=0.6, prior=exact.prior), simulator, np.zeros(1))
    assert found.draws.dtype == np.float64
    assert found.consistent and narrow.findings[0].kind == "over-confident"
