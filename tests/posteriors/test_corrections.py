"""Saving and loading of recalibrated and conformal posteriors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.artefact.layers import MAX_LAYERS
from tests.artefacts import ensemble, opened, posterior, written
from tests.cases import unchecked
from tests.golden.make import GOLDEN, HERE

pytestmark = pytest.mark.promotes

PRIOR = sf.as_prior({"a": dist.Normal(0.0, 2.0), "b": dist.Uniform(0.0, 1.0)})
MIXTURE = sf.GaussianMixture(components=2, width=4, blocks=1)
X, KEY = jnp.array([0.3, 1.2, -0.7]), jax.random.key(5)


@pytest.fixture(scope="module")
def corrected():
    """Sets of a recalibrated posterior."""
    return GOLDEN["corrected-2"][0]()


def said(made):
    """All that a corrected posterior says at an observation, as bits."""
    draws, log_prob = made.sample_and_log_prob(KEY, X, 20)
    found = [draws, log_prob, made.log_prob(draws, X)]
    if isinstance(made, sf.ConformalPosterior):
        found += [made.score(draws, X), made.contains(draws, X, 0.8), made.level(0.8)]
    return [(np.asarray(a).dtype, np.asarray(a).tobytes()) for a in found]


def returned(made, tmp_path):
    """It, saved and loaded; the same prior, so that the same programs are run."""
    made.save(tmp_path / "a.sbif")
    again = sf.load(tmp_path / "a.sbif", prior=made.prior)
    assert (type(again), repr(again)) == (type(made), repr(made))
    again.save(tmp_path / "b.sbif")
    assert (tmp_path / "a.sbif").read_bytes() == (tmp_path / "b.sbif").read_bytes()
    return again


@pytest.mark.slow
def test_corrected_posteriors_come_back_bit_for_bit(corrected, tmp_path):
    for made in (corrected, corrected.posterior):
        assert said(returned(made, tmp_path)) == said(made)


@pytest.mark.slow
def test_what_the_library_corrected_comes_back(tmp_path):
    plain = posterior(PRIOR, ensemble(MIXTURE, PRIOR.bounded))
    x = np.random.default_rng(0).normal(size=(180, 3))
    x[7] = np.nan
    sims = sf.Simulations(PRIOR.sample(KEY, 180), x)
    right = sf.recalibrate(jax.random.key(1), plain, sims[:60], draws=20)
    sets = sf.conformal(jax.random.key(2), right, sims[60:120], draws=20)
    above = sf.recalibrate(jax.random.key(3), sets, sims[120:], draws=20)
    for made in (right, sets, above):
        again = returned(made, tmp_path)
        assert said(again) == said(made)
    theta, xs = sims.theta[:2], x[:2]
    found, there = (p.posterior.density_ranks(KEY, theta, xs) for p in (again, above))
    np.testing.assert_array_equal(found, there)


def test_only_files_that_need_it_are_of_the_second_format(corrected, tmp_path):
    for made, version in ((corrected.posterior.posterior, 1), (corrected, 2)):
        made.save(tmp_path / "a.sbif")
        document, _ = opened(tmp_path / "a.sbif")
        assert (document["format"], "corrections" in document) == (version, version == 2)


def test_the_check_of_a_corrected_posterior_is_its_own(corrected, tmp_path, monkeypatch):
    monkeypatch.setattr(sf.Report, "to_dict", lambda _: {"verdict": "calibrated"})
    monkeypatch.setattr(sf.Report, "verdict", "calibrated", raising=False)
    corrected.save(tmp_path / "a.sbif", report=object.__new__(sf.Report))
    again = sf.load(tmp_path / "a.sbif")
    assert again.record == {"check": {"verdict": "calibrated"}}
    assert again.posterior.record == again.posterior.posterior.record == {}
    assert corrected.record == {"check": {"p": 0.5}}


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["rbg", "raw"])
def test_keys_of_every_kind_come_back(corrected, tmp_path, implementation):
    """Those of another generator, and those of JAX before keys had types."""
    key = jax.random.PRNGKey(3) if implementation == "raw" else jax.random.key(3, impl="rbg")
    made = dataclasses.replace(corrected, _key=key)
    made.save(tmp_path / "a.sbif")
    again = sf.load(tmp_path / "a.sbif", prior=made.prior)
    draws = made.sample(KEY, X, 20)
    np.testing.assert_array_equal(again.score(draws, X), made.score(draws, X))


@pytest.mark.slow
def test_a_file_of_double_precision_loads_in_single(tmp_path):
    with jax.enable_x64(True):
        prior = sf.as_prior({"a": dist.Normal(0.0, 2.0), "b": dist.Uniform(0.0, 1.0)})
        base = posterior(prior, ensemble(MIXTURE, prior.bounded))
        golden = GOLDEN["corrected-2"][0]().posterior
        knots = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), float), golden.correction)
        # two knots that single precision cannot hold apart
        values = knots.values.at[:, 1].set(knots.values[:, 0] + 1e-12)
        made = dataclasses.replace(golden, posterior=base, correction=knots._replace(values=values))
        made.save(tmp_path / "a.sbif")
    again = sf.load(tmp_path / "a.sbif")
    assert again.correction.values.dtype == np.float32
    assert np.all(np.diff(again.correction.values, axis=1) > 0)
    np.testing.assert_allclose(again.correction.values, values, rtol=1e-5, atol=1e-5)


def test_what_was_made_of_another_posterior_is_refused(corrected, tmp_path):
    @dataclasses.dataclass
    class Sampled:
        prior: sf.Prior

    base = corrected.posterior
    values = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    within = unchecked(type(base), **{**values, "posterior": Sampled(base.prior)})
    deep = corrected
    for _ in range(MAX_LAYERS):
        deep = dataclasses.replace(corrected, posterior=deep)
    odd = {
        r"expected an sf\.Posterior, or what .* got Sampled, which cannot be saved": within,
        "corrections: expected at most 16 entries": deep,
        r"\[1\]\.draws: expected a number from 20": dataclasses.replace(corrected, draws=3),
        "scores: expected sorted numbers": dataclasses.replace(
            corrected, scores=corrected.scores[::-1]
        ),
    }
    for message, made in odd.items():
        with pytest.raises(ValueError, match=message):
            made.save(tmp_path / "a.sbif")
    assert list(tmp_path.iterdir()) == []


def spoilt(change):
    document, tensors = opened(HERE / "corrected-2.sbif")
    change(document["corrections"], tensors)
    return document, tensors


def field(i, name, value):
    return lambda corrections, _: corrections[i].__setitem__(name, value)


def tensor(name, change):
    def changed(_, tensors):
        tensors[f"corrections/{name}"] = change(tensors[f"corrections/{name}"])

    return changed


SPOILT = {
    "no correction": (lambda c, _: c.clear(), "corrections: number: expected a number from 1"),
    "another type": (field(0, "type", "os.system"), r"\[0\]\.type: expected one of .*os.system"),
    "a type that is none": (field(0, "type", []), r"\[0\]\.type: expected one of .*\[\]"),
    "one for another": (field(0, "type", "conformal"), r"0/scores: expected a tensor float64\[60"),
    "many draws": (field(1, "draws", 2**40), r"\[1\]\.draws: expected a number from 20 to"),
    "no simulations": (field(1, "simulations", 0), r"\[1\]\.simulations: expected a number from 1"),
    "more scores": (field(1, "simulations", 60), r"1/scores: expected a tensor float64\[60\]"),
    "another generator": (field(0, "key", "rbg"), r"0/key: expected a tensor uint32\[4\], got"),
    "no generator": (field(0, "key", "mine"), r"\[0\]\.key: expected one of .*'mine'"),
    "a record that is none": (field(0, "record", 3), r"\[0\]\.record: expected an object"),
    "a field more": (field(0, "extra", 3), r"corrections\[0\]: expected the keys"),
    "too many": (lambda c, _: c.extend(c[:1] * 16), "corrections: expected at most 16 entries"),
    "scores in no order": (tensor("1/scores", lambda a: a[::-1].copy()), "expected sorted numbers"),
    "NaN among scores": (tensor("1/scores", lambda a: a * np.nan), "expected sorted numbers"),
    "knots that fall": (tensor("0/values", lambda a: -a), "0/values: expected finite numbers that"),
    "infinite knots": (tensor("0/scores", lambda a: a * np.inf), "0/scores: expected finite"),
    "knots of one parameter": (
        tensor("0/scores", lambda a: a[:1].copy()),
        r"0/scores: expected a tensor of float32 or float64 \[2, 2 or more\], got float32\[1",
    ),
    "values of one": (tensor("0/values", lambda a: a[:1].copy()), "0/values: expected a tensor"),
    "fewer knots": (tensor("0/values", lambda a: a[:, 1:].copy()), "0/values: expected a tensor"),
    "one knot": (tensor("0/scores", lambda a: a[:, :1].copy()), "0/scores: expected a tensor of"),
    "a scalar": (tensor("0/scores", lambda a: a[0, 0]), "0/scores: expected a tensor of"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_a_forged_correction_says_is_refused(name, tmp_path):
    change, message = SPOILT[name]
    path = written(tmp_path / "a.sbif", *spoilt(change))
    with pytest.raises(sf.ArtefactError, match=message) as caught:
        sf.load(path)
    assert "describes no posterior" not in str(caught.value)


def test_corrections_belong_to_the_second_format_alone(tmp_path):
    document, tensors = spoilt(lambda *_: None)
    path = written(tmp_path / "a.sbif", {**document, "format": 1}, tensors)
    with pytest.raises(sf.ArtefactError, match="document: expected the keys"):
        sf.load(path)
    del document["corrections"]
    path = written(tmp_path / "b.sbif", document, tensors)
    with pytest.raises(sf.ArtefactError, match="corrections: expected a list, got None"):
        sf.load(path)


def test_a_kind_that_cannot_be_derived_from_the_posterior_within_is_refused(tmp_path):
    document, tensors = opened(HERE / "corrected-2.sbif")
    document["corrections"].append({"type": "composed", "levels": 3, "steps": 2, "record": {}})
    path = written(tmp_path / "a.sbif", {**document, "format": 3}, tensors)
    with pytest.raises(sf.errors.ArtefactError, match=r"corrections\[2\]: posterior: expected an"):
        sf.load(path)
