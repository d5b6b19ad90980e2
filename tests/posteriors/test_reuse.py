"""Checks and corrections on rows that a posterior was trained on give one warning."""

import copy
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.posteriors.adapter import as_posterior
from sbi_flows.posteriors.reuse import warn_of_reuse
from sbi_flows.simulations.fingerprints import MAX_HASHES, UsedRows
from tests.artefacts import ensemble, opened, posterior, written
from tests.gaussian import make_gaussian

pytestmark = pytest.mark.promotes

KEY = jax.random.key(3)
PRIOR = sf.as_prior(dist.Normal(0.0, 1.0).expand([2]))
MIXTURE = sf.GaussianMixture(components=2, width=4, blocks=1)


def noisy(key, theta):
    return jnp.repeat(theta, 2)[:3] + 0.5 * jax.random.normal(key, (3,))


def simulated(seed, n=1000):
    return sf.simulate(jax.random.key(seed), PRIOR, noisy, n, progress=False)


TRAIN = simulated(0, 2000)
FRESH = simulated(1)
PLAIN = posterior(PRIOR, ensemble(MIXTURE, PRIOR.bounded))
FITTED = dataclasses.replace(PLAIN, used_rows=UsedRows.of(TRAIN, PRIOR))


def joined(used):
    """Return 1,000 simulations; the first `used` are training rows."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a[:used], b[used:]]), TRAIN[:1000], FRESH)


def said(function):
    """Return the messages of the warnings about used rows."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    messages = [str(w.message) for w in caught if issubclass(w.category, sf.SbiFlowsWarning)]
    return [m for m in messages if "were used" in m]


CALLS = {
    "sbc": lambda made, sims: sf.sbc(KEY, made, sims, draws=20),
    "tarp": lambda made, sims: sf.tarp(KEY, made, sims, draws=20),
    "coverage": lambda made, sims: sf.coverage(KEY, made, sims, draws=20),
    "recalibrate": lambda made, sims: sf.recalibrate(KEY, made, sims, draws=20),
    "conformal": lambda made, sims: sf.conformal(KEY, made, sims, draws=20),
    "check_at": lambda made, sims: sf.check_at(
        KEY, made, jnp.zeros(3), simulations=sims, permutations=19
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_each_check_and_correction_warns_once_of_training_rows_and_never_of_others(name):
    (message,) = said(lambda: CALLS[name](FITTED, joined(50)))
    assert message.startswith("simulations: 50 of 1,000 rows were used to train the posterior;")
    assert said(lambda: CALLS[name](FITTED, FRESH)) == []
    assert said(lambda: CALLS[name](PLAIN, TRAIN)) == []  # it does not know its simulations


@pytest.mark.parametrize("used", [1000, 50, 1])
def test_one_used_row_of_a_thousand_is_found(used):
    (message,) = said(lambda: warn_of_reuse(FITTED, joined(used), "key"))
    assert message == (
        f"key: {used:,} of 1,000 rows were used to train the posterior; a check or a correction "
        "with them is too optimistic. Simulate with another random key"
    )


def test_fresh_rows_never_warn():
    for seed in range(20):
        assert said(lambda seed=seed: warn_of_reuse(FITTED, simulated(10 + seed), "key")) == []


def test_a_copy_from_a_file_is_recognised(tmp_path):
    np.savez(tmp_path / "a.npz", theta=np.asarray(TRAIN.theta, float), x=TRAIN.x)
    file = np.load(tmp_path / "a.npz")
    copied = sf.Simulations(file["theta"], file["x"])
    assert "2,000 of 2,000" in said(lambda: warn_of_reuse(FITTED, copied, "simulations"))[0]


def test_equal_keys_of_a_simulation_and_of_a_fit_give_the_same_first_rows():
    assert "1,000 of 1,000" in said(lambda: warn_of_reuse(FITTED, simulated(0), "key"))[0]


@pytest.mark.slow
def test_the_simulations_of_a_local_check_differ_from_those_of_its_split_key():
    for key in jax.random.split(KEY, 3):
        trained = sf.simulate(jax.random.split(key, 4)[0], PRIOR, noisy, 1000, progress=False)
        made = dataclasses.replace(PLAIN, used_rows=UsedRows.of(trained, PRIOR))
        assert said(lambda made=made, key=key: _check_at(key, made)) == []


def _check_at(key, made):
    return sf.check_at(key, made, jnp.zeros(3), noisy, simulations=400, permutations=19)


@pytest.mark.slow
def test_a_local_check_warns_if_the_fit_used_its_own_simulations():
    from sbi_flows.diagnostics.local import SIMULATE_TAG

    trained = sf.simulate(jax.random.fold_in(KEY, SIMULATE_TAG), PRIOR, noisy, 400, progress=False)
    made = dataclasses.replace(PLAIN, used_rows=UsedRows.of(trained, PRIOR))
    assert said(lambda: _check_at(KEY, made))[0].startswith("key: 400 of 400 rows")


def test_counts_that_are_equal_by_chance_do_not_warn():
    prior = sf.as_prior(dist.Uniform(0.0, 1.0))
    rng = np.random.default_rng(0)
    theta = np.round(rng.uniform(size=(4000, 1)), 4)  # as coarse as few random bits
    sims = sf.Simulations(theta, rng.binomial(10, theta))
    like = jax.ShapeDtypeStruct((1,), jnp.int32)
    made = posterior(prior, ensemble(MIXTURE, prior.bounded, like), like=like)
    made = dataclasses.replace(made, used_rows=UsedRows.of(sims[:1], prior))
    assert len(said(lambda: warn_of_reuse(made, sims[:10], "simulations"))) == 1
    made = dataclasses.replace(made, used_rows=UsedRows.of(sims[:3001], prior))
    few = sims[3000:]
    assert UsedRows.of(sims[:3001], prior).overlap(few, prior) >= 1
    others = few[~made.used_rows.among(few, prior)]
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[:1], b]), few, others)
    assert said(lambda: warn_of_reuse(made, mixed, "simulations")) == []


