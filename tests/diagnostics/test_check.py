"""The verdict names the error, keeps its level, and counts failed simulations."""

import json
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import pytest

from sbi_flows.core.errors import SbiFlowsWarning, SimulationFailed
from sbi_flows.diagnostics import check
from sbi_flows.diagnostics.verdict import _joint_kind
from sbi_flows.prior.prior import as_prior

KEY = jax.random.key(0)
SIZES = {"datasets": 400, "draws": 200, "progress": False}


@pytest.fixture(scope="module")
def exact_report(gaussian, simulator):
    return check(KEY, gaussian(), simulator, **SIZES)


def test_exact_posterior_is_calibrated(exact_report):
    assert exact_report.calibrated and exact_report.conservative
    assert exact_report.findings == ()
    assert exact_report.verdict.startswith("calibrated: none of 8 tests rejects")
    assert exact_report.sharpness.contraction == pytest.approx([0.8, 0.8], abs=0.06)
    assert exact_report.sharpness.movement == pytest.approx([0.8, 0.8], abs=0.15)
    assert exact_report.sharpness.unlearned == ()


def test_exact_posterior_passes_18_of_20(gaussian, simulator):
    keys = jax.random.split(jax.random.key(7), 20)
    assert sum(check(k, gaussian(), simulator, **SIZES).calibrated for k in keys) >= 18


@pytest.mark.parametrize(
    ("knobs", "kind", "size"),
    [
        ({"scale": 1.5}, "under-confident", r"1\.[3-5]\d( to 1\.[3-5]\d)? times too wide"),
        ({"scale": 1 / 1.5}, "over-confident", r"1\.[3-5]\d( to 1\.[3-5]\d)? times too narrow"),
        ({"shift": 0.5}, "biased", r"0\.[45]\d( to 0\.[45]\d)? posterior sd too high"),
        ({"shift": (0.5, -0.5)}, "biased", r"posterior sd too high or low"),
        # all truths are outside the range of the draws; the correct width is not reported as wrong
        ({"shift": 3.0}, "biased", r"at least 2\.\d\d( to 2\.\d\d)? posterior sd too high"),
    ],
    ids=["wide", "narrow", "shifted", "apart", "far"],
)
def test_a_wrong_posterior_is_named(gaussian, simulator, knobs, kind, size):
    report = check(KEY, gaussian(**knobs), simulator, **SIZES)
    assert not report.calibrated
    assert report.conservative == (kind == "under-confident")
    assert {f.kind for f in report.findings} == {kind}
    assert re.match(rf"{kind} in every parameter \(.*{size}; corrected p at most ", report.verdict)


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [(0.0, 0.8, "under-confident"), (0.2, 1.0, "over-confident"), (0.2, 0.8, "mis-shaped")],
)
def test_the_kind_of_a_joint_test_is_that_of_all_levels(low, high, kind):
    """Deviations in both directions are neither over- nor under-confidence."""
    assert _joint_kind(np.linspace(low + 1e-3, high - 1e-3, 300)) == kind


def test_wrong_parameters_are_named(gaussian):
    prior = as_prior({"alpha": dist.Normal(0, 1), "beta": dist.Normal(0, 1)})

    def simulator(key, theta):
        clean = jnp.stack([theta["alpha"], theta["beta"]])
        return clean + 0.5 * jax.random.normal(key, (2,))

    narrow = check(KEY, gaussian(prior=prior, scale=(1.0, 1 / 1.5)), simulator, **SIZES)
    assert narrow.verdict.startswith("over-confident in beta (")
    assert "alpha" not in narrow.verdict
    posterior = gaussian(prior=prior, scale=(1.0, 1 / 1.8), shift=(-0.5, 0.0))
    both = check(KEY, posterior, simulator, **SIZES)
    assert "over-confident in beta (" in both.verdict
    assert "biased in alpha (" in both.verdict and "too low" in both.verdict
    assert [(f.kind, f.parameter) for f in both.findings] == [
        ("over-confident", "beta"),
        ("biased", "alpha"),
    ]


