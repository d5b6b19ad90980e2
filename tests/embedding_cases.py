"""Embeddings, and observations for them, that several tests use."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from sbi_flows.networks.embeddings import ConvNet, DeepSet, Fusion, SeriesNet, SetTransformer
from tests.cases import perturbed

BATCH, FEATURES = 3, 4
SERIES = SeriesNet(width=4, heads=2, stride=4, features=FEATURES, dropout=0.5)
LONG_SERIES = dataclasses.replace(SERIES, stride=64)
DEEP_SET = DeepSet(width=8, layers=1, features=FEATURES, dropout=0.5)
SET_TRANSFORMER = SetTransformer(
    width=8, blocks=1, heads=2, inducing=3, features=FEATURES, dropout=0.5
)
CONV = ConvNet(width=4, features=FEATURES, dropout=0.5)
FUSION = Fusion({"image": CONV, "series": SERIES, "redshift": None}, width=8, features=FEATURES)

CASES = {
    "vectors": (DEEP_SET, (6, 2)),
    "set of series": (DeepSet(each=SERIES, width=8, features=FEATURES, dropout=0.5), (3, 9)),
    "transformer": (SET_TRANSFORMER, (6,)),
    "series": (SERIES, (13, 2)),
    "long series": (LONG_SERIES, (70,)),
    "image": (CONV, (17, 6)),
    "cube": (dataclasses.replace(CONV, axes=3), (9, 3, 2)),
    "fusion": (FUSION, {"image": (5, 4), "series": (13,), "redshift": ()}),
}
SETS = ("vectors", "set of series", "transformer")
LISTS = (*SETS, "series", "long series")
"""Cases in which entries may be appended to axis 0."""


def is_shape(shape):
    return isinstance(shape, tuple)


def like_of(shapes):
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.result_type(float)), shapes, is_leaf=is_shape
    )


def observations(shapes, seed=0, batch=BATCH):
    """Return standard normal observations."""

    def draw(shape):
        return jax.random.normal(jax.random.key(seed + sum(shape)), (batch, *shape))

    return jax.tree.map(draw, shapes, is_leaf=is_shape)


def masks(x, seed=1):
    """Return masks in which two thirds of the entries are present."""
    return jax.tree.map(lambda a: jax.random.uniform(jax.random.key(seed), a.shape) < 0.67, x)


def filled(x, mask, value=0.0):
    return jax.tree.map(lambda a, m: jnp.where(m, a, value), x, mask)


@functools.cache
def network(name):
    """Return a compiled network and its weights; biases and tokens are not zero."""
    settings, shapes = CASES[name]
    graph, state = nnx.split(settings.build(nnx.Rngs(0), like_of(shapes)))

    @jax.jit
    def apply(state, x, mask, key=None):
        return nnx.merge(graph, state)(x, mask, key=key)

    return apply, perturbed(jax.random.key(0), state, 0.1)


@functools.cache
def summaries(name):
    return jax.jit(CASES[name][0].summarise)


def padded(x, count, value=0.0):
    """Append `count` entries to axis 0 of each observation."""
    return jnp.pad(x, [(0, 0), (0, count), *[(0, 0)] * (x.ndim - 2)], constant_values=value)