@pytest.mark.slow
def test_corrections_add_the_rows_that_they_used_and_a_composition_keeps_them():
    half, other = FRESH[:300], FRESH[300:]
    right = sf.recalibrate(KEY, FITTED, half, draws=20)
    sets = sf.conformal(KEY, right, other, draws=20)
    for made, count in ((right, 2_300), (sets, 3_000)):
        assert made.used_rows.count == count
        (message,) = said(lambda made=made: warn_of_reuse(made, half, "simulations"))
        assert "300 of 300 rows were used to train or correct the posterior" in message
    assert said(lambda: warn_of_reuse(right, other, "simulations")) == []
    assert "700 of 700" in said(lambda: warn_of_reuse(sets, other, "simulations"))[0]
    unknown = sf.conformal(KEY, PLAIN, other, draws=20)
    assert unknown.used_rows.count == 700
    film = sf.Diffusion(network=sf.Film(width=8, blocks=1, frequencies=2))
    matched = posterior(PRIOR, ensemble(film, PRIOR.bounded))
    matched = dataclasses.replace(matched, used_rows=FITTED.used_rows)
    assert sf.composed(matched).used_rows is FITTED.used_rows


@pytest.mark.slow
def test_rows_are_kept_by_copies_jax_and_files(tmp_path):
    sets = sf.conformal(KEY, sf.recalibrate(KEY, FITTED, FRESH[:300], draws=20), FRESH[300:])
    for made in (FITTED, sets):
        made.save(tmp_path / "a.sbif")
        copies = (
            copy.deepcopy(made),
            jax.tree.map(lambda leaf: leaf, made),
            sf.load(tmp_path / "a.sbif"),
        )
        for again in copies:
            np.testing.assert_array_equal(again.used_rows.hashes, made.used_rows.hashes)
    x = FRESH.x[0]
    drawn = jax.jit(lambda made: made.sample(KEY, x, 3))(FITTED)  # not a reason to compile again
    np.testing.assert_allclose(drawn, PLAIN.sample(KEY, x, 3), rtol=1e-5)


def test_files_without_rows_load_and_know_nothing(tmp_path):
    PLAIN.save(tmp_path / "a.sbif")
    assert "used_rows" not in opened(tmp_path / "a.sbif")[1]
    assert sf.load(tmp_path / "a.sbif").used_rows is None


SPOILT = {
    "another dtype": lambda a: a.astype(np.int64),
    "two axes": lambda a: a[None],
    "none": lambda a: a[:0],
    "not sorted": lambda a: a[::-1].copy(),
    "repeated": lambda a: np.repeat(a, 2),
    "too many": lambda a: np.arange(MAX_HASHES + 1, dtype=np.uint64),
}


@pytest.mark.parametrize("name", SPOILT)
def test_rows_that_cannot_be_are_refused(name, tmp_path):
    sets = sf.conformal(KEY, FITTED, FRESH, draws=20)
    sets.save(tmp_path / "a.sbif")
    document, tensors = opened(tmp_path / "a.sbif")
    for tensor in ("used_rows", "corrections/0/used_rows"):
        spoilt = {**tensors, tensor: SPOILT[name](tensors[tensor])}
        with pytest.raises(sf.ArtefactError, match=f"{tensor}: expected"):
            sf.load(written(tmp_path / "b.sbif", document, spoilt))


def test_posteriors_of_other_libraries_know_nothing():
    external = make_gaussian(2)
    assert as_posterior(external, jax.ShapeDtypeStruct((2,), jnp.float32)).used_rows is None
    assert said(lambda: warn_of_reuse(external, TRAIN, "simulations")) == []
