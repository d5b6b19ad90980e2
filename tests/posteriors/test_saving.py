"""Saving and loading: draws, records, priors and embeddings of a loaded posterior."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx

import sbi_flows as sf
from sbi_flows.core import files
from sbi_flows.densities.conditional import Weights
from sbi_flows.densities.distilled import Distilled
from tests.artefacts import EVENT, bits, ensemble, opened, posterior, written
from tests.cases import DENSITIES, PRIORS, hierarchy, unchecked

pytestmark = pytest.mark.promotes

FILM = sf.Film(width=8, blocks=1, frequencies=2)
FAST = sf.Solver(steps=3)
SMALL = sf.MAF(transforms=1, hidden=(8,), context_width=0)
FLAT = sf.as_prior(dist.Uniform(-2.0, 5.0).expand([2]))
X, KEY = jnp.array([0.3, 1.2, -0.7]), jax.random.key(5)

CONTINUOUS = {
    "CNF": sf.CNF(network=FILM, solver=FAST),
    "flow matching": sf.FlowMatching(
        network=FILM, solver=sf.Solver(steps=3, noise="gaussian"), sampler=sf.Heun(steps=2)
    ),
    "diffusion": sf.Diffusion(
        network=sf.Tokens(
            width=8, heads=2, blocks=1, frequencies=2, kinds=(0, 0), mask=((True, False),) * 2
        ),
        path=sf.VP(last=15),
        solver=FAST,
        sampler=sf.Ancestral(steps=2),
    ),
    "distilled": Distilled(teacher=sf.Diffusion(network=FILM, solver=FAST, path=sf.VE()), steps=1),
}


def same_draws(first, second, x=X):
    draws, again = (p.sample(KEY, x, 5) for p in (first, second))
    assert np.all(np.isfinite(draws))
    return bits(draws) == bits(again)


@pytest.fixture(scope="module")
def small():
    return posterior(FLAT, ensemble(SMALL, FLAT.bounded))


@pytest.mark.parametrize("name", [*DENSITIES, *CONTINUOUS])
def test_every_density_comes_back_bit_for_bit(name, tmp_path):
    returned(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DENSITIES, *CONTINUOUS])
def test_every_density_draws_the_same(name, tmp_path):
    assert same_draws(*returned(name, tmp_path))


def test_a_posterior_without_a_linear_start_comes_back(small, tmp_path):
    blueprint, weights = small.blueprints[0], small.weights[0]
    blueprint = dataclasses.replace(blueprint, linear_start=False)
    part = blueprint, Weights(weights.params, {})
    saved, path = posterior(FLAT, part), tmp_path / "a.sbif"
    saved.save(path)
    document, tensors = opened(path)
    assert document["ensembles"][0]["linear_start"] is False
    assert not any("start" in name for name in tensors)
    loaded = sf.load(path, prior=FLAT)
    assert loaded.blueprints == saved.blueprints
    assert bits(loaded.weights) == bits(saved.weights)
    assert same_draws(saved, loaded)
    small.save(path)
    assert "linear_start" not in opened(path)[0]["ensembles"][0]
    document["ensembles"][0]["linear_start"] = 0
    with pytest.raises(sf.ArtefactError, match="linear_start: expected a flag, got 0"):
        sf.load(written(path, document, tensors))


def returned(name, tmp_path):
    """Save and load a posterior, compare weights and standardiser, and return both posteriors."""
    saved = posterior(FLAT, ensemble((DENSITIES | CONTINUOUS)[name], FLAT.bounded))
    saved.save(tmp_path / "a.sbif")
    # with the same prior and equal blueprints, both posteriors share their compiled programs
    loaded = sf.load(tmp_path / "a.sbif", prior=FLAT)
    assert loaded.blueprints == saved.blueprints
    assert jax.tree.structure(loaded.weights) == jax.tree.structure(saved.weights)
    assert bits(loaded.weights) == bits(saved.weights)
    assert bits(loaded.standardiser) == bits(saved.standardiser)
    return saved, loaded


@pytest.mark.slow
def test_a_mixture_of_ensembles_with_a_dict_of_observations(tmp_path):
    like = {"seen": jax.ShapeDtypeStruct((2,), jnp.float32), "n": jax.ShapeDtypeStruct((), "int32")}
    prior = sf.as_prior(PRIORS["dict"]())
    mixture = sf.GaussianMixture(components=2, width=8, blocks=1)
    parts = (
        ensemble(SMALL, prior.bounded, like),
        ensemble(mixture, prior.bounded, like, kept=(0, 2)),
    )
    saved = posterior(prior, *parts, shares=(0.3, 0.7), like=like)
    saved.save(tmp_path / "a.sbif")
    loaded = sf.load(tmp_path / "a.sbif")
    assert (loaded.shares, loaded.observation) == (saved.shares, saved.observation)
    assert (loaded.prior.labels, repr(loaded)) == (prior.labels, repr(saved))
    x = {"seen": jnp.array([0.1, 2.0]), "n": 3}
    first, again = (p.sample_and_log_prob(KEY, x, 5) for p in (saved, loaded))
    assert np.all(np.isfinite(first[1])) and bits(first) == bits(again)


def test_the_file_is_one_of_safetensors_with_a_document_of_json(small, tmp_path):
    for name in "ab":
        small.save(tmp_path / f"{name}.sbif")
    assert (tmp_path / "a.sbif").read_bytes() == (tmp_path / "b.sbif").read_bytes()
    document, tensors = opened(tmp_path / "a.sbif")
    assert document["ensembles"][0]["density"]["type"] == "MAF"
    assert document["written_by"]["jax"] == jax.__version__
    assert tensors["standardiser/center"].tolist() == [-1.0, 0.0, 1.0]
    sf.load(written(tmp_path / "c.sbif", document, tensors))
    assert (tmp_path / "c.sbif").read_bytes() == (tmp_path / "a.sbif").read_bytes()


@pytest.fixture(scope="module")
def sims():
    def noisy(key, theta):
        return theta + 0.3 * jax.random.normal(key, (2,))

    return sf.simulate(jax.random.key(0), FLAT, noisy, 200, progress=False), noisy


def test_what_was_fitted_comes_back_with_what_is_known_of_the_fit(sims, tmp_path, monkeypatch):
    rows, _ = sims
    quick = sf.Training(max_epochs=1, learning_rate=1e-3)
    npe = sf.NPE(FLAT, SMALL, training=quick, members=2)
    fitted, history = npe.fit(jax.random.key(1), rows, progress=False)
    found = {"verdict": "calibrated", "p": np.float32(np.nan), "ranks": np.arange(2)}
    monkeypatch.setattr(sf.Report, "to_dict", lambda _: found)
    monkeypatch.setattr(sf.Report, "verdict", "calibrated", raising=False)
    fitted.save(tmp_path / "a.sbif", report=object.__new__(sf.Report))
    loaded = sf.load(tmp_path / "a.sbif", prior=FLAT)
    assert same_draws(fitted, loaded, rows.x[0])
    record = loaded.record
    assert json.loads(json.dumps(dict(record))) == dict(record)
    assert record["check"] == {"verdict": "calibrated", "p": None, "ranks": [0, 1]}
    assert {**fitted.record} == {k: v for k, v in record.items() if k != "check"}
    assert record["estimator"]["training"]["learning_rate"] == 1e-3
    assert "checkpoint" not in record["estimator"]["training"]
    assert (record["simulations"]["rows"], record["simulations"]["failed"]) == (200, 0)
    assert record["history"]["validation_loss"] == history.validation_loss.tolist()
    assert record["versions"]["jax"] == jax.__version__
    with pytest.raises(TypeError, match="item assignment"):
        record["check"] = None
    # what was loaded is saved as it was
    loaded.save(tmp_path / "b.sbif")
    assert sf.load(tmp_path / "b.sbif", prior=FLAT).record == record


@pytest.mark.slow
def test_stacked_emulated_and_distilled_fits_come_back(sims, tmp_path):
    rows, noisy = sims
    quick = {"training": sf.Training(max_epochs=1), "members": 1}
    emulator = sf.Emulator(densities=(SMALL,), training=quick["training"], simulations=100)
    kinds = [(SMALL, emulator), (DENSITIES["mixture"], None)]
    stack = sf.Stack([sf.NPE(FLAT, k, emulator=e, **quick) for k, e in kinds])
    stacked, history = stack.fit(jax.random.key(1), rows, progress=False)
    flow = sf.NPE(FLAT, CONTINUOUS["flow matching"], **quick)
    matched, _ = flow.fit(jax.random.key(1), rows, progress=False)
    taught, _ = sf.distil(
        jax.random.key(2), matched, rows, training=quick["training"], progress=False
    )
    assert taught.record["distilled"]["steps"] == 2
    for fitted in (stacked, matched, taught):
        fitted.save(tmp_path / "a.sbif")
        loaded = sf.load(tmp_path / "a.sbif", prior=FLAT)
        assert same_draws(fitted, loaded, rows.x[0])
        assert loaded.record == fitted.record
    found = stacked.record["history"]
    assert found["histories"][0]["emulator"]["shares"] == [1.0]
    assert found["mixture_loss"] == history.mixture_loss
    report = sf.check(jax.random.key(2), stacked, noisy, datasets=50, draws=20, progress=False)
    stacked.save(tmp_path / "a.sbif", report=report)
    assert sf.load(tmp_path / "a.sbif").record["check"]["verdict"] == report.verdict


class Mine(dist.Normal):
    """A distribution of a user's own class."""


