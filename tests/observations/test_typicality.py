"""The gate: exact levels whatever the data look like, power against other data, one warning."""

import json
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import pytest
from flax import nnx

import sbi_flows as sf
from sbi_flows.densities.conditional import Blueprint
from sbi_flows.densities.sizes import Sizes
from sbi_flows.observations.spaces import normal_scores
from sbi_flows.observations.standardise import fit_standardiser, flatten_rows
from sbi_flows.observations.typicality import Typicality, fit_typicality
from sbi_flows.posteriors import gate

pytestmark = pytest.mark.promotes

KEY = jax.random.key(0)
PLAIN = Blueprint(sf.MAF(), None, Sizes((False,), None, ()))
LOADINGS = np.random.default_rng(5).normal(size=(3, 10))


def correlated(rng, n):
    """Ten features of three parameters and some noise."""
    return rng.normal(size=(n, 3)) @ LOADINGS + 0.3 * rng.normal(size=(n, 10))


def independent(rng, n):
    return rng.normal(size=(n, 8))


def counts(rng, n):
    """Counts of very different rates, some nearly always zero, and a constant."""
    rates = np.exp(0.5 * rng.normal(size=(n, 1))) * np.array([0.02, 1.0, 5.0, 30.0])
    return np.concatenate([rng.poisson(rates), np.full((n, 1), 7)], axis=1)


def skewed(rng, n):
    """A heavy tail, a skew positive feature and three plain ones."""
    plain = rng.normal(size=(n, 3))
    tail, skew = rng.standard_t(2, size=n), np.exp(plain[:, 0] + rng.normal(size=n))
    return np.concatenate([plain, tail[:, None], skew[:, None]], axis=1)


def single(rng, n):
    return rng.normal(size=(n, 1))


def wide(rng, n):
    """More entries than rows that moments are taken of: a series with a memory."""
    steps = rng.normal(size=(n, 300))
    return rng.normal(size=(n, 1)) + np.cumsum(steps, axis=1) / 10 + 0.1 * rng.normal(size=(n, 300))


CASES = (correlated, independent, counts, skewed, single, wide)


def fitted(simulate, n=3000, rng=None):
    """A summary of n rows, what they are summarised from, and a function to judge others."""
    rows = simulate(np.random.default_rng(1) if rng is None else rng, n).astype(np.float32)
    standardiser = fit_standardiser(jnp.asarray(rows))
    known = fit_typicality(KEY, lambda f: (f,), standardiser, standardiser(jnp.asarray(rows)))

    def judge(others):
        return known.test([np.asarray(standardiser(jnp.asarray(others, jnp.float32)))])

    return known, rows, judge


@pytest.mark.slow
@pytest.mark.parametrize("simulate", CASES)
def test_level_and_power(simulate):
    """At .05 at most 7% of well-specified ones are flagged, and at least 95 of 100 others."""
    n = 1200 if simulate is wide else 4000
    _, rows, judge = fitted(simulate, n)
    rng = np.random.default_rng(2)
    assert np.sum(judge(simulate(rng, 1000)).p_value <= 0.05) <= 70
    shifted, feature = simulate(rng, 100).astype(float), rng.integers(rows.shape[1], size=100)
    sd = rows.std(axis=0)
    if simulate is skewed:
        feature %= 3  # five sd are nothing in a heavy tail
    sd[sd == 0] = 1.0
    shifted[np.arange(100), feature] += 5.0 * sd[feature]
    assert np.sum(judge(shifted).p_value <= 0.05) >= 95


@pytest.mark.parametrize("simulate", [correlated, wide])
def test_another_simulator_of_the_same_means_and_deviations_is_flagged(simulate):
    _, rows, judge = fitted(simulate, 2000)
    other = np.random.default_rng(3).normal(size=(100, rows.shape[1])) * rows.std(0) + rows.mean(0)
    found = judge(other)
    assert np.sum(found.p_value <= 0.05) >= 95
    assert np.median(found.score) > 1.0


def test_counts_in_another_order_are_flagged():
    others = counts(np.random.default_rng(3), 100)[:, [0, 3, 1, 2, 4]]
    assert np.sum(fitted(counts)[2](others).p_value <= 0.05) >= 95


def test_a_hole_in_the_middle_is_seen_by_the_kernel_alone():
    def ring(rng, n):
        angle = 2 * np.pi * rng.random(n)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.05 * rng.normal(size=(n, 2))

    found = fitted(ring)[2](np.zeros((1, 2)))
    assert found.tests["MMD"][0] < 0.01 and found.p_value[0] < 0.02
    assert found.tests["largest feature"][0] > 0.5


