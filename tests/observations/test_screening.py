"""Screening: what depends on the parameters is kept, what does not is left out."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.estimators import stacking
from sbi_flows.observations import screening
from sbi_flows.observations.screening import dependent_features
from simulators.tasks.slcp_distractors import distractors, slcp_distractors
from tests import cases


def test_what_tells_is_told_from_distractors():
    task = slcp_distractors()
    sims = sf.simulate(jax.random.key(0), task.prior, task.simulator, 2_000, progress=False)
    kept = dependent_features(sims.theta, sims.x, 0.1)
    telling = np.argsort(distractors().order)[:8]
    assert kept[telling].all()
    assert kept.sum() <= 11


def test_the_share_of_what_tells_nothing_is_at_most_the_rate_on_average():
    """The noise of all features has a common part, as that of the distractors."""
    shares = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        theta, x = rng.normal(size=(400, 2)), rng.normal(size=(400, 40)) + rng.normal(size=(400, 1))
        x[:, :10] += theta[:, :1]
        kept = dependent_features(theta, x, 0.2)
        assert kept[:10].all()
        shares.append(kept[10:].sum() / kept.sum())
    assert 0.03 < np.mean(shares) < 0.2


def test_sorted_rows_are_all_looked_at(monkeypatch):
    rng = np.random.default_rng(0)
    theta = np.sort(rng.normal(size=(4_000, 1)), axis=0)
    x = np.where(theta > 0, theta, 0.0) + 0.1 * rng.normal(size=(4_000, 1))
    monkeypatch.setattr(screening, "MAX_ROWS", 1_000)
    assert dependent_features(theta, x, 1e-3).all()
    assert not dependent_features(theta[:1_000], x[:1_000], 1e-3).any()


@pytest.mark.parametrize("kind", ["normal", "counts", "binary", "constant", "heavy"])
def test_independent_features_are_kept_at_no_more_than_the_rate(kind):
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(1_000, 3))
    shape = (1_000, 300)
    x = {
        "normal": rng.normal(size=shape),
        "counts": rng.poisson(1.0, size=shape),
        "binary": rng.random(size=shape) < 0.2,
        "constant": np.ones(shape),
        "heavy": rng.standard_t(1, size=shape),
    }[kind].astype(float)
    # none is kept in nine of ten data sets, so one in three hundred is already rare
    assert dependent_features(theta, x, 0.1).sum() <= 1
    x[:, 7] = theta[:, 1] ** 2 + rng.normal(size=1_000)
    kept = np.flatnonzero(dependent_features(theta, x, 0.1))
    assert 7 in kept
    assert len(kept) <= 3


@pytest.fixture(scope="module")
def noisy():
    """A prior, and a simulator whose second and fourth of four numbers tell nothing."""
    prior = sf.as_prior(dist.Normal(0, 1).expand([2]))

    def simulator(key, theta):
        noise = jax.random.normal(key, (4,))
        return 3.0 + jnp.stack([theta[0], 0.0, theta[1], 0.0]) + 0.5 * noise

    return prior, sf.simulate(jax.random.key(0), prior, simulator, 500, progress=False)


@pytest.mark.slow
@pytest.mark.promotes
def test_a_screened_posterior_looks_at_the_entries_that_tell(noisy):
    prior, sims = noisy
    small, quick = sf.MAF(transforms=1, hidden=(8,)), sf.Training(max_epochs=1)
    npe = sf.NPE(prior, small, training=quick, members=1, screening=1e-3)
    posterior, history = npe.fit(jax.random.key(1), sims, progress=False)
    assert history.kept == (0, 2)
    x = jnp.array([[4.0, 3.0, 3.0, 3.0], [4.0, 9.0, 3.0, -2.0], [2.0, 3.0, 3.0, 3.0]])
    draws = posterior.sample(jax.random.key(2), x, 50)
    log_prob = posterior.log_prob(jnp.zeros((3, 2)), x)
    # the same key splits alike for each observation: only the first column tells them apart
    assert log_prob[0] == log_prob[1]
    assert log_prob[0] != log_prob[2]
    assert draws.shape == (3, 50, 2)
    assert draws[0, :, 0].mean() > draws[2, :, 0].mean() + 1.0


@pytest.mark.slow
@pytest.mark.promotes
def test_a_stack_of_a_screened_estimator_and_one_that_is_not(noisy, monkeypatch):
    monkeypatch.setattr(stacking, "MIN_WEIGHT", 0.0)  # both stay, whatever they are worth
    prior, sims = noisy
    small, quick = sf.MAF(transforms=1, hidden=(8,)), sf.Training(max_epochs=1)
    settings = {"training": quick, "members": 1}
    emulator = sf.Emulator(densities=(small,), training=quick, simulations=500)
    parts = [
        sf.NPE(prior, small, screening=1e-3, emulator=emulator, **settings),
        sf.NPE(prior, small, **settings),
    ]
    posterior, history = sf.Stack(parts).fit(jax.random.key(1), sims, progress=False)
    first, second = history.histories
    assert (first.kept, second.kept) == ((0, 2), None)
    assert first.emulator is not None
    assert [b.feature_indices for b in posterior.blueprints] == [(0, 2), None]
    draws, log_prob = posterior.sample_and_log_prob(jax.random.key(2), sims.x[0], 20)
    np.testing.assert_allclose(log_prob, posterior.log_prob(draws, sims.x[0]), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_nothing_is_left_out_where_nothing_tells(noisy):
    prior, sims = noisy
    shuffled = sf.Simulations(sims.theta, sims.x[::-1])
    small, quick = sf.MAF(transforms=1, hidden=(8,)), sf.Training(max_epochs=1)
    npe = sf.NPE(prior, small, training=quick, members=1, screening=1e-6)
    with pytest.warns(sf.SbiFlowsWarning, match="no entry of the observation passes screening=1e-"):
        posterior, history = npe.fit(jax.random.key(1), shuffled, progress=False)
    assert history.kept is None
    assert posterior.blueprints[0].feature_indices is None


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (0.0, "expected a positive number, got 0.0"),
        (1.0, r"expected a number in \[0, 1\), got 1.0"),
        (-1, "expected a positive number, got -1"),
        (float("nan"), "expected a positive number, got nan"),
        ("0.1", "expected a positive number, got '0.1'"),
    ],
)
def test_a_rate_that_is_none_is_refused(rate, message):
    with pytest.raises(ValueError, match=f"screening: {message}"):
        cases.unchecked(sf.NPE, dist.Normal(0, 1), screening=rate)


def test_screening_and_an_embedding_are_refused():
    with pytest.raises(ValueError, match="screening: expected none with an embedding, got both"):
        sf.NPE(
            dist.Normal(0, 1), screening=0.1, embedding=lambda rngs: sf.ResidualMLP(1, 2, rngs=rngs)
        )
