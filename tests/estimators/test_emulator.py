"""Emulators: draws follow the simulator, whole numbers stay whole, nothing held out is seen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import sbi_flows as sf
from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.densities.conditional import Blueprint, Weights
from sbi_flows.densities.sizes import Sizes
from sbi_flows.estimators import emulator as module
from sbi_flows.observations.quantised import find_grid
from sbi_flows.observations.standardise import fit_standardiser
from sbi_flows.training import FitKeys
from tests import cases

pytestmark = pytest.mark.promotes

PRIOR = sf.as_prior(dist.Uniform(-1.0, 1.0).expand([2]))
SMALL = sf.MAF(transforms=2, hidden=(16,), context_width=16, context_blocks=1, dropout=0.0)
TRAINING = sf.Training(max_epochs=25, learning_rate=1e-2)
EMULATOR = sf.Emulator(densities=(SMALL,), training=TRAINING, simulations=5_000)
FEW = dataclasses.replace(EMULATOR, simulations=2_000)
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


def draw(simulations, *, settings=EMULATOR, key=1):
    y, standardiser = PRIOR.to_standard(simulations.theta), fit_standardiser(simulations.x)
    seen = module.Seen(y, simulations.x, y[:0])
    emulated, history = module.emulate(
        FitKeys.of(jax.random.key(key)),
        settings,
        PRIOR,
        seen,
        standardiser,
        members=MEMBERS,
        training=sf.Training(validation_fraction=0.1),
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


def test_counts_stay_counts_and_constants_constant(drawn):
    _, x, _ = drawn
    np.testing.assert_allclose(x[:, 1], np.round(x[:, 1]), atol=1e-3)
    assert np.min(x[:, 1]) > -1e-3
    assert len(np.unique(np.round(x[:, 1]))) > 5
    np.testing.assert_allclose(x[:, 2], 7.5, rtol=1e-5)


def test_the_same_key_gives_the_same_draws(drawn, simulations):
    np.testing.assert_array_equal(draw(simulations)[0].features, drawn[0].features)
    assert not np.array_equal(draw(simulations, key=2)[0].features, drawn[0].features)


@pytest.mark.slow
def test_densities_are_mixed_by_held_out_density(simulations):
    mixture = sf.GaussianMixture(components=2, width=8, blocks=1)
    both = dataclasses.replace(EMULATOR, densities=(mixture, SMALL), simulations=300)
    emulated, _, history = draw(simulations, settings=both)
    assert history.shares.shape == (2,) and np.isclose(history.shares.sum(), 1.0)
    assert history.mixture_loss <= np.min(history.held_out_loss) + 1e-3
    assert emulated.y.shape == (MEMBERS * 300, 2) and np.all(np.isfinite(emulated.features))


@pytest.mark.parametrize("n", [300, 4_000, 5_000])
def test_each_density_draws_its_share(monkeypatch, n):
    """Also where the number of draws is not a multiple of the chunks."""

    def chunk(blueprint, weights, key, y):
        return jnp.full((len(y), 1), weights.params) + y

    monkeypatch.setattr(module, "_draw_chunk", chunk)
    size = -(-n // module.CHUNK_DRAWS) * module.CHUNK_DRAWS
    y = jnp.linspace(0.0, 0.5, size)[:, None]
    blueprint = Blueprint(SMALL, None, Sizes((False,), jax.tree.structure(0), ((1,),)))
    shares = (0.3, 0.0001, 0.6999)
    weights = [Weights(float(i), None) for i in range(3)]
    parts = [module._Part(blueprint, w, s) for w, s in zip(weights, shares, strict=True)]
    drawn = np.asarray(module._draw(jax.random.key(0), parts, y, n))
    assert drawn.shape == (size, 1)
    # row i is of parameter i, whoever drew it
    np.testing.assert_allclose(drawn - np.floor(drawn), y, atol=1e-6)
    counts = np.bincount(np.floor(drawn[:n, 0]).astype(int), minlength=3)
    np.testing.assert_allclose(counts / n, [0.3, 0.0, 0.7], atol=2e-3)


def test_rows_that_are_not_finite_are_left_out():
    features = jnp.array([[1.0], [jnp.nan], [3.0], [jnp.inf]])
    y, found = module._finite(jnp.arange(4.0)[:, None], features, 3)
    np.testing.assert_array_equal(y[:, 0], [0.0, 2.0, 0.0])
    np.testing.assert_array_equal(found[:, 0], [1.0, 3.0, 1.0])
    with pytest.raises(module.EmulatorFailed, match="none of its draws is finite"):
        module._finite(y, jnp.full((3, 1), jnp.nan), 2)


@pytest.mark.slow
def test_an_emulator_improves_a_fit_to_few_simulations():
    """Noise is simple given the parameters; the posterior of its size is not."""

    def draws(key, theta):
        return theta[0] + jnp.exp(2.0 * theta[1]) * jax.random.normal(key, (4,))

    few, fresh = (
        sf.simulate(jax.random.key(s), PRIOR, draws, n) for s, n in ((0, 300), (9, 5_000))
    )

    def loss(**settings):
        npe = sf.NPE(PRIOR, SMALL, members=1, training=TRAINING, **settings)
        posterior, _ = npe.fit(jax.random.key(2), few, progress=False)
        return -float(np.mean(posterior.log_prob(fresh.theta, fresh.x)))

    plain, emulated = loss(), loss(emulator=FEW)
    assert emulated < plain - 0.05


@pytest.mark.slow
def test_failed_simulations_do_not_flatter_the_fit():
    """The observation says nothing: no fit can do better than the prior, on fresh rows or not."""
    key = jax.random.key(0)
    # as many valid rows as in the test above, which has then compiled everything
    theta, x = PRIOR.sample(key, 301), jax.random.normal(jax.random.key(1), (301, 4))
    sims = sf.Simulations(theta, x.at[0].set(jnp.nan))
    npe = sf.NPE(PRIOR, SMALL, members=1, training=TRAINING, emulator=FEW)
    _, history = npe.fit(jax.random.key(2), sims, progress=False)
    prior_loss = 2 * np.log(2.0)
    assert history.held_out_loss.mean() == pytest.approx(prior_loss, abs=0.25)


@pytest.mark.slow
def test_each_member_trains_on_draws_that_never_saw_its_held_out_rows(simulations, monkeypatch):
    """Member m gets the draws of member m of the emulator, which held out the same rows."""
    drawn = []

    def chunk(blueprint, weights, key, y):
        drawn.append(weights)
        return jnp.zeros((len(y), 3))

    monkeypatch.setattr(module, "_draw_chunk", chunk)
    fits = []
    original = module.fit

    def fit(*args, **settings):
        fits.append(original(*args, **settings))
        return fits[-1]

    monkeypatch.setattr(module, "fit", fit)
    quick = sf.Training(max_epochs=1)
    settings = dataclasses.replace(EMULATOR, training=quick)
    npe = sf.NPE(PRIOR, SMALL, members=MEMBERS, training=quick, emulator=settings)
    _, history = npe.fit(jax.random.key(3), simulations, progress=False)
    ((weights, emulator_history),) = fits
    np.testing.assert_array_equal(emulator_history.held_out, history.held_out)
    per_member = len(drawn) // MEMBERS
    for m in range(MEMBERS):
        for found in drawn[m * per_member : (m + 1) * per_member]:
            jax.tree.map(lambda a, b, m=m: np.testing.assert_array_equal(a, b[m]), found, weights)


def test_parameters_are_rare_where_simulations_failed():
    y = PRIOR.to_standard(PRIOR.sample(jax.random.key(0), 4_000))
    left = np.asarray(y[:, 0]) < 0.0
    lucky = np.asarray(jax.random.uniform(jax.random.key(1), (4_000,))) < 0.25
    valid = ~left | lucky  # on the left, one in four is valid
    seen = module.Seen(y[valid], y[valid], y[~valid])
    found = np.asarray(module._parameters(jax.random.key(2), PRIOR, seen, 5_000))
    assert found.shape == (5_000, 2)
    assert np.mean(found[:, 0] < 0.0) == pytest.approx(0.2, abs=0.03)
    # new parameters, not those of the rows
    assert not np.isin(found[:, 0], np.asarray(y[:, 0])).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"training": sf.Training(max_epochs=1, optimizer=optax.scale(jnp.nan))},
            "the loss was not finite",
        ),
        ({"max_features": 2}, r"an observation has 3 numbers; .* at most 2 \(max_features\)"),
    ],
)
def test_without_an_emulator_the_estimator_is_the_plain_one(simulations, settings, why):
    emulator = dataclasses.replace(EMULATOR, **settings)
    training = sf.Training(max_epochs=1)
    npe = sf.NPE(PRIOR, SMALL, training=training, members=1, emulator=emulator)
    with pytest.warns(SbiFlowsWarning, match=f"trained without the emulator: {why}"):
        posterior, history = npe.fit(jax.random.key(1), simulations, progress=False)
    assert history.emulator is None
    plain, _ = npe._without_emulator().fit(jax.random.key(1), simulations, progress=False)
    for a, b in zip(*(jax.tree.leaves(p.weights) for p in (posterior, plain)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_not_given_depends_on_whether_there_is_an_emulator():
    npe = sf.NPE(PRIOR, members=3, emulator=EMULATOR)
    plain = npe._without_emulator()
    assert plain == sf.NPE(PRIOR, members=3)
    assert (plain.density, plain.training) == (sf.NSF(), sf.Training())
    assert npe.density.dropout == 0.0 and npe.training.max_epochs < plain.training.max_epochs
    given = sf.NPE(PRIOR, SMALL, training=TRAINING, emulator=EMULATOR)._without_emulator()
    assert (given.density, given.training) == (SMALL, TRAINING)


@pytest.mark.parametrize("value", [1e8, 1e-3])
def test_constants_of_any_size_have_features_with_a_density(value):
    x = jnp.full((500, 1), value)
    grid = find_grid(np.asarray(x))
    features = np.asarray(module._smooth(grid, fit_standardiser(x), jax.random.key(0), x))
    assert len(np.unique(features)) > 490
    assert abs(np.std(features) - np.sqrt(1 / 12)) < 0.02


@pytest.mark.parametrize("last", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_interrupted_emulator_ends_the_fit(simulations, monkeypatch, last):
    """Also where a density was fitted before."""
    calls = []

    def interrupted(*args, **settings):
        weights, history = original(*args, **settings)
        calls.append(len(calls) + 1)
        reason = "interrupted" if calls[-1] % last == 0 else "patience"
        return weights, dataclasses.replace(history, stop_reason=reason)

    original = module.fit
    monkeypatch.setattr(module, "fit", interrupted)
    quick = dataclasses.replace(
        EMULATOR, densities=(SMALL, SMALL), training=sf.Training(max_epochs=1)
    )
    npe = sf.NPE(PRIOR, SMALL, members=1, training=quick.training, emulator=quick)
    with pytest.raises(KeyboardInterrupt):
        npe.fit(jax.random.key(1), simulations, progress=False)
    # in a stack, what was fitted before is kept
    plain = sf.NPE(PRIOR, SMALL, members=1, training=quick.training)
    _, history = sf.Stack([plain, npe, plain]).fit(jax.random.key(1), simulations, progress=False)
    np.testing.assert_array_equal(history.shares, [1.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"densities": ()}, "densities: expected one or more densities such as sf.MAF"),
        ({"densities": (3,)}, "densities: expected a density such as sf.NSF"),
        ({"densities": sf.MAF}, "densities: expected a density such as sf.NSF.*the class MAF"),
        ({"training": 3}, "training: expected sf.Training, got int"),
        ({"simulations": 0}, "simulations: expected a whole number of at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        cases.unchecked(sf.Emulator, **settings)
    with pytest.raises(ValueError, match=r"emulator: expected sf.Emulator, got str"):
        cases.unchecked(sf.NPE, PRIOR, emulator="maf")