@pytest.mark.parametrize("dim", [1, 10])
def test_errors_are_named_in_one_dimension_and_in_ten(gaussian, simulator, dim):
    for knobs, kind in (({"scale": 1 / 1.5}, "over-confident"), ({"shift": 0.5}, "biased")):
        report = check(KEY, gaussian(dim, **knobs), simulator, **SIZES)
        assert {f.kind for f in report.findings} == {kind}
        assert len(report.findings) == dim
    assert check(KEY, gaussian(dim), simulator, **SIZES).calibrated


def test_a_posterior_equal_to_the_prior_is_reported_as_such(gaussian, simulator):
    report = check(KEY, gaussian(blind=True), simulator, **SIZES)
    assert report.verdict.startswith(
        "under-confident as a whole, located in no single parameter (TARP"
    )
    assert "the posterior equals the prior (contraction about 0)" in report.summary()
    assert report.sharpness.unlearned == ("theta[0]", "theta[1]")


def test_a_parameter_that_x_does_not_constrain_is_listed(gaussian):
    # exact for a simulator that returns the first parameter and noise
    class HalfBlind(type(gaussian())):
        def moments(self, x):
            mean, sd = super().moments(x)
            first = jnp.reshape(jnp.array([1.0, 0.0]), (*(1,) * (x.ndim - 1), 2))
            return mean * first, sd * first + (1 - first)

    def simulator(key, theta):
        noise = jax.random.normal(key, (2,))
        return jnp.stack([theta[0] + 0.5 * noise[0], noise[1]])

    exact = gaussian()
    report = check(KEY, HalfBlind(exact.prior, exact.scale, exact.shift), simulator, **SIZES)
    assert report.calibrated
    assert "not learned from the data (contraction about 0): theta[1]" in report.summary()


def test_failed_simulations_are_left_out_and_counted(gaussian, simulator):
    def failing(key, theta):
        x = simulator(key, theta)
        # failures are independent of theta, so that the posterior stays exact
        return jnp.where(jax.random.uniform(jax.random.fold_in(key, 1)) < 0.2, jnp.nan, x)

    with pytest.warns(SbiFlowsWarning, match="of 400 simulations failed: .* gave NaN"):
        report = check(KEY, gaussian(), failing, **SIZES)
    assert report.calibrated
    assert report.num_datasets + report.num_failed == 400
    assert 40 < report.num_failed < 120
    assert len(report.sbc.uniform) == len(report.tarp.fractions) == report.num_datasets
    assert f"{report.num_failed} simulations failed and were left out" in report.summary()
    about = f"; about the {report.num_datasets} of 400 simulations that did not fail"
    assert report.verdict.endswith(about)

    def hopeless(key, theta):
        return jnp.where(theta[0] < 1.5, jnp.nan, simulator(key, theta))

    with pytest.warns(SbiFlowsWarning), pytest.raises(SimulationFailed, match="too few left"):
        check(KEY, gaussian(), hopeless, **SIZES)


def test_report_as_text_and_as_json(exact_report):
    text = repr(exact_report)
    assert text == exact_report.summary()
    assert exact_report.verdict in re.sub(r"\s+", " ", text)
    assert "theta[0]" in text and "HPD coverage p" in text and "TARP p" in text
    stored = json.loads(json.dumps(exact_report.to_dict(), allow_nan=False))
    assert stored["calibrated"] is True and stored["num_datasets"] == 400
    assert len(stored["tests"]) == 8
    assert stored["sharpness"]["theta[0]"]["contraction"] == pytest.approx(
        exact_report.sharpness.contraction[0]
    )


def test_report_draws_its_three_panels(exact_report):
    figure = exact_report.plot()
    assert [ax.get_xlabel() for ax in figure.axes] == [
        "posterior rank",
        "credibility level",
        "credibility level",
    ]
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[1].lines}
    np.testing.assert_allclose(lines["HPD"], exact_report.coverage.expected)
    assert figure.get_suptitle().startswith("calibrated")
    plt.close(figure)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datasets": 49}, "datasets: expected a whole number of at least 50, got 49"),
        ({"draws": 5}, "draws: expected a whole number of at least 20, got 5"),
        ({"level": 1.0}, "level: expected a number between 0 and 1, got 1.0"),
    ],
)
def test_bad_sizes_are_refused_before_any_simulation(gaussian, change, message):
    def never(key, theta):
        raise AssertionError("simulated")

    with pytest.raises(ValueError, match=message):
        check(KEY, gaussian(), never, **{**SIZES, **change})
