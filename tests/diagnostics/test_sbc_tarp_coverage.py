"""Each check passes the exact posterior and rejects three kinds of wrong ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbi_flows.diagnostics import coverage, sbc, tarp
from sbi_flows.diagnostics.coverage import coverage_of
from sbi_flows.diagnostics.ranks import draw_pass
from sbi_flows.diagnostics.tarp import tarp_from_fractions, tarp_of
from sbi_flows.simulations.simulate import simulate

KEY = jax.random.key(1)
N, DRAWS = 400, 200


@pytest.fixture(scope="module")
def simulations(gaussian, simulator):
    return simulate(jax.random.key(0), gaussian().prior, simulator, N)


def test_exact_posterior_passes_every_check(gaussian, simulations):
    exact = gaussian()
    ranks = sbc(KEY, exact, simulations, draws=DRAWS)
    assert min(*ranks.ks, *ranks.location, *ranks.spread) > 0.01
    assert (ranks.log_gamma > 0).all()
    assert ranks.shift == pytest.approx([0, 0], abs=0.15)
    assert ranks.width == pytest.approx([1, 1], abs=0.12)
    points = tarp(KEY, exact, simulations, draws=DRAWS)
    assert points.ks > 0.01 and abs(points.atc) < 0.02
    assert ((points.lower <= points.expected) & (points.expected <= points.upper)).all()
    regions = coverage(KEY, exact, simulations, draws=DRAWS)
    assert regions.ks > 0.01
    assert regions.at(0.9) == pytest.approx(0.9, abs=0.04)
    assert regions.central[[49, 89]].T == pytest.approx(np.array([[0.5, 0.9]] * 2), abs=0.07)


@pytest.mark.parametrize(
    ("knobs", "shift", "width"),
    [({"scale": 1.5}, 0.0, 1.5), ({"scale": 1 / 1.5}, 0.0, 1 / 1.5), ({"shift": 0.5}, 0.5, 1.0)],
    ids=["wide", "narrow", "biased"],
)
def test_sbc_fails_wrong_posteriors_and_measures_them(gaussian, simulations, knobs, shift, width):
    result = sbc(KEY, gaussian(**knobs), simulations, draws=DRAWS)
    assert (result.ks < 1e-3).all()
    assert (result.log_gamma < 0).all()
    assert result.shift == pytest.approx([shift] * 2, abs=0.12)
    assert result.width == pytest.approx([width] * 2, rel=0.12)
    assert ((result.ranks >= 0) & (result.ranks <= DRAWS)).all()


@pytest.mark.parametrize(
    ("knobs", "sign"),
    [({"scale": 1.5}, 1), ({"scale": 1 / 1.5}, -1), ({"shift": 1.0}, -1)],
    ids=["wide", "narrow", "biased"],
)
def test_coverage_and_tarp_fail_wrong_posteriors(gaussian, simulations, knobs, sign):
    wrong = gaussian(**knobs)
    regions = coverage(KEY, wrong, simulations, draws=DRAWS)
    assert regions.ks < 1e-4
    assert sign * (regions.at(0.5) - 0.5) > 0.05
    assert (regions.ks_over_confident < 1e-4) == (sign < 0)
    assert sign * np.sum(regions.expected - regions.levels) > 0
    assert tarp(KEY, wrong, simulations, draws=DRAWS).ks < 1e-3


def test_area_to_the_curve_has_the_sign_of_the_dispersion(gaussian, simulations):
    wide, narrow = (
        tarp(KEY, gaussian(scale=s), simulations, draws=DRAWS).atc for s in (1.5, 1 / 1.5)
    )
    assert narrow < -0.03 and wide > 0.03
    grid = np.linspace(0, 1, 2001)
    fractions = np.random.default_rng(0).beta(2, 1, 300)
    ecdf = np.mean(fractions[:, None] <= grid[None], axis=0)
    by_grid = np.sum((ecdf - grid)[grid > 0.5]) * (grid[1] - grid[0])
    assert tarp_from_fractions(fractions).atc == pytest.approx(by_grid, abs=1e-3)


def test_tarp_p_value_is_taken_on_the_fractions_themselves():
    rng = np.random.default_rng(0)
    # a two-sample test of the curve against its levels gives p about .8 here
    assert max(tarp_from_fractions(rng.beta(1.5, 1.0, 200)).ks for _ in range(5)) < 0.01


def test_only_references_that_depend_on_x_reject_the_prior(gaussian, simulations):
    blind = gaussian(blind=True)
    apart = np.random.default_rng(0).normal(size=(N, 2))
    assert tarp(KEY, blind, simulations, draws=DRAWS, references=apart).ks > 0.01
    assert tarp(KEY, blind, simulations, draws=DRAWS).ks < 1e-10
    assert (sbc(KEY, blind, simulations, draws=DRAWS).ks > 0.01).all()
    assert coverage(KEY, blind, simulations, draws=DRAWS).ks > 0.01


def test_draws_that_tie_with_the_truth_do_not_reject(gaussian, simulations):
    class Rounded(type(gaussian())):
        """Truth and draws rounded to a coarse grid, so that many are equal."""

        def sample(self, key, x, n):
            return jnp.round(2 * super().sample(key, x, n)) / 2

    rounded = simulations.__class__(jnp.round(2 * simulations.theta) / 2, simulations.x)
    exact = gaussian()
    posterior = Rounded(exact.prior, exact.scale, exact.shift)
    assert (sbc(KEY, posterior, rounded, draws=DRAWS).ks > 0.01).all()


def test_summaries_and_numbers_for_json(gaussian, simulations):
    exact = gaussian()
    result = sbc(KEY, exact, simulations, draws=DRAWS)
    assert "theta[1]" in repr(result) and "log-gamma" in repr(result)
    assert result.to_dict()["parameters"]["theta[0]"]["ks"] == result.ks[0]
    assert repr(tarp(KEY, exact, simulations, draws=DRAWS)).startswith("TARP: 400 data sets, KS p ")
    text = repr(coverage(KEY, exact, simulations, draws=DRAWS))
    assert "joint (HPD)" in text and "90%" in text


def test_a_pass_without_densities_or_points_is_refused(gaussian, simulations):
    ranks = draw_pass(KEY, gaussian(), simulations, draws=DRAWS, density=False)
    with pytest.raises(ValueError, match="expected a draw pass with densities, got one without"):
        coverage_of(ranks)
    with pytest.raises(ValueError, match="expected a draw pass with reference points"):
        tarp_of(ranks)
    with pytest.raises(ValueError, match="level: expected a number between 0 and 1"):
        coverage(KEY, gaussian(), simulations, draws=DRAWS).at(1.5)
