"""Posteriors given the fixed summaries of an embedding, with and without an emulator."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

import sbi_flows as sf
from sbi_flows.estimators.emulator import _space, _standard
from tests.cases import unchecked

TRIALS = 30
PRIOR = {"mu": dist.Normal(0.0, 1.0)}
SETTINGS = {
    "density": sf.MAF(transforms=1, hidden=(32,), context_width=32, context_blocks=1),
    "members": 2,
    "training": sf.Training(max_epochs=15),
    "embedding": sf.Summaries(sf.DeepSet()),
}
EMULATOR = sf.Emulator(
    densities=(SETTINGS["density"],), training=sf.Training(max_epochs=6), simulations=4_000
)


def trials(key, theta):
    """Trials with a standard deviation of 1, of which a random number is missing at the end."""
    noise_key, count_key = jax.random.split(key)
    x = theta["mu"] + jax.random.normal(noise_key, (TRIALS,))
    return jnp.where(jnp.arange(TRIALS) < jax.random.randint(count_key, (), 5, 31), x, jnp.nan)


def complete(key, theta):
    return theta["mu"] + jax.random.normal(key, (TRIALS,))


@pytest.fixture(scope="module")
def simulations():
    return sf.simulate(jax.random.key(0), PRIOR, trials, 3_000, missing=True, progress=False)


@pytest.fixture(scope="module", params=["rows", pytest.param("emulator", marks=pytest.mark.slow)])
def fit(request, simulations):
    emulator = EMULATOR if request.param == "emulator" else None
    npe = sf.NPE(PRIOR, **SETTINGS, emulator=emulator)
    return npe.fit(jax.random.key(1), simulations, progress=False)


def observed(count, mean=0.8):
    x = mean + np.random.default_rng(2).normal(size=count)
    return np.concatenate([x, np.full(TRIALS - count, np.nan)]).astype(np.float32)


@pytest.mark.parametrize("count", [12, 30])
def test_the_conjugate_posterior_is_recovered(fit, count):
    posterior, history = fit
    x = observed(count)
    exact = stats.norm(np.nansum(x) / (count + 1), (count + 1) ** -0.5)
    draws = np.asarray(posterior.sample(jax.random.key(3), x, 4_000))[:, 0]
    assert abs(draws.mean() - exact.mean()) < 0.25 * exact.std()
    assert draws.std() == pytest.approx(exact.std(), rel=0.2)
    assert np.all(np.isfinite(history.start_loss))


def test_only_the_summaries_matter_and_only_they_are_inputs(fit):
    posterior, _ = fit
    (blueprint,) = posterior.blueprints
    labels = SETTINGS["embedding"].summary_labels(jax.ShapeDtypeStruct((TRIALS,), jnp.float32))
    assert posterior.space_labels == labels and blueprint.sizes.input_count == len(labels)
    x = observed(20)
    moved = np.concatenate([x[19::-1], x[20:]])
    (space,) = posterior.spaces(np.stack([x, moved]))
    assert space.shape == (2, len(labels))
    theta = np.array([0.7], np.float32)
    expected = posterior.log_prob(theta, x)
    assert posterior.log_prob(theta, moved) == pytest.approx(float(expected), abs=1e-5)
    other = np.where(np.isnan(x), np.nan, x + 0.3)
    assert abs(float(posterior.log_prob(theta, other) - expected)) > 0.1


@pytest.mark.slow
def test_inside_jax_in_batches_and_on_disk(fit, tmp_path):
    posterior, _ = fit
    xs, theta = np.stack([observed(8), observed(30)]), np.array([0.7], np.float32)
    slope = jax.jit(jax.grad(lambda x: posterior.at(x).log_prob(theta)))(jnp.asarray(xs[1]))
    shift = np.full(TRIALS, 1e-2, np.float32)
    ends = [float(posterior.log_prob(theta, xs[1] + s * shift)) for s in (1, -1)]
    assert float(slope.sum()) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.05, abs=0.02)
    thetas = np.stack([theta, theta + 0.1])
    batch = posterior.log_prob(thetas, xs)
    single = jnp.stack([posterior.log_prob(t, x) for t, x in zip(thetas, xs, strict=True)])
    np.testing.assert_allclose(batch, single, rtol=1e-5)
    posterior.save(tmp_path / "p.sbif")
    loaded = sf.load(tmp_path / "p.sbif")
    np.testing.assert_array_equal(loaded.log_prob(thetas, xs), batch)
    assert loaded.blueprints == posterior.blueprints


def test_check_and_misspecification(fit):
    posterior, _ = fit
    fresh = sf.simulate(jax.random.key(4), PRIOR, trials, 1_000, missing=True, progress=False)
    report = sf.check(jax.random.key(5), posterior, simulations=fresh, draws=100, progress=False)
    assert report.uses_data is True
    assert posterior.misspecification(observed(20)).p_value > 0.05
    assert posterior.misspecification(observed(20) + 9).p_value < 0.05


@pytest.mark.slow
def test_entries_that_are_hidden_at_random():
    full = sf.simulate(jax.random.key(6), PRIOR, complete, 1_500, progress=False)
    npe = sf.NPE(PRIOR, **SETTINGS, missing=sf.RandomSubset(5, TRIALS))
    posterior, _ = npe.fit(jax.random.key(7), full, progress=False)
    test_the_conjugate_posterior_is_recovered((posterior, _), 8)


@pytest.mark.slow
def test_max_features_does_not_limit_summaries(simulations):
    emulator = dataclasses.replace(EMULATOR, max_features=1, simulations=100)
    quick = {**SETTINGS, "training": sf.Training(max_epochs=1), "members": 1}
    npe = sf.NPE(PRIOR, **quick, emulator=emulator)
    _, history = npe.fit(jax.random.key(1), simulations, progress=False)
    assert history.emulator is not None


def image(key, theta):
    return theta["mu"] + jax.random.normal(key, (8, 8))


def several(key, theta):
    keys = jax.random.split(key, 3)
    gap = jax.random.bernoulli(keys[2], 0.5)
    series = complete(keys[0], theta)
    number = theta["mu"] + 0.1 * jax.random.normal(keys[1])
    return {"series": series, "number": jnp.where(gap, jnp.nan, number)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("embedding", "simulator"),
    [
        (sf.ConvNet(), image),
        (sf.SeriesNet(), complete),
        (sf.Fusion({"series": sf.SeriesNet(), "number": None}), several),
    ],
    ids=["image", "series", "several"],
)
def test_other_embeddings_and_rows_on_disk(embedding, simulator, tmp_path):
    has_gaps = simulator is several
    store = sf.SimulationStore(tmp_path / "s", missing=has_gaps)
    given = (jax.random.key(8), PRIOR, simulator, 1_500)
    stored = store.simulate(*given, progress=False)
    long = {"density": sf.MAF(), "training": sf.Training(max_epochs=40, patience=40)}
    npe = sf.NPE(PRIOR, **{**SETTINGS, **long, "embedding": sf.Summaries(embedding)})
    posterior, history = npe.fit(jax.random.key(9), stored, progress=False)
    assert np.all(np.min(history.validation_loss, axis=0) < 0.6)  # 1.4 nats without data
    if has_gaps:  # a number that is missing makes the posterior wider
        x = jax.tree.map(lambda a: np.asarray(a), several(jax.random.key(3), {"mu": 0.4}))
        spread = {
            v: float(jnp.std(posterior.sample(jax.random.key(10), {**x, "number": v}, 2_000)))
            for v in (np.float32(0.4), np.float32(np.nan))
        }
        seen, unseen = spread.values()
        assert seen < 0.8 * unseen


@pytest.mark.slow
def test_a_stack_with_a_network(simulations):
    quick = {**SETTINGS, "members": 1, "training": sf.Training(max_epochs=3)}
    network = sf.NPE(PRIOR, **{**quick, "embedding": sf.DeepSet(width=8, layers=1, features=4)})
    fixed = sf.NPE(PRIOR, **quick)
    x = observed(20)
    for estimators in ([network, fixed], [fixed, network]):
        posterior, history = sf.Stack(estimators).fit(
            jax.random.key(1), simulations, progress=False
        )
        assert history.shares.sum() == pytest.approx(1.0)
        assert posterior.sample(jax.random.key(2), x, 10).shape == (10, 1)
        assert posterior.misspecification(x).p_value > 0.01


def test_a_file_with_other_summaries_is_refused(fit, tmp_path, monkeypatch):
    posterior, _ = fit
    posterior.save(tmp_path / "p.sbif")
    monkeypatch.setattr(sf.Summaries, "summary_labels", lambda self, like: ("mean", "n"))
    with pytest.raises(sf.errors.ArtefactError, match="other fixed summaries"):
        sf.load(tmp_path / "p.sbif")


@pytest.mark.parametrize(
    "make",
    [
        lambda: sf.DeepSet(each=sf.Summaries(sf.SeriesNet())),
        lambda: sf.Fusion({"a": sf.Summaries(sf.SeriesNet())}),
    ],
    ids=["set", "fusion"],
)
def test_inside_another_embedding_it_is_refused(make):
    with pytest.raises(ValueError, match="expected an embedding with a network, got Summaries"):
        make()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "embedding: expected one such as sf.ConvNet.., got NoneType"),
        (sf.ConvNet, "embedding: expected one such as sf.ConvNet.., got the class ConvNet"),
        (
            sf.Summaries(sf.ConvNet()),
            "embedding: expected an embedding with a network, got Summaries",
        ),
    ],
)
def test_settings_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        unchecked(sf.Summaries, given)


def test_observations_that_do_not_suit_are_refused(simulations):
    npe = sf.NPE(PRIOR, embedding=sf.Summaries(sf.ConvNet()))
    with pytest.raises(ValueError, match="ConvNet expects an image"):
        npe.fit(jax.random.key(0), simulations, progress=False)


def test_gaps_and_an_emulator_need_fixed_summaries(simulations):
    npe = sf.NPE(PRIOR, embedding=sf.DeepSet(), emulator=EMULATOR)
    with pytest.raises(ValueError, match=r"emulator: .* expected embedding=sf.Summaries"):
        npe.fit(jax.random.key(0), simulations, progress=False)


def test_extreme_draws_of_summaries_are_clipped():
    """Otherwise one draw makes the regression of the linear start infinite."""
    x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    space = _space(jnp.asarray(x), None)
    drawn = jnp.array([[0.0, 80.0, -80.0], [0.5, 0.5, jnp.nan]], jnp.float32)
    got = np.asarray(_standard(space, drawn))
    width = x.max(axis=0) - x.min(axis=0)
    assert got[0, 1] == pytest.approx(x[:, 1].max() + width[1], rel=1e-5)
    assert got[0, 2] == pytest.approx(x[:, 2].min() - width[2], rel=1e-5)
    assert np.isnan(got[1, 2])
    np.testing.assert_allclose(got[:, 0], space.emulated.inverse(drawn)[:, 0], rtol=1e-5)