@pytest.mark.slow
def test_a_prior_that_cannot_be_written_is_given_and_compared(tmp_path):
    model = sf.as_prior(hierarchy)
    posterior(model, ensemble(SMALL, model.bounded)).save(tmp_path / "a.sbif")
    with pytest.raises(sf.ArtefactError, match=r"a.sbif: its prior .*effect depend.*level\[\]"):
        sf.load(tmp_path / "a.sbif")
    assert sf.load(tmp_path / "a.sbif", prior=hierarchy).prior.labels == model.labels

    def wider():
        level = numpyro.sample("level", dist.Normal(1.0, 4.0))
        with numpyro.plate("group", 2):
            numpyro.sample("effect", dist.Normal(level, 0.5))
        numpyro.sample("noise", dist.HalfNormal(1.4))

    with pytest.raises(sf.ArtefactError, match="distributions that the posterior was fitted to"):
        sf.load(tmp_path / "a.sbif", prior=wider)
    with pytest.raises(sf.ArtefactError, match=r"expected a prior of level\[\].*got Prior\(theta"):
        sf.load(tmp_path / "a.sbif", prior=dist.Normal(0, 1))
    with pytest.raises(ValueError, match="prior: expected a numpyro Distribution"):
        sf.load(tmp_path / "a.sbif", prior=3)

    posterior(Mine(0.0, 2.0), ensemble(SMALL, (False,))).save(tmp_path / "a.sbif")
    with pytest.raises(sf.ArtefactError, match="theta: Mine is not a numpyro class"):
        sf.load(tmp_path / "a.sbif")
    sf.load(tmp_path / "a.sbif", prior=Mine(0.0, 2.0))


