"""Tests of uniformity agree with brute force and hand computation, and keep their level."""

import jax
import numpy as np
import pytest
from scipy import stats

from sbi_flows.diagnostics.uniformity import (
    ecdf_band,
    gamma_quantile,
    holm,
    ks_p_value,
    log_gamma,
    normal_p_values,
)
from sbi_flows.posteriors.passes import continuous_ranks


def brute_force_gamma(ranks, draws):
    """Compute gamma from integer ranks by its definition."""
    n, smallest = len(ranks), 1.0
    for i in range(1, draws + 1):
        below = sum(r < i for r in ranks)
        binomial = stats.binom(n, i / (draws + 1))
        above = 1.0 - binomial.cdf(below - 1)
        smallest = min(smallest, binomial.cdf(below), above)
    return 2.0 * smallest


@pytest.mark.parametrize("power", [1.0, 1.6])
def test_log_gamma_is_the_definition(power):
    uniform = np.random.default_rng(1).random(60) ** power
    expected = brute_force_gamma((uniform * 21).astype(int), 20)
    found = log_gamma(uniform, 20) + np.log(gamma_quantile(60, 20))
    assert found == pytest.approx(np.log(expected))


def test_log_gamma_rejects_at_its_level():
    rng = np.random.default_rng(2)
    rejected = np.mean([log_gamma(rng.random(100), 50) < 0 for _ in range(1000)])
    assert 0.03 < rejected < 0.07
    assert log_gamma(np.full(100, 1e-3), 50) < -50  # finite where gamma underflows


def test_gamma_quantile_is_reproducible_and_increases_with_the_level():
    whole = gamma_quantile.__wrapped__(40, 30)
    assert whole == gamma_quantile.__wrapped__(40, 30)
    assert gamma_quantile.__wrapped__(40, 30, 0.5) > whole


def test_uniform_values_leave_the_band_at_its_level():
    points, lower, upper = ecdf_band(100)
    values = np.random.default_rng(3).random((2000, 100, 1))
    ecdf = np.stack([np.mean(values <= z, axis=1)[:, 0] for z in points], axis=1)
    left = np.mean(np.any((ecdf < lower) | (ecdf > upper), axis=1))
    assert 0.03 < left < 0.07


def test_holm_by_hand():
    # sorted: .005 x 4, .01 x 3, .03 x 2, .04 x 1, each at least the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])


def test_ranks_of_ties_alone_are_uniform():
    below, equal = np.zeros(2000, int), np.full(2000, 10)
    uniform = continuous_ranks(jax.random.key(0), below, equal, 10)
    assert uniform.min() > 0 and uniform.max() < 1
    assert ks_p_value(uniform) > 0.01


def test_continuous_ranks_stay_in_their_cell():
    below = np.arange(11)
    uniform = continuous_ranks(jax.random.key(1), below, np.zeros(11, int), 10)
    assert ((uniform * 11).astype(int) == below).all()


def test_location_and_spread_are_distinguished():
    normal = np.random.default_rng(4).normal(size=1000)
    same = normal_p_values(stats.norm.cdf(normal))
    for values, moved in ((normal + 0.4, 0), (normal * 1.3, 1), (normal / 1.3, 1)):
        p = normal_p_values(stats.norm.cdf(values))
        assert p[moved] < 1e-6
        assert p[1 - moved] == pytest.approx(same[1 - moved])


def test_location_and_spread_keep_their_level_with_few_data_sets():
    p = normal_p_values(np.random.default_rng(5).random((50, 4000)))
    for column in p:
        assert np.mean(column < 0.01) == pytest.approx(0.01, abs=0.005)
