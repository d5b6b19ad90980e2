"""The gate is saved with a posterior, and checked when it is loaded."""

import dataclasses
from functools import partial

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from flax import nnx

import sbi_flows as sf
from sbi_flows.densities.embedded import spaces_of
from sbi_flows.observations.typicality import fit_typicality
from tests.artefacts import ensemble, opened, posterior, written

pytestmark = pytest.mark.promotes

SMALL = sf.MAF(transforms=1, hidden=(8,), context_width=0)
PRIOR = sf.as_prior(dist.Normal(0.0, 1.0).expand([2]))


def gated(embedding=None) -> sf.Posterior:
    """Return a posterior with random weights, and a gate that was fitted to random rows."""
    made = posterior(PRIOR, ensemble(SMALL, PRIOR.bounded, embedding=embedding))
    rows = jax.random.normal(jax.random.key(3), (600, 3))
    (blueprint,), (weights,) = made.blueprints, made.weights
    known = fit_typicality(
        jax.random.key(4), partial(spaces_of, blueprint, weights), made.standardiser, rows
    )
    return dataclasses.replace(made, typicality=known)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gate") / "gated.sbif"
    gated().save(path)
    return opened(path)


EMBEDDING = sf.ResidualMLP(3, 4, width=8, blocks=0, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("embedding", [None, EMBEDDING], ids=["features", "embedding"])
def test_it_comes_back_bit_for_bit_and_warns_as_before(embedding, tmp_path):
    made = gated(embedding)
    made.save(tmp_path / "a.sbif")
    loaded = sf.load(tmp_path / "a.sbif")
    before, after = made.typicality.to_arrays(), loaded.typicality.to_arrays()
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype
        np.testing.assert_array_equal(array, after[name])
    xs = np.asarray(jax.random.normal(jax.random.key(5), (20, 3)))
    np.testing.assert_array_equal(sf.anomalies(made, xs).p_value, sf.anomalies(loaded, xs).p_value)
    with pytest.warns(sf.SbiFlowsWarning, match="not typical of the training simulations"):
        loaded.sample(jax.random.key(6), np.full(3, 50.0, np.float32), 5)


def test_a_posterior_without_one_comes_back_without(tmp_path):
    made = posterior(PRIOR, ensemble(SMALL, PRIOR.bounded))
    made.save(tmp_path / "a.sbif")
    assert sf.load(tmp_path / "a.sbif").typicality is None


def nan(array):
    return np.full_like(array, np.nan)


SPOILT = {
    "NaN": ("reference", nan, "reference: expected finite numbers"),
    "no spread": ("0.scale", np.zeros_like, "0.scale: expected positive numbers"),
    "precision": ("0.rows", lambda a: a.astype(np.float64), r"0.rows: expected a tensor float32"),
    "width": (
        "0.rows",
        lambda a: a[:, :2].copy(),
        r"0.rows: expected a tensor float32\['any', 3\]",
    ),
    "directions": ("0.directions", lambda a: a[:1].copy(), "0.directions: expected a tensor"),
    "no rows": ("0.rows", lambda a: a[:0].copy(), "0.rows: expected a tensor"),
    "statistics": ("reference", lambda a: a[:, :3].copy(), "reference: expected a tensor"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_cannot_be_is_refused(name, file, tmp_path):
    document, tensors = file
    tensor, change, message = SPOILT[name]
    spoilt = {**tensors, f"typicality/{tensor}": change(tensors[f"typicality/{tensor}"])}
    path = written(tmp_path / "spoilt.sbif", document, spoilt)
    with pytest.raises(sf.ArtefactError, match=message):
        sf.load(path)


def test_a_number_of_spaces_that_the_posterior_has_not_is_refused(file, tmp_path):
    document, tensors = file
    second = {n.replace("/0.", "/1."): a for n, a in tensors.items() if "/0." in n}
    path = written(tmp_path / "a.sbif", {**document, "typicality": 2}, {**tensors, **second})
    with pytest.raises(sf.ArtefactError, match="typicality: expected 1 spaces, got 2"):
        sf.load(path)
    path = written(tmp_path / "b.sbif", {**document, "typicality": 3}, tensors)
    with pytest.raises(sf.ArtefactError, match="typicality: expected a number from 0 to 2, got 3"):
        sf.load(path)
