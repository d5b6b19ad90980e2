"""The verdict names the error, keeps its level, and counts failed simulations."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import special

from sbi_flows.core.errors import SbiFlowsWarning, SimulationFailed
from sbi_flows.diagnostics import check
from sbi_flows.diagnostics.glossary import GLOSSARY
from sbi_flows.diagnostics.uniformity import detectable_width, normal_p_values
from sbi_flows.diagnostics.verdict import _joint_kind
from sbi_flows.prior.prior import as_prior
from sbi_flows.simulations.concatenate import concatenate
from sbi_flows.simulations.simulate import simulate
from sbi_flows.simulations.simulations import Simulations

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
    _, information = exact_report.verdict.splitlines()
    assert exact_report.uses_data is True and exact_report.advice == ()
    assert information.startswith("uses the data: 1.") and "no unused information" in information
    # log 5 / 2 per parameter: the posterior variance is a fifth of the prior's
    gain = exact_report.information.gain
    assert gain == pytest.approx(np.log(5), abs=4 * exact_report.information.gain_error)


@pytest.mark.release
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
    assert report.verdict.startswith("under-confident jointly, no single parameter (TARP")
    assert report.uses_data is False
    assert report.information.unused == pytest.approx(np.log(5), abs=0.25)
    assert report.information.unused_labels == ("theta[0]", "theta[1]")
    assert report.advice == report.information.advice != ()
    assert (
        "the posterior equals the prior in every parameter (contraction about 0)"
        in report.summary()
    )
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
    assert report.verdict.splitlines()[0].endswith(about)

    def hopeless(key, theta):
        return jnp.where(theta[0] < 1.5, jnp.nan, simulator(key, theta))

    with pytest.warns(SbiFlowsWarning), pytest.raises(SimulationFailed, match="too few left"):
        check(KEY, gaussian(), hopeless, **SIZES)


def test_report_as_text_and_as_json(exact_report):
    text = repr(exact_report)
    assert text == exact_report.summary()
    assert " ".join(exact_report.verdict.split()) in re.sub(r"\s+", " ", text)
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
    "datasets", [50, *(pytest.param(n, marks=pytest.mark.slow) for n in (100, 200))]
)
def test_few_data_sets_cannot_tell(gaussian, simulator, datasets):
    """A posterior that is 1.3 times too narrow is found, or the verdict says that it may be."""
    posterior = gaussian(scale=1 / 1.3)
    verdicts = set()
    for key in jax.random.split(jax.random.key(datasets), 12):
        report = check(key, posterior, simulator, datasets=datasets, draws=100, progress=False)
        assert not report.calibrated and not report.conservative
        verdicts.add(report.verdict.split(" ")[0].rstrip(":"))
        if not report.findings:
            factor = re.search(r"wrong by a factor of (\S+) or more", report.verdict)
            assert factor is not None and float(factor[1]) == pytest.approx(report.least_width, 0.1)
    assert {"over-confident"} <= verdicts <= {"over-confident", "mis-shaped", "cannot"}
    right = check(KEY, gaussian(), simulator, datasets=datasets, draws=100, progress=False)
    assert right.verdict.startswith("cannot tell: none of 8 tests rejects, but a width is found")
    assert right.uses_data is None and right.advice == right.information.advice != ()


def test_the_smallest_width_that_is_found(gaussian, simulator):
    """The stated width is found in 95% of checks; clearly smaller errors are not."""
    n, draws, width = 300, 400, check(KEY, gaussian(1), simulator, **SIZES).least_width
    rng = np.random.default_rng(0)
    least = detectable_width(n, 0.01)
    found = [
        normal_p_values(special.ndtr(least * rng.normal(size=(n, 1))))[1][0] <= 0.01
        for _ in range(draws)
    ]
    assert np.mean(found) == pytest.approx(0.95, abs=0.04)
    assert 1.1 < width < 1.2


def test_held_out_simulations_take_the_place_of_a_simulator(gaussian, simulator):
    posterior = gaussian()
    sims = simulate(jax.random.key(5), posterior.prior, simulator, 400, progress=False)
    report = check(KEY, posterior, simulations=sims, draws=200, progress=False)
    assert report.calibrated and report.num_datasets == 400
    assert "simulations=simulations, datasets=1000, draws=200" in report.command
    again = check(KEY, posterior, simulations=sims, draws=200, progress=False)
    assert again.verdict == report.verdict


def test_there_is_one_source_of_data_sets(gaussian, simulator):
    posterior = gaussian()
    sims = simulate(jax.random.key(5), posterior.prior, simulator, 60, progress=False)
    with pytest.raises(ValueError, match="expected a simulator or simulations, got neither"):
        check(KEY, posterior)
    with pytest.raises(ValueError, match="expected a simulator or simulations, got both"):
        check(KEY, posterior, simulator, simulations=sims)


def test_a_bad_posterior_is_not_called_the_prior(gaussian, simulator):
    report = check(KEY, gaussian(scale=1 / 5), simulator, **SIZES)
    assert report.information.kind == "uses the data"
    assert "nats lost against the prior, because of its errors" in report.verdict


def test_a_posterior_equal_to_the_prior_without_information_says_so(gaussian):
    def deaf(key, theta):
        return jax.random.normal(key, (2,))

    report = check(KEY, gaussian(blind=True), deaf, **SIZES)
    assert report.calibrated and report.uses_data is False
    assert "the posterior equals the prior, and no information is found" in report.verdict
    assert "output depends on the parameters" in report.advice[0]


def test_simulations_on_disk_are_checked(gaussian, simulator, tmp_path):
    posterior = gaussian()
    sims = simulate(jax.random.key(5), posterior.prior, simulator, 400, progress=False)
    np.save(tmp_path / "x.npy", np.asarray(sims.x))
    stored = Simulations(sims.theta, np.load(tmp_path / "x.npy", mmap_mode="r"))
    joined = concatenate([stored, stored[np.arange(10)]])
    for each, count in ((stored, 400), (joined, 300)):
        report = check(KEY, posterior, simulations=each, datasets=count, draws=100, progress=False)
        assert report.findings == () and report.num_datasets == count


def test_a_wrong_correlation_is_described(gaussian):
    """The joint error is given as a width along a combination of the parameters."""
    prior = as_prior({"alpha": dist.Normal(0, 1), "beta": dist.Normal(0, 1)})

    class Correlated(type(gaussian())):
        """Correlation .6 between draws of independent parameters."""

        def sample(self, key, x, n):
            mean, sd = self.moments(x)
            noise = jax.random.normal(key, (*mean.shape[:-1], n, 2))
            second = 0.6 * noise[..., 0] + 0.8 * noise[..., 1]
            noise = jnp.stack([noise[..., 0], second], axis=-1)
            return mean[..., None, :] + sd[..., None, :] * noise

        def log_prob(self, theta, x):
            mean, sd = self.moments(jnp.asarray(x))
            if jnp.ndim(theta) > mean.ndim:
                mean, sd = mean[..., None, :], sd[..., None, :]
            z = (theta - mean) / sd
            return -0.5 * (z[..., 0] ** 2 + (z[..., 1] - 0.6 * z[..., 0]) ** 2 / 0.64)

    def simulator(key, theta):
        clean = jnp.stack([theta["alpha"], theta["beta"]])
        return clean + 0.5 * jax.random.normal(key, (2,))

    exact = gaussian(prior=prior)
    report = check(KEY, Correlated(prior, exact.scale, exact.shift), simulator, **SIZES)
    (finding,) = report.findings
    assert finding.parameter is None and finding.direction == "alpha - beta"
    # the variance of alpha - beta is .4 in place of 1
    assert finding.effect == pytest.approx(0.4**0.5, rel=0.15)
    size = rf"about {1 / finding.effect:.2f} times too narrow along alpha - beta"
    assert size in report.verdict


def test_every_term_of_the_report_is_explained(exact_report):
    text = exact_report.explain()
    for term in ("calibrated", "uses the data", "TARP", "ATC", "width", "contraction", "nats"):
        assert f"{term}: {GLOSSARY[term][:30]}" in text
    assert "over-confident:" not in text.replace("\n", " ").split("ATC:")[0]
    columns = re.split(r"\s{2,}", exact_report.summary().split("\n\n")[1].splitlines()[1].strip())
    assert {c for c in columns if c not in {"p", *GLOSSARY}} == set()


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


def test_the_glossary_page_has_the_explanations_of_the_report():
    page = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text()
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", page, flags=re.MULTILINE)[2:])
    assert rows == GLOSSARY