class Own(nnx.Module):
    """An embedding of a user's own class, with a setting that its weights do not show."""

    def __init__(self, width, *, sign=1.0, rngs):
        self.layer, self.sign = nnx.Linear(EVENT, width, rngs=rngs), sign

    def __call__(self, x):
        return jnp.tanh(self.sign * self.layer(x))


def own(width, sign=1.0):
    return lambda rngs: Own(width, sign=sign, rngs=rngs)


@pytest.mark.slow
def test_an_embedding_of_the_user_is_given_and_compared(tmp_path):
    path = tmp_path / "a.sbif"
    saved = posterior(FLAT, ensemble(SMALL, FLAT.bounded, embedding=own(4)))
    saved.save(path)
    loaded = sf.load(path, embedding=own(4), prior=FLAT)
    assert bits(loaded.weights) == bits(saved.weights)
    assert same_draws(saved, loaded)
    given = {"missing": None, "wider": own(5)}
    given["other"] = own(4, -1.0)
    for name, said in {
        "missing": r"load\(path, embedding=...\) takes it, expected Own",
        "wider": r"expected a tensor float32\[2, 1, 5, .*got float32\[2, 1, 4",
        "other": "expected one that computes as the one that was saved, got one that differs",
    }.items():
        with pytest.raises(sf.ArtefactError, match=said):
            sf.load(path, embedding=given[name])
    with pytest.raises(ValueError, match="embedding: expected a module or a function"):
        inspect.unwrap(sf.load)(path, embedding=3)
    with pytest.raises(sf.ArtefactError, match="embedding: expected 1 embeddings, got 2"):
        sf.load(path, embedding=[own(4)] * 2)


