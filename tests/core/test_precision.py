"""Precision of matrix products in compiled programs, whatever hardware runs them."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

import sbi_flows as sf
from sbi_flows.core.precision import inherit_precision, precision_context
from sbi_flows.densities.conditional import Blueprint, Weights, initial_weights
from sbi_flows.densities.sizes import Sizes
from sbi_flows.posteriors import mixtures
from sbi_flows.training import TrainingData, members
from sbi_flows.training.data import Rows
from sbi_flows.training.group import Plan, Source
from tests.cases import PRIORS

DIM, ROWS = 2, 300
FULL, LOW = (jax.lax.Precision.HIGHEST,) * 2, (jax.lax.Precision.DEFAULT,) * 2


def blueprint(density):
    return Blueprint(density, None, Sizes((False,) * DIM, jax.tree.structure(0), ((DIM,),)))


def products(jaxpr):
    """Count the products of each precision in a program, including all programs that it calls."""
    found = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found[equation.params["precision"]] += 1
        for inner in core.jaxprs_in_params(equation.params):
            found += products(inner)
    return found


def epoch(density, **settings):
    """Count the products in one epoch of training, by precision."""
    setting = sf.Training(batch_size=64, max_epochs=1, **settings)
    zeros = jnp.zeros((ROWS, DIM))
    source = Source(TrainingData(zeros, zeros, zeros[:, 0]), None)
    rows, keys = jnp.arange(ROWS)[None], jax.random.key(0)[None]
    prepare = partial(members.prepare, blueprint(density), setting, source)
    shapes = jax.eval_shape(prepare, keys, rows[:, 30:], rows[:, :30], jnp.ones(1))
    plan = Plan(blueprint(density), setting, None)
    return products(members.epoch.trace(plan, *shapes, Rows(zeros, zeros), keys, True).jaxpr.jaxpr)


def posterior(density):
    """Count the products in draws with their densities, by precision."""
    made = blueprint(density)
    weights = jax.eval_shape(lambda: initial_weights(made, jax.random.key(0), None))
    stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape), a.dtype), weights)
    prior = sf.as_prior(PRIORS["uniform"]())
    arguments = (((made, 1.0),), 5, True, prior, (Weights(*stacked),))
    features, keys = jnp.zeros((1, DIM)), jax.random.key(0)[None]
    return products(mixtures.sample.trace(*arguments, features, keys).jaxpr.jaxpr)


DENSITIES = [
    sf.NSF(transforms=1, hidden=(8,), context_width=8, context_blocks=1),
    sf.FlowMatching(network=sf.Film(width=8, blocks=1)),
]


@pytest.mark.parametrize("density", DENSITIES, ids=["NSF", "FlowMatching"])
@pytest.mark.parametrize("program", [epoch, posterior])
def test_all_products_are_in_full_precision_by_default(density, program):
    found = program(density)
    assert set(found) == {FULL}
    assert found[FULL] > 5


def test_what_the_user_has_told_jax_stands():
    with jax.default_matmul_precision("default"):
        assert posterior(DENSITIES[1])[LOW] > 5


def test_only_the_networks_are_trained_in_less():
    full, mixed = epoch(DENSITIES[0]), epoch(DENSITIES[0], matmul_precision="bfloat16")
    assert sum(mixed.values()) == full[FULL]
    # the validation too; not the knots, the linear layers and their derivatives
    assert mixed[LOW] > 10 and mixed[FULL] >= 6


def test_bfloat16_is_meant_on_a_gpu_too(monkeypatch):
    def asked(name):
        with precision_context(name):
            traced = jax.make_jaxpr(lambda a: a @ a)(jnp.ones((2, 2)))
        return traced.eqns[0].params["precision"]

    assert asked("bfloat16") == LOW
    assert asked(None) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert asked("bfloat16") == jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    assert asked("float32") == FULL


def test_threads_of_a_fit_compute_as_the_caller_has_asked():
    def asked():
        traced = jax.make_jaxpr(lambda a: a @ a)(jnp.ones((2, 2)))
        return traced.eqns[0].params["precision"]

    with jax.default_matmul_precision("default"):
        inherit = inherit_precision()
    for initializer, expected in ((inherit, LOW), (inherit_precision(), None)):
        with ThreadPoolExecutor(1, initializer=initializer) as pool:
            assert pool.submit(asked).result() == expected
