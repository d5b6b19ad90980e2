"""Priors as JSON data and tensors: every distribution keeps its bits, others are compared."""

import json

import jax
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.artefact import priors
from tests.artefacts import bits
from tests.cases import PRIORS
from tests.cases import prior as prior_of

pytestmark = pytest.mark.promotes

SLOW = {"Student t", "beta", "gamma"}  # to compile


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in sorted(PRIORS.keys() - {"model"})
    ],
)
def test_priors_come_back_with_all_their_bits(name):
    prior, tensors = prior_of(name), {}
    record = json.loads(json.dumps(priors.encode(prior, tensors)))
    again = priors.decode(record, tensors, None)
    assert (record["missing"], again.labels) == (None, prior.labels)
    found, there = (jax.tree.leaves(list(p.distributions.values())) for p in (again, prior))
    if name != "correlated normal":  # which keeps the covariance that it was made with
        assert list(map(type, found)) == list(map(type, there))
        assert bits(found) == bits(there)
    assert priors.decode(record, tensors, prior) is prior


def test_a_prior_of_slightly_other_numbers_is_another_one():
    prior, tensors = prior_of("dict"), {}
    record = priors.encode(prior, tensors)
    points = tensors["prior/points"]
    tensors["prior/points"] = points + 0.01 * np.ptp(points, axis=0, keepdims=True)
    with pytest.raises(sf.ArtefactError, match=r"prior: expected a prior of .* got other ones"):
        priors.decode(record, tensors, prior)


def test_a_prior_that_was_cut_comes_back_cut():
    from sbi_flows.prior.box import BoxPrior

    base, tensors = sf.as_prior({"a": dist.Normal(0, 1), "b": dist.Uniform(np.float64(0.1), 3)}), {}
    box = BoxPrior(base, [-1.0, -1.0], [0.5, np.inf])
    record = priors.encode(box, tensors)
    again = priors.decode(record, tensors, None)
    assert isinstance(again, BoxPrior) and again.mass == box.mass
    for given in (base, box):
        assert priors.decode(record, tensors, given).matches(box)


WHITENED = ["simplex", "correlated normal", "Weibull"]


@pytest.mark.parametrize("name", WHITENED)
def test_the_maps_to_standard_coordinates_come_back(name):
    prior, tensors = prior_of(name), {}
    record = json.loads(json.dumps(priors.encode(prior, tensors)))
    assert set(tensors) == priors.tensor_names(record)
    again = priors.decode(record, tensors, None)
    theta = prior.sample(jax.random.key(0), 5)
    np.testing.assert_array_equal(again.to_standard(theta), prior.to_standard(theta))
    assert bits(jax.tree.leaves(again.whitening)) == bits(jax.tree.leaves(prior.whitening))


def test_files_of_earlier_versions_keep_their_standard_coordinates():
    prior, tensors = prior_of("correlated normal"), {}
    record = priors.encode(prior, tensors)
    del record["maps"]
    tensors = {n: a for n, a in tensors.items() if "whitening" not in n}
    assert priors.tensor_names(record) <= set(tensors)
    theta = prior.sample(jax.random.key(0), 5)
    # without a user's prior, the coordinates are the parameters themselves
    np.testing.assert_array_equal(priors.decode(record, tensors, None).to_standard(theta), theta)
    tensors["prior/points"] = np.array(priors._points(priors.decode(record, tensors, None)))
    tensors["prior/points"] = tensors["prior/points"].astype(np.float64)
    again = priors.decode(record, tensors, prior)
    np.testing.assert_array_equal(again.to_standard(theta), theta)


def test_a_prior_with_default_maps_is_written_as_before():
    assert "maps" not in priors.encode(prior_of("uniform"), {})


MALFORMED = {
    "kinds": (lambda r, t: r["maps"].update(kinds=["NormalMap"]), "maps that fit"),
    "number of kinds": (lambda r, t: r["maps"].update(kinds=[]), "expected 1 maps, got 0"),
    "parts": (lambda r, t: r["maps"].update(whitening=["loc"]), "expected loc, scale"),
    "shape": (lambda r, t: t.update({SCALE: np.ones(3)}), r"expected float64 numbers \(2,\)"),
    "sign": (lambda r, t: t.update({SCALE: -np.ones(2)}), "expected positive scales"),
    "NaN": (lambda r, t: t.update({SCALE: np.full(2, np.nan)}), "expected finite numbers"),
    "upper": (lambda r, t: t.update({LOWER: np.ones((2, 2))}), "expected a lower triangular"),
    "keys": (lambda r, t: r["maps"].update(more=1), "expected the keys"),
    "a condition": (lambda r, t: r.update(mass=0.5), "with a condition, got Prior"),
}
SCALE, LOWER = "prior/whitening/scale", "prior/whitening/lower"


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_maps_are_refused(name):
    damage, message = MALFORMED[name]
    tensors = {}
    record = json.loads(json.dumps(priors.encode(prior_of("correlated normal"), tensors)))
    damage(record, tensors)
    with pytest.raises(sf.ArtefactError, match=message):
        priors.decode(record, tensors, None)


def test_circular_parameters_come_back():
    inside = {"a": dist.VonMises(0.5, 2.0), "b": sf.Circular(0.0, 24.0).expand([2])}
    inside |= {"c": sf.Circular(dist.Uniform(0.0, 1.0)).expand([3]).to_event(1)}
    prior, tensors = sf.as_prior(inside), {}
    record = json.loads(json.dumps(priors.encode(prior, tensors)))
    again = priors.decode(record, tensors, None)
    assert record["missing"] is None and again.circular == (True,) * 6
    assert again.matches(prior)
    with pytest.raises(sf.ArtefactError, match=r"prior: expected a prior of a\[\], b\[2\], c\[3\]"):
        priors.decode(record, tensors, sf.as_prior(inside | {"a": dist.Uniform(-np.pi, np.pi)}))