SIZES = {"in_features": EVENT, "out_features": 4, "width": 8}
EMBEDDINGS = {
    "module": sf.ResidualMLP(**SIZES, blocks=1, dropout=0.2, rngs=nnx.Rngs(0)),
    "function": lambda rngs: sf.ResidualMLP(**SIZES, blocks=0, rngs=rngs),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_of_the_library_comes_back(name, tmp_path):
    saved = posterior(FLAT, ensemble(SMALL, FLAT.bounded, embedding=EMBEDDINGS[name]))
    saved.save(tmp_path / "a.sbif")
    loaded = sf.load(tmp_path / "a.sbif")
    assert bits(loaded.weights) == bits(saved.weights)
    assert same_draws(saved, loaded)


def test_point_clouds_come_back(tmp_path):
    cloud = sf.PointCloud(2, 1, features=3, vectors=2, width=4, rounds=1, rngs=nnx.Rngs(0))
    like = {n: jax.ShapeDtypeStruct((4, k), jnp.float32) for n, k in (("points", 2), ("marks", 1))}
    part = ensemble(SMALL, FLAT.bounded, like, embedding=cloud)
    posterior(FLAT, part, like=like).save(tmp_path / "a.sbif")
    (made,) = sf.load(tmp_path / "a.sbif").blueprints
    assert dict(made.embedding.arguments)["vectors"] == 2


@pytest.mark.parametrize("first", [False, True])
def test_a_file_of_one_precision_loads_in_the_other(first, tmp_path):
    def made(x64):
        with jax.enable_x64(x64):
            prior = sf.as_prior({"a": dist.LogNormal(0.1, 1.0), "b": dist.Uniform(0.0, 0.3)})
            return posterior(prior, ensemble(SMALL, prior.bounded))

    def drawn(saved, x64):
        with jax.enable_x64(x64):
            dtype = jnp.result_type(float)
            theta = jnp.array([[0.7, 0.1], [1.2, 0.25], [0.2, 0.2]], dtype)
            return saved.log_prob(theta, X.astype(dtype))

    saved = made(first)
    with jax.enable_x64(first):
        saved.save(tmp_path / "a.sbif")
        again = sf.load(tmp_path / "a.sbif")
        assert bits(again.weights) == bits(saved.weights)
    assert bits(drawn(again, first)) == bits(drawn(saved, first))
    with jax.enable_x64(not first):
        other = sf.load(tmp_path / "a.sbif")
        assert other.standardiser.center.dtype == jnp.result_type(float)
    there, here = drawn(saved, first), drawn(other, not first)
    assert here.dtype != there.dtype
    np.testing.assert_allclose(here, there, atol=1e-3)


def test_what_cannot_be_saved_is_refused_and_leaves_the_old_file(small, tmp_path, monkeypatch):
    path = tmp_path / "a.sbif"
    small.save(path)
    before = path.read_bytes()

    class Subclass(sf.MAF):
        pass

    own = posterior(FLAT, ensemble(Subclass(transforms=1, hidden=(8,)), FLAT.bounded))
    with pytest.raises(ValueError, match="density: expected an object of this library"):
        own.save(path)
    with pytest.raises(ValueError, match=r"report: expected an sf\.Report, got str"):
        small.save(path, report="calibrated")

    def full(*_):
        raise OSError("no space left")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(files.os, function, full)
            with pytest.raises(OSError, match="no space left"):
                small.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.sbif"]
    with pytest.raises(FileNotFoundError, match="nothing"):
        sf.load(tmp_path / "nothing.sbif")


def test_solvers_of_diffrax_come_back_as_they_are_made_without_arguments(tmp_path):
    import diffrax

    def saved(method):
        solver = unchecked(sf.Solver, method=method, adjoint=diffrax.DirectAdjoint())
        density = sf.CNF(network=FILM, solver=solver)
        posterior(FLAT, ensemble(density, FLAT.bounded)).save(tmp_path / "a.sbif")
        return density

    density = saved(diffrax.Tsit5())
    assert sf.load(tmp_path / "a.sbif").blueprints[0].density == density
    with pytest.raises(ValueError, match=r"solver\.method: expected .* adjoint of diffrax"):
        saved(diffrax.Tsit5(scan_kind="lax"))
