"""Priors cut to a box, and rounds that simulate within one."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.stats import kstest, truncnorm

import sbi_flows as sf
from sbi_flows.estimators import truncated
from sbi_flows.estimators.round_folder import RoundFolder
from sbi_flows.prior.box import BoxPrior
from sbi_flows.simulations.outputs import row_outputs
from tests import cases

pytestmark = pytest.mark.promotes

BASE = sf.as_prior(
    {
        "level": dist.Normal(1.0, 2.0),
        "rate": dist.LogNormal(0.0, 1.0),
        "share": dist.Uniform(-1.0, 3.0),
        "parts": dist.Dirichlet(jnp.ones(3)),
    }
)
LOW, HIGH = [-0.5, 3.0, -1.0, -9.0, -9.0], [1.0, 6.0, 0.5, 9.0, 9.0]
BOX = BoxPrior(BASE, LOW, HIGH)


@pytest.mark.slow
def test_draws_of_a_box_are_those_of_the_prior_that_lie_in_it():
    draws = np.asarray(BOX.sample(jax.random.key(0), 4000))
    assert np.all(BOX.contains(draws))
    level, rate = (draws[:, 0] - 1.0) / 2.0, np.log(draws[:, 1])
    assert kstest(level, truncnorm(-0.5, 1.0).cdf).pvalue > 1e-3
    # far in the tail, where single precision has few numbers next to one
    assert kstest(rate, truncnorm(3.0, 6.0).cdf).pvalue > 1e-3
    half = np.sqrt(3.0)
    share = (draws[:, 2] + 1.0) / 4.0 * 2 * half - half
    assert kstest(share, "uniform", args=(-1.0, 1.5)).pvalue > 1e-3
    # what has no CDF is as it was
    np.testing.assert_allclose(draws[:, 3:].mean(axis=0), 1 / 3, atol=0.02)
    inside = np.asarray(BASE.sample(jax.random.key(1), 200_000))
    assert np.mean(BOX.contains(inside)) == pytest.approx(BOX.mass, abs=2e-4)


@pytest.mark.slow
def test_its_density_is_the_prior_s_over_the_mass_of_the_box():
    draws = BOX.sample(jax.random.key(0), 50)
    expected = np.asarray(BASE.log_prob(draws)) - np.log(BOX.mass)
    np.testing.assert_allclose(BOX.log_prob(draws), expected, rtol=1e-4, atol=1e-4)
    outside = BASE.sample(jax.random.key(1), 50)
    outside = outside[~np.asarray(BOX.contains(outside))]
    assert np.all(np.isneginf(BOX.log_prob(outside)))


@pytest.mark.slow
def test_its_standard_coordinates_are_a_bijection_with_this_jacobian():
    assert BOX.bounded == (True, True, True, False, False)
    y = jax.random.uniform(jax.random.key(0), (20, 5), minval=-1.7, maxval=1.7)
    theta = BOX.from_standard(y)
    assert np.all(BOX.contains(theta))
    np.testing.assert_allclose(BOX.to_standard(theta), y, atol=2e-3)
    # the prior is uniform in what is cut
    log_prob = BOX.log_prob(theta) + BOX.standard_log_det(y, theta)
    free = BASE.log_prob(theta) + BASE.standard_log_det(BASE.to_standard(theta), theta)
    cut = BASE.to_standard(theta)
    normal = jax.scipy.stats.norm.logpdf(cut[:, :2]).sum(axis=1)
    rest = free - normal + np.log(2 * np.sqrt(3.0))
    np.testing.assert_allclose(log_prob, rest - 3 * np.log(2 * np.sqrt(3.0)), atol=2e-3)


def test_a_box_says_how_much_is_left_and_which_it_is():
    assert repr(BOX).startswith("Prior(level: Normal[]") and "of its mass" in repr(BOX)
    assert BOX.matches(BoxPrior(BASE, LOW, HIGH))
    assert not BOX.matches(BASE)
    assert not BOX.matches(BoxPrior(BASE, LOW, np.array(HIGH) + 0.1))
    with pytest.raises(ValueError, match="low, high: expected 5 bounds with low < high"):
        BoxPrior(BASE, HIGH, LOW)
    with pytest.raises(ValueError, match="low, high: expected 5 bounds"):
        BoxPrior(BASE, [0.0], [1.0])


PRIOR = {"place": dist.Normal(0.0, 10.0).expand([2])}
SMALL = sf.NPE(PRIOR, cases.DENSITIES["MAF"], training=sf.Training(max_epochs=8), members=2)
SEEN = np.array([3.0, -2.0], np.float32)


def noisy(key, theta):
    return theta["place"] + 0.2 * jax.random.normal(key, (2,))


def rounds_of(**settings):
    given = {"simulations": 300, "rounds": 4, "progress": False, **settings}
    return sf.truncated_rounds(jax.random.key(0), SMALL, noisy, SEEN, **given)


def test_rows_next_to_a_side_that_cuts_are_counted():
    y = np.zeros((4, 5))
    y[0, 0], y[1, 0] = -0.45, 0.95
    y[:2, 1] = 5.9
    y[:, 2] = -np.sqrt(3.0)  # the prior ends there
    y[:, 3:] = 8.99  # has no CDF
    wide = BoxPrior(BASE, [-0.5, 3.0, -9.0, -9.0, -9.0], [1.0, 6.0, 0.5, 9.0, 9.0])
    assert wide.near_sides(y, 0.05) == {
        "level low": 0.25,
        "level high": 0.25,
        "rate low": 0.5,
        "rate high": 0.5,
        "share high": 0.0,
    }


@pytest.mark.slow
def test_a_posterior_that_presses_against_its_box_is_warned_of(monkeypatch):
    left = []

    def too_high(prior, current, y):
        box = cut(prior, current, y)
        # cut off what lies below the posterior's own mean
        moved = BoxPrior(prior, np.maximum(box.low, y.mean(axis=0)), box.high) if not left else box
        left.append(moved)
        return moved

    cut = truncated._next_box
    monkeypatch.setattr(truncated, "_next_box", too_high)
    with pytest.warns(sf.SbiFlowsWarning, match=r"round 2: .*place\[0\] low \(\d+%\)"):
        _, rounds = rounds_of(rounds=2)
    assert rounds[0].near_edges == rounds[0].pressed == ()
    assert rounds[1].near_edges[0].startswith("place[0] low")


@pytest.mark.release
def test_rounds_close_in_on_the_posterior_and_do_not_bias_it():
    posterior, rounds = rounds_of()
    masses = [r.mass for r in rounds]
    assert masses[0] == 1.0 and masses[-1] < 0.02
    assert all(a > b for a, b in itertools.pairwise(masses))
    assert all(r.simulations == 300 for r in rounds)
    # new ones, and those of earlier rounds that lie in the box
    assert rounds[1].rows > 300
    draws = np.asarray(posterior.sample(jax.random.key(1), SEEN, 4000))
    np.testing.assert_allclose(draws.mean(axis=0), SEEN / 1.0004, atol=0.06)
    np.testing.assert_allclose(draws.std(axis=0), 0.2, rtol=0.25)
    assert np.all(posterior.prior.contains(draws))


@pytest.mark.slow
def test_the_check_draws_from_the_prior_that_was_cut():
    posterior, rounds = rounds_of(rounds=2)
    # new ones, and those of the first round that lie in the box
    assert rounds[1].mass < 0.1
    assert 300 < rounds[1].rows < 400
    assert posterior.used_rows.count == rounds[1].rows
    draws = np.asarray(posterior.sample(jax.random.key(1), SEEN, 2000))
    np.testing.assert_allclose(draws.mean(axis=0), SEEN, atol=0.15)
    assert np.all(posterior.prior.contains(draws))
    assert "cut to" in repr(posterior.prior)
    report = sf.check(jax.random.key(2), posterior, noisy, datasets=100, draws=100, progress=False)
    theta = np.asarray(posterior.prior.sample(jax.random.key(3), 100))
    assert np.abs(theta - SEEN).max() < 15.0
    assert report.num_datasets == 100


@pytest.mark.slow
def test_rounds_end_when_they_do_not_pay():
    _, rounds = rounds_of(rounds=10, shrink_below=0.05)
    assert len(rounds) < 5
    _, rounds = rounds_of(rounds=6, shrink_below=1.0)
    assert len(rounds) == 6


@pytest.mark.slow
def test_rounds_that_are_kept_are_not_repeated(tmp_path, monkeypatch):
    posterior, rounds = rounds_of(folder=tmp_path)
    fits, fit = [], sf.NPE.fit
    monkeypatch.setattr(sf.NPE, "fit", lambda *a, **k: fits.append(1) or fit(*a, **k))
    again, last = rounds_of(folder=tmp_path)
    assert len(fits) == len(last) == 1
    assert last[0].mass == rounds[-1].mass
    key = jax.random.key(5)
    np.testing.assert_array_equal(posterior.sample(key, SEEN, 20), again.sample(key, SEEN, 20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds: expected a whole number of at least 1, got 0"),
        ({"simulations": 0}, "simulations: expected a whole number"),
        ({"shrink_below": 1.5}, "shrink_below: expected a number"),
    ],
)
def test_settings_that_make_no_rounds_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        rounds_of(**settings)


def test_a_stack_goes_through_rounds_as_well():
    stack = sf.Stack([SMALL, SMALL])
    cut = truncated._of_round(stack, 0, BOX)
    assert [e.prior for e in cut.estimators] == [BOX, BOX]


def nested():
    import numpyro

    level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    numpyro.sample("below", dist.Normal(level, 1.0))


def test_what_a_box_cannot_be_cut_from_is_refused():
    with pytest.raises(ValueError, match="expected parameters that do not depend on each other"):
        BoxPrior(sf.as_prior(nested), [-1.0, -1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="base: expected a prior without a box"):
        BoxPrior(BOX, LOW, HIGH)
    assert not BASE.matches(BOX)


def test_an_observation_that_is_none_is_refused_before_any_simulation(tmp_path):
    def wrong(x):
        return sf.truncated_rounds(jax.random.key(0), SMALL, noisy, x, simulations=10)

    with pytest.raises(ValueError, match="x: expected one observation, got a batch"):
        wrong(np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"x: expected shape \(2,\)"):
        wrong(np.zeros(3))
    with pytest.raises(ValueError, match="x: expected finite values, got infinity"):
        wrong(np.array([0.0, np.inf]))
    with pytest.raises(ValueError, match="rounds know no missing entries"):
        wrong(np.array([0.0, np.nan]))


BOX_OF_TWO = BoxPrior(SMALL.prior, [-0.5, -0.5], [0.5, 0.5])


def folder_of(path, **changed):
    """The folder of rounds of `SMALL` at `SEEN`, or of others."""
    settings = {"estimator": SMALL, "simulator": noisy, "x": SEEN, "simulations": 300, **changed}
    outputs = row_outputs(settings["simulator"], SMALL.prior)
    settings["simulator"] = (settings["simulator"], outputs)
    return RoundFolder(path, *settings.values())


def shifted(key, theta):
    return noisy(key, theta) + 1.0


WIDER = dataclasses.replace(SMALL, density=dataclasses.replace(SMALL.density, hidden=(9,)))
LONGER = dataclasses.replace(SMALL, training=sf.Training(max_epochs=9))
OTHERS = {
    "x": (
        {"x": SEEN + 1},
        r"x: expected that of the rounds in .*\[3.0, -2.0\].*, got .*\[4.0, -1.0",
    ),
    "simulations": ({"simulations": 400}, "simulations: expected that of .*, 300, got 400; name"),
    "simulator": ({"simulator": shifted}, "simulator: .* name='.*noisy', got name='.*shifted'"),
    "training": ({"estimator": LONGER}, "estimator: .*, training.max_epochs=8, got .*epochs=9;"),
    "density": ({"estimator": WIDER}, r"estimator: .*density.hidden=.*, got density.hidden=\[9"),
    "kind": ({"estimator": sf.Stack([SMALL])}, "estimator: .*, type='NPE', .*, got type='Stack', "),
}


@pytest.mark.parametrize(("changed", "message"), OTHERS.values(), ids=OTHERS)
def test_a_folder_of_other_rounds_is_refused(tmp_path, changed, message):
    folder_of(tmp_path).save(0, BOX_OF_TWO)
    before = (tmp_path / "boxes.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        folder_of(tmp_path, **changed)
    assert (tmp_path / "boxes.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["boxes.json"]


def test_a_folder_of_the_same_rounds_has_their_boxes(tmp_path):
    """Where checkpoints are, and on how many devices fits run, makes no other rounds."""
    folder = folder_of(tmp_path)
    folder.save(0, BOX_OF_TWO)
    elsewhere = sf.Training(max_epochs=8, checkpoint="elsewhere", devices=1)
    again = folder_of(tmp_path, estimator=dataclasses.replace(SMALL, training=elsewhere))
    assert again.box(0, SMALL.prior).matches(BOX_OF_TWO)
    assert again.box(1, SMALL.prior) is None


def test_boxes_of_an_earlier_version_are_used_with_a_warning(tmp_path):
    """They do not say which estimator made them."""
    box = [BOX_OF_TWO.low.tolist(), BOX_OF_TWO.high.tolist()]
    document = {"x": [SEEN.astype(float).tolist()], "boxes": [box]}
    (tmp_path / "boxes.json").write_text(json.dumps(document))
    with pytest.warns(sf.SbiFlowsWarning, match="boxes.json was written by an earlier version"):
        folder = folder_of(tmp_path)
    assert folder.box(0, SMALL.prior).matches(BOX_OF_TWO)
    with pytest.raises(ValueError, match="x: expected that of the rounds in"):
        folder_of(tmp_path, x=SEEN + 1)
    # what is written from now on says so
    folder.save(1, BOX_OF_TWO)
    with pytest.raises(ValueError, match="estimator: expected that of the rounds in"):
        folder_of(tmp_path, estimator=LONGER)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": []}'])
def test_a_file_that_holds_no_boxes_is_refused(tmp_path, text):
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(ValueError, match=r"boxes.json: expected boxes of earlier rounds, got"):
        folder_of(tmp_path)


def test_a_box_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    folder.save(0, BOX_OF_TWO)
    before = (tmp_path / "boxes.json").read_bytes()

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.save(1, BOX_OF_TWO)
    assert (tmp_path / "boxes.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["boxes.json"]


def test_the_earlier_name_of_shrink_below_is_deprecated():
    with (
        pytest.warns(DeprecationWarning, match="paying: the name is now shrink_below"),
        pytest.raises(ValueError, match="shrink_below: expected a number in"),
    ):
        rounds_of(paying=1.5)
    with pytest.raises(TypeError, match="truncated_rounds: got unexpected arguments pressing, s"):
        rounds_of(shrink=0.5, pressing=1)
