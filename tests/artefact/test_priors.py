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