def test_p_values_are_uniform_and_no_smaller_than_the_rows_allow():
    known, _, judge = fitted(independent)
    p = judge(independent(np.random.default_rng(4), 2000)).p_value
    for level in (0.02, 0.1, 0.5):
        assert np.mean(p <= level) == pytest.approx(level, abs=4 * (level / 2000) ** 0.5)
    assert judge(np.full((1, 8), 50.0)).p_value[0] == pytest.approx(known.least_p)
    assert known.least_p == 1 / 1501


def test_scores_order_what_p_values_tie():
    _, _, judge = fitted(independent)
    far = judge(np.outer([50.0, 100.0, 500.0], np.eye(8)[0]))
    assert len(set(far.p_value)) == 1
    assert 1.0 < far.score[0] < far.score[1] < far.score[2]


@pytest.mark.parametrize("n", [10, 40])
def test_few_rows_flag_little_and_say_so(n):
    known, rows, judge = fitted(independent, n)
    assert known.least_p == 1 / (1 + n // 2)
    assert np.all(judge(rows).p_value >= known.least_p)


def test_normal_scores_rank_ties_in_the_middle_and_go_on_beyond():
    ordered = np.array([[0.0], [0.0], [0.0], [1.0]], np.float32)
    scores = normal_scores(ordered, np.array([[0.0], [1.0], [1.5], [-2.0]]))[:, 0]
    assert scores[0] == pytest.approx(-0.253, abs=0.001)  # 1.5 of 4 below: u = .4
    assert scores[2] == pytest.approx(1.282 + 0.5, abs=0.001)
    assert scores[3] == pytest.approx(-1.282 - 2.0, abs=0.001)


def test_arrays_hold_everything():
    known, rows, _ = fitted(correlated, 500)
    again = Typicality.from_arrays(known.to_arrays())
    values = [rows[:5]]
    np.testing.assert_array_equal(known.test(values).p_value, again.test(values).p_value)
    np.testing.assert_array_equal(known.test(values).score, again.test(values).score)


PRIOR = sf.as_prior({"level": dist.Normal(0.0, 1.0), "rate": dist.LogNormal(1.0, 0.5)})


def simulator(key, theta):
    a, b = jax.random.split(key)
    series = theta["level"] + 0.3 * jax.random.normal(a, (3,))
    return {"series": series, "count": jax.random.poisson(b, theta["rate"], ())}


class Summaries(nnx.Module):
    """An embedding of the user's own, of a dict."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.linear(flatten_rows(x)))


@pytest.fixture(scope="module")
def simulations():
    with jax.numpy_rank_promotion("allow"):
        return sf.simulate(KEY, PRIOR, simulator, 2000, progress=False)


def fit(simulations, **options):
    npe = sf.NPE(
        PRIOR, sf.MAF(transforms=1, hidden=(8,)), training=sf.Training(max_epochs=2), **options
    )
    return npe.fit(jax.random.key(1), simulations, progress=False)[0]


@pytest.fixture(scope="module")
def posterior(simulations):
    with jax.numpy_rank_promotion("allow"):
        return fit(simulations, members=1)


@pytest.fixture(scope="module")
def embedded(simulations):
    with jax.numpy_rank_promotion("allow"):
        return fit(simulations, members=2, embedding=Summaries)


GOOD = {"series": jnp.array([0.3, 0.1, 0.2]), "count": jnp.array(3)}
# each entry may be there, but not beside the others
ODD = {"series": jnp.array([0.3, 0.1, -2.2]), "count": jnp.array(3)}


@pytest.mark.slow
def test_the_report_names_what_is_off(posterior):
    found = posterior.misspecification(ODD)
    assert found.flagged and found.off[0] == "series[2]"
    assert found.labels == ("count", "series[0]", "series[1]", "series[2]")
    assert abs(found.z[3]) < 3 < -found.conditional_z[3]
    assert found.entry_p[3] > 0.01 > found.conditional_p[3]
    assert found.verdict.startswith("not typical of the simulations: series[2]")
    lines = found.summary().splitlines()
    assert lines[1].startswith("largest feature p ") and "MMD p " in lines[1]
    assert lines[3].split()[0] == "series[2]" and lines[3].endswith("off")
    assert repr(found) == found.summary()
    assert json.loads(json.dumps(found.to_dict()))["off"][0] == "series[2]"


def test_a_typical_observation_passes(posterior):
    found = posterior.misspecification(GOOD)
    assert not found.flagged and found.off == ()
    assert found.verdict.startswith("typical (p 0.")


def test_the_figure_shows_the_entries(posterior):
    figure = posterior.misspecification(ODD).plot(most=3)
    marginal, conditional = figure.axes
    assert marginal.get_yticklabels()[0].get_text() == "series[2]"
    assert len(marginal.collections[0].get_offsets()) == 3
    assert conditional.collections[0].get_offsets()[0][0] < -3
    colours = conditional.collections[0].get_facecolors()
    assert not np.array_equal(colours[0], colours[-1])
    plt.close(figure)


def test_many_observations_at_once_are_judged_as_one_by_one(posterior, simulations):
    rows = simulations[:40].x
    batch = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), rows, ODD)
    found = sf.anomalies(posterior, batch)
    assert found.p_value.shape == found.score.shape == (41,)
    assert found.flagged()[40] and np.sum(found.flagged()) <= 7
    assert found.p_value[40] == posterior.misspecification(ODD).p_value
    assert repr(found).endswith("of 41 flagged at .05, 2.05 expected by chance)")


def test_a_single_observation_warns_once_and_a_batch_never(posterior):
    key = jax.random.key(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.sample(key, GOOD, 10)
        posterior.sample(key, jax.tree.map(lambda leaf: leaf[None], ODD), 10)
        sf.anomalies(posterior, jax.tree.map(lambda leaf: leaf[None], ODD))
        posterior.misspecification(ODD)
    with pytest.warns(sf.SbiFlowsWarning, match=r"x: not typical .*series\[2\]") as found:
        posterior.sample(key, ODD, 10)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.sample(key, ODD, 10)
        posterior.log_prob(jnp.zeros(2), ODD)
    far = {"series": jnp.full(3, 30.0), "count": jnp.array(3)}
    with pytest.warns(sf.SbiFlowsWarning, match="extrapolation"):
        posterior.log_prob(jnp.ones(2), far)


@pytest.mark.slow
def test_too_few_simulations_never_warn_and_the_report_says_why(simulations):
    few = fit(simulations[:60], members=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few.sample(KEY, {"series": jnp.full(3, 30.0), "count": jnp.array(3)}, 5)
    found = few.misspecification(ODD, level=0.01)
    assert not found.flagged
    assert found.verdict == (
        "too few simulations to flag an observation at a level of 0.01: no p-value is below 0.032"
    )


def test_what_is_remembered_is_bounded(posterior, monkeypatch):
    monkeypatch.setattr(gate, "MAX_REMEMBERED", 2)
    for i in range(5):
        posterior.log_prob(jnp.ones(2), {"series": jnp.full(3, 0.1 * i), "count": jnp.array(3)})
    assert len(gate._tested[posterior.typicality]) <= 2


@pytest.mark.slow
def test_an_embedding_is_looked_at_as_well(embedded):
    """The embedding's own space keeps the level, though the embedding was trained on its rows."""
    fresh = sf.simulate(jax.random.key(7), PRIOR, simulator, 1000, progress=False)
    found = sf.anomalies(embedded, fresh.x)
    assert list(found.tests)[-2:] == ["Mahalanobis distance, embedded", "MMD, embedded"]
    assert np.sum(found.p_value <= 0.05) <= 75
    for p in found.tests.values():
        assert 0.02 < np.mean(p <= 0.05) < 0.085
    assert embedded.misspecification(ODD).flagged
    again = Typicality.from_arrays(embedded.typicality.to_arrays())
    assert len(again.spaces) == 2


@pytest.mark.slow
def test_a_stack_keeps_the_gate(simulations):
    quick = {"training": sf.Training(max_epochs=1), "members": 1}
    kinds = [sf.MAF(transforms=1, hidden=(8,)), sf.GaussianMixture(components=2, width=8)]
    stack = sf.Stack([sf.NPE(PRIOR, kind, **quick) for kind in kinds])
    mixed, _ = stack.fit(jax.random.key(1), simulations, progress=False)
    assert mixed.misspecification(ODD).off[0] == "series[2]"


def test_refusals(posterior):
    batch = jax.tree.map(lambda leaf: leaf[None], GOOD)
    assert isinstance(posterior.misspecification(batch), sf.diagnostics.Anomalies)
    with pytest.raises(ValueError, match="xs: expected a batch, got one observation"):
        sf.anomalies(posterior, GOOD)
    with pytest.raises(ValueError, match="level: expected a number between 0 and 1, got 1"):
        posterior.misspecification(GOOD, level=1.0)
    with pytest.raises(ValueError, match="x: expected a dict of arrays with the keys"):
        posterior.misspecification(jnp.zeros(4))
    parts = (posterior.prior, posterior.blueprints, posterior.weights, posterior.shares)
    bare = sf.Posterior(*parts, posterior.standardiser, posterior.observation)
    with pytest.raises(ValueError, match="posterior: expected one that knows its simulations"):
        bare.misspecification(GOOD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bare.sample(KEY, ODD, 3)
