"""Emulators: draws follow the simulator, whole numbers stay whole, nothing held out is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import sbi_flows as sf
from sbi_flows.data import Simulations
from sbi_flows.errors import SbiFlowsWarning
from sbi_flows.estimators import emulator as module
from sbi_flows.standardise import fit_standardiser
from tests import cases

pytestmark = pytest.mark.promotes

PRIOR = sf.as_prior(dist.Uniform(-1.0, 1.0).expand([2]))
SMALL = sf.MAF(transforms=2, hidden=(16,), context_width=16, context_blocks=1, dropout=0.0)
TRAINING = sf.Training(max_epochs=25, learning_rate=1e-2)
EMULATOR = sf.Emulator(densities=(SMALL,), training=TRAINING, rows=5_000)
MEMBERS = 2


def simulator(key, theta):
    """A sum with noise, a count, and a constant."""
    first, second = jax.random.split(key)
    total = theta[0] + 0.3 * jax.random.normal(first)
    count = jax.random.poisson(second, jnp.exp(1.0 + theta[1]))
    return jnp.stack([total, count.astype(float), jnp.asarray(7.5)])


@pytest.fixture(scope="module")
def simulations():
    return sf.simulate(jax.random.key(0), PRIOR, simulator, 2_000)


def draw(simulations, *, settings=EMULATOR, key=1, from_prior=True):
    y, standardiser = PRIOR.to_standard(simulations.theta), fit_standardiser(simulations.x)
    emulated, history = module.emulate(
        jax.random.key(key),
        settings,
        PRIOR,
        y,
        simulations.x,
        standardiser,
        members=MEMBERS,
        validation_fraction=0.1,
        from_prior=from_prior,
        progress=False,
    )
    return emulated, standardiser.inverse(emulated.features), history


@pytest.fixture(scope="module")
def drawn(simulations):
    return draw(simulations)


def test_draws_follow_the_simulator(drawn):
    emulated, x, _ = drawn
    theta = PRIOR.from_standard(emulated.y)
    assert emulated.y.shape == (MEMBERS * 5_000, 2) and x.shape == (MEMBERS * 5_000, 3)
    # parameters of the prior, as many of either member
    np.testing.assert_allclose(np.mean(theta, axis=0), 0.0, atol=0.03)
    assert not np.array_equal(emulated.y[:5_000], emulated.y[5_000:])
    residual = x[:, 0] - theta[:, 0]
    assert abs(np.mean(residual)) < 0.05 and abs(np.std(residual) - 0.3) < 0.05
    for low, high in [(-1.0, -0.5), (0.5, 1.0)]:
        rows = (theta[:, 1] > low) & (theta[:, 1] < high)
        expected = np.mean(np.exp(1.0 + np.linspace(low, high, 50)))
        assert abs(np.mean(x[rows, 1]) - expected) < 0.2 * expected


def test_whole_numbers_stay_whole_and_in_range_and_constants_constant(drawn, simulations):
    _, x, _ = drawn
    np.testing.assert_allclose(x[:, 1], np.round(x[:, 1]), atol=1e-4)
    assert np.min(x[:, 1]) > -1e-4 and np.max(x[:, 1]) < np.max(simulations.x[:, 1]) + 1e-3
    assert len(np.unique(np.round(x[:, 1]))) > 5
    np.testing.assert_allclose(x[:, 2], 7.5, rtol=1e-5)


def test_the_same_key_gives_the_same_draws(drawn, simulations):
    np.testing.assert_array_equal(draw(simulations)[0].features, drawn[0].features)
    assert not np.array_equal(draw(simulations, key=2)[0].features, drawn[0].features)


def test_densities_are_mixed_by_held_out_density(simulations):
    """One that does not train beside one that does."""
    both = sf.Emulator(densities=(sf.GaussianMixture(width=8), SMALL), training=TRAINING, rows=300)
    emulated, _, history = draw(simulations, settings=both)
    assert history.shares.shape == (2,) and np.isclose(history.shares.sum(), 1.0)
    assert history.mixture_loss <= np.min(history.held_out_loss) + 1e-3
    assert emulated.y.shape == (MEMBERS * 300, 2) and np.all(np.isfinite(emulated.features))


def test_an_emulator_improves_a_fit_to_few_simulations():
    """Noise is simple given the parameters; the posterior of its size is not."""

    def draws(key, theta):
        return theta[0] + jnp.exp(2.0 * theta[1]) * jax.random.normal(key, (4,))

    few, fresh = (
        sf.simulate(jax.random.key(s), PRIOR, draws, n) for s, n in ((0, 300), (9, 5_000))
    )

    def loss(**settings):
        npe = sf.NPE(PRIOR, SMALL, members=MEMBERS, training=TRAINING, **settings)
        posterior, _ = npe.fit(jax.random.key(2), few, progress=False)
        return -float(np.mean(posterior.log_prob(fresh.theta, fresh.x)))

    plain, emulated = loss(), loss(emulator=EMULATOR)
    assert emulated < plain - 0.05


def test_each_member_trains_on_draws_that_never_saw_its_held_out_rows(simulations):
    _, history = sf.NPE(
        PRIOR, SMALL, members=MEMBERS, training=sf.Training(max_epochs=1), emulator=EMULATOR
    ).fit(jax.random.key(3), simulations, progress=False)
    (part,) = history.emulator.histories
    np.testing.assert_array_equal(part.held_out, history.held_out)


def test_parameters_come_from_the_rows_where_simulations_failed(simulations):
    kept = simulations[np.flatnonzero(np.asarray(simulations.theta[:, 0]) > 0)]
    emulated, _, _ = draw(kept, from_prior=False)
    assert np.min(PRIOR.from_standard(emulated.y)[:, 0]) > 0
    # and this is what a fit does
    failed = jnp.where(simulations.theta[:, :1] > 0, simulations.x, jnp.nan)
    seen = {}

    def spy(*args, **settings):
        seen.update(settings)
        raise sf.TrainingDiverged("spy", epoch=1)

    npe = sf.NPE(PRIOR, SMALL, members=1, training=sf.Training(max_epochs=1), emulator=EMULATOR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sbi_flows.estimators.npe.emulate", spy)
        with pytest.warns(SbiFlowsWarning, match="trained without the emulator: spy"):
            npe.fit(jax.random.key(1), Simulations(simulations.theta, failed), progress=False)
    assert seen["from_prior"] is False


def test_one_that_diverges_is_left_out(simulations):
    nan = sf.Training(max_epochs=1, optimizer=optax.scale(jnp.nan))
    broken = sf.Emulator(densities=(SMALL,), training=nan, rows=100)
    npe = sf.NPE(PRIOR, SMALL, members=1, training=sf.Training(max_epochs=1), emulator=broken)
    with pytest.warns(SbiFlowsWarning, match="trained without the emulator: the loss was not"):
        _, history = npe.fit(jax.random.key(1), simulations, progress=False)
    assert history.emulator is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"densities": ()}, "densities: expected one or more densities such as sf.MAF"),
        ({"densities": (3,)}, "densities: expected one or more densities such as sf.MAF"),
        ({"training": 3}, "training: expected sf.Training, got int"),
        ({"rows": 0}, "rows: expected a whole number of at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        cases.unchecked(sf.Emulator, **settings)
    with pytest.raises(ValueError, match=r"emulator: expected sf.Emulator, got str"):
        cases.unchecked(sf.NPE, PRIOR, emulator="maf")
