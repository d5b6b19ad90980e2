"""Posteriors with the embeddings of this library: sets, series, images, several instruments."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf

PRIOR = {"mu": dist.Normal(0.0, 1.0), "log_sigma": dist.Uniform(-1.0, 1.0)}
SMALL = sf.MAF(transforms=1, hidden=(8,), context_width=8, context_blocks=1)
TRIALS = 12


def trials(key, theta):
    return theta["mu"] + jnp.exp(theta["log_sigma"]) * jax.random.normal(key, (TRIALS,))


def series(key, theta):
    return jnp.cumsum(trials(key, theta)) / TRIALS


def image(key, theta):
    noise = jax.random.normal(key, (8, 8))
    return theta["mu"] + jnp.exp(theta["log_sigma"]) * noise


def nested(key, theta):
    return jax.vmap(series, in_axes=(0, None))(jax.random.split(key, 3), theta)


def several(key, theta):
    keys = jax.random.split(key)
    return {"image": image(keys[0], theta), "redshift": trials(keys[1], theta)[0]}


@dataclasses.dataclass(frozen=True)
class Case:
    embedding: Any
    simulator: Callable
    missing: Any = None


CASES = {
    "set": Case(sf.DeepSet(width=8, layers=1, features=4), trials, sf.RandomSubset(1, TRIALS)),
    "attention": Case(
        sf.SetTransformer(width=8, blocks=1, heads=2, inducing=4, features=4),
        trials,
        sf.RandomSubset(1, TRIALS),
    ),
    "series": Case(
        sf.SeriesNet(width=8, heads=2, features=4),
        series,
        sf.RandomSubset(4, TRIALS, order="first"),
    ),
    "image": Case(sf.ConvNet(width=8, heads=2, features=4), image),
    "trials that are series": Case(
        sf.DeepSet(each=sf.SeriesNet(width=8, heads=2, features=4), width=8, layers=1, features=4),
        nested,
        sf.RandomSubset(1, 3),
    ),
    "two instruments": Case(
        sf.Fusion(
            {"image": sf.ConvNet(width=8, heads=2, features=4), "redshift": None},
            width=8,
            features=4,
        ),
        several,
        sf.RandomParts(0.3),
    ),
}


QUICK = {"set", "image", "two instruments"}
"""Cases whose tests are not slow."""


def cases(*names):
    return [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in names]


@pytest.fixture(scope="module")
def fits():
    made = {}

    def fit(name):
        if name not in made:
            case, keys = CASES[name], jax.random.split(jax.random.key(0))
            sims = sf.simulate(keys[0], PRIOR, case.simulator, 400, progress=False)
            npe = sf.NPE(
                PRIOR,
                SMALL,
                embedding=case.embedding,
                missing=case.missing,
                members=2,
                training=sf.Training(max_epochs=2),
            )
            made[name] = (*npe.fit(keys[1], sims, progress=False), sims)
        return made[name]

    return fit


def first(sims):
    return jax.tree.map(lambda a: np.asarray(a[0]), sims.x)


THETA = np.array([[0.2, -0.3], [-1.0, 0.5]], np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_fit_starts_at_a_linear_start_that_beats_the_prior(fits, name):
    _, history, _ = fits(name)
    prior = 0.5 * np.log(2 * np.pi * np.e) + np.log(2.0)
    assert np.mean(history.start_loss) < prior - 0.3
    assert np.all(history.validation_loss[-1] < history.start_loss + 0.1)


@pytest.mark.parametrize("name", cases(*CASES))
def test_saved_and_loaded(fits, name, tmp_path):
    posterior, _, sims = fits(name)
    posterior.save(tmp_path / "p.sbif")
    loaded, x, key = sf.load(tmp_path / "p.sbif"), first(sims), jax.random.key(1)
    assert loaded.blueprints == posterior.blueprints
    np.testing.assert_array_equal(loaded.sample(key, x, 8), posterior.sample(key, x, 8))
    assert loaded.misspecification(x).p_value == posterior.misspecification(x).p_value


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bound_posteriors_work_inside_jax(fits, name):
    posterior, _, sims = fits(name)
    at = posterior.at(first(sims))
    each = at.log_prob(THETA)
    np.testing.assert_allclose(jax.jit(at.log_prob)(THETA), each, atol=1e-4)
    assert np.all(np.isfinite(jax.grad(lambda t: at.log_prob(t).sum())(jnp.asarray(THETA))))
    batch = jax.tree.map(lambda a: a[:2], sims.x)
    rows = [posterior.log_prob(THETA[i], jax.tree.map(lambda a, i=i: a[i], sims.x)) for i in (0, 1)]
    np.testing.assert_allclose(posterior.log_prob(THETA, batch), rows, atol=1e-4)


@pytest.mark.parametrize("name", cases("set", "attention", "trials that are series"))
def test_the_order_of_a_set_does_not_matter(fits, name):
    posterior, _, sims = fits(name)
    x = first(sims)
    order = np.random.default_rng(0).permutation(len(x))
    np.testing.assert_allclose(
        posterior.log_prob(THETA, x[order]), posterior.log_prob(THETA, x), atol=1e-5, rtol=1e-5
    )


@pytest.mark.slow
def test_the_order_of_a_series_matters(fits):
    posterior, _, sims = fits("series")
    x = first(sims)
    difference = posterior.log_prob(THETA, x[::-1]) - posterior.log_prob(THETA, x)
    assert np.max(np.abs(difference)) > 1e-3


@pytest.mark.parametrize("name", cases("set", "attention", "series", "trials that are series"))
def test_shorter_observations_equal_padded_ones(fits, name):
    posterior, _, sims = fits(name)
    x = first(sims)
    short, padded = x[: len(x) - 1], x.copy()
    padded[len(x) - 1 :] = np.nan
    expected = posterior.log_prob(THETA, padded)
    np.testing.assert_allclose(posterior.log_prob(THETA, short), expected, atol=1e-5, rtol=1e-5)
    assert np.max(np.abs(posterior.log_prob(THETA, x) - expected)) > 1e-4
    with pytest.raises(ValueError, match="expected shape"):
        posterior.sample(jax.random.key(0), np.concatenate([x, x]), 5)


@pytest.mark.parametrize("name", ["set", "two instruments"])
def test_an_observation_without_any_entry_gives_about_the_prior_or_is_refused(fits, name):
    posterior, _, sims = fits(name)
    x = jax.tree.map(lambda a: np.full(a.shape, np.nan), first(sims))
    if name == "set":  # the fit has seen sets of at least one trial
        for empty in (x, x[:0]):
            with pytest.raises(ValueError, match="1 to 12 elements along axis 0, got 0"):
                posterior.sample(jax.random.key(1), empty, 500)
        return
    draws = posterior.sample(jax.random.key(1), x, 500)
    assert np.all(np.isfinite(draws))
    assert 0.5 < np.std(draws[:, 0]) < 1.5  # one row in eleven has neither


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("image", np.zeros((8, 9)), r"expected shape \(8, 8\)"),
        ("image", np.full((8, 8), np.nan), "missing=True"),
        ("set", np.zeros((13,)), r"expected shape \(12,\)"),
        ("two instruments", {"image": np.zeros((8, 8))}, "expected .*redshift"),
    ],
)
def test_observations_of_the_wrong_kind_are_refused(fits, name, x, message):
    with pytest.raises(ValueError, match=message):
        fits(name)[0].sample(jax.random.key(0), x, 5)


def test_embeddings_that_do_not_suit_the_simulations_are_refused():
    sims = sf.simulate(jax.random.key(0), PRIOR, trials, 50, progress=False)
    with pytest.raises(ValueError, match="embedding: ConvNet expects an image"):
        sf.NPE(PRIOR, embedding=sf.ConvNet()).fit(jax.random.key(1), sims)


def test_summaries_are_named_where_an_observation_is_unusual(fits):
    posterior, _, sims = fits("image")
    found = posterior.misspecification(100.0 + first(sims))
    assert found.flagged and "mean" in found.off


class Masked(sf.ResidualMLP):
    """An embedding of a user that reads masks."""

    def __call__(self, x, mask, *, key=None):
        assert mask.dtype == bool and mask.shape == x.shape
        return super().__call__(jnp.concatenate([x, mask], axis=-1), key=key)


@pytest.mark.slow
def test_modules_of_the_user_read_masks_or_are_refused():
    sims = sf.simulate(jax.random.key(0), PRIOR, trials, 100, progress=False)
    settings = {"missing": sf.RandomEntries(0.3), "training": sf.Training(max_epochs=1)}
    npe = sf.NPE(
        PRIOR,
        SMALL,
        embedding=lambda rngs: Masked(2 * TRIALS, 4, width=8, blocks=1, rngs=rngs),
        members=1,
        **settings,
    )
    posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
    x = np.where(np.arange(TRIALS) < 3, np.nan, first(sims))
    assert np.all(np.isfinite(posterior.sample(jax.random.key(2), x, 10)))
    plain = sf.NPE(
        PRIOR, embedding=lambda rngs: sf.ResidualMLP(TRIALS, 4, rngs=rngs), members=1, **settings
    )
    with pytest.raises(ValueError, match="accepts an argument `mask`"):
        plain.fit(jax.random.key(1), sims, progress=False)


@pytest.mark.slow
def test_stacks_mix_embeddings_of_one_kind():
    sims = sf.simulate(jax.random.key(0), PRIOR, trials, 100, progress=False)
    settings = {"members": 1, "training": sf.Training(max_epochs=1)}
    pattern = sf.RandomSubset(2, TRIALS)
    small = sf.DeepSet(width=8, layers=0, features=2)
    pair = [sf.NPE(PRIOR, SMALL, embedding=small, missing=pattern, **settings)]
    pair.append(sf.NPE(PRIOR, sf.GaussianMixture(), embedding=small, missing=pattern, **settings))
    posterior, _ = sf.Stack(pair).fit(jax.random.key(1), sims, progress=False)
    assert np.all(np.isfinite(posterior.sample(jax.random.key(2), first(sims)[:4], 10)))
    assert not posterior.misspecification(first(sims)[:4]).flagged
    for other, message in (
        (sf.NPE(PRIOR, SMALL, missing=pattern, **settings), "same axes together"),
        (sf.NPE(PRIOR, SMALL, embedding=small, **settings), "the same missing="),
    ):
        with pytest.raises(ValueError, match=message):
            sf.Stack([pair[0], other]).fit(jax.random.key(1), sims, progress=False)


@pytest.mark.slow
def test_an_emulator_adds_rows_with_their_summaries():
    sims = sf.simulate(jax.random.key(0), PRIOR, trials, 150, progress=False)
    quick = sf.Training(max_epochs=1)
    emulator = sf.Emulator(densities=(SMALL,), training=quick, simulations=200)
    npe = sf.NPE(
        PRIOR,
        SMALL,
        embedding=sf.DeepSet(width=8, layers=0, features=2),
        emulator=emulator,
        members=1,
        training=quick,
    )
    posterior, history = npe.fit(jax.random.key(1), sims, progress=False)
    assert history.emulator is not None
    assert np.all(np.isfinite(posterior.sample(jax.random.key(2), first(sims), 10)))


@pytest.mark.slow
def test_shorter_observations_need_a_fit_that_knows_them():
    sims = sf.simulate(jax.random.key(0), PRIOR, trials, 100, progress=False)
    small = sf.DeepSet(width=8, layers=0, features=2)
    npe = sf.NPE(PRIOR, SMALL, embedding=small, members=1, training=sf.Training(max_epochs=1))
    posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
    with pytest.raises(ValueError, match=r"expected shape \(12,\), or a batch of it, got \(4,\)"):
        posterior.sample(jax.random.key(2), first(sims)[:4], 10)


@pytest.mark.slow
def test_checks_of_patterns_accept_every_size(fits):
    posterior, _, _ = fits("set")
    report = sf.check(jax.random.key(1), posterior, trials, datasets=60, draws=20, progress=False)
    assert report.num_failed == 0
