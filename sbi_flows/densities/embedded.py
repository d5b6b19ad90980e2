"""Spaces in which observations are compared with simulations, and model inputs of many rows.

Public names: `spaces_of`, `space_widths`, `space_labels`, `present_fraction`, `inputs_of_rows`,
`training_inputs`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.core.compilation import compiled_per_size
from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Obs
from sbi_flows.densities.conditional import Blueprint, Weights, graph_of
from sbi_flows.observations.standardise import entry_labels

BATCH_ROWS = 256
"""Number of rows that are embedded in one compiled call."""


def spaces_of(blueprint: Blueprint, weights: Weights, features: Any) -> tuple[np.ndarray, ...]:
    """Return the values of observations in each space where they are compared with simulations.

    Args:
        blueprint: Description of the model.
        weights: Arrays of the members.
        features: Features of the observations, shape (B, C), or (B, 2 C) with a mask.

    Returns:
        The first array contains the features without the mask, shape (B, C), or the fixed summaries
        of an embedding, shape (B, K). If the embedding has a network, a second array contains its
        output for the first member, shape (B, F).
    """
    rows = np.asarray(features)
    if blueprint.embedding is None:
        return (rows[:, : _width(blueprint, rows.shape[1])],)
    size = min(BATCH_ROWS, len(rows))
    parts = []
    for start in range(0, len(rows), size):
        # the last batch repeats rows, so that all batches have one compiled shape
        indices = np.arange(start, start + size) % len(rows)
        parts.append(jax.tree.map(np.asarray, _spaces(blueprint, weights, rows[indices])))
    return tuple(np.concatenate(values)[: len(rows)] for values in zip(*parts, strict=True))


def space_widths(blueprint: Blueprint, weights: Weights, features: int) -> tuple[int, ...]:
    """Return the row length of each array from `spaces_of`, given the number of features."""
    if blueprint.embedding is None:
        return (_width(blueprint, features),)
    like = jax.ShapeDtypeStruct((1, features), float)
    return tuple(a.shape[1] for a in jax.eval_shape(partial(_spaces, blueprint), weights, like))


def space_labels(blueprint: Blueprint, observation: Obs) -> tuple[str, ...]:
    """Return the names of the columns of the first space."""
    if blueprint.sizes.summaries:
        return blueprint.settings.summary_labels(blueprint.sizes.like)
    return entry_labels(observation)


def _width(blueprint: Blueprint, features: int) -> int:
    """Return the number of features without the mask."""
    return features // 2 if blueprint.sizes.has_mask else features


@partial(jax.jit, static_argnums=0)
@full_precision
def _spaces(blueprint: Blueprint, weights: Weights, features: Array) -> tuple[Array, ...]:
    """Return the first space, and the output (B, F) of the first member's network if it has one."""
    inputs, sizes = blueprint.inputs(features), blueprint.sizes
    if sizes.summaries_only:
        return (inputs,)
    first = jax.tree.map(lambda leaf: leaf[0], weights)
    context = nnx.merge(graph_of(blueprint), *first).context(inputs)
    if sizes.summaries:
        return sizes.summaries_of(inputs), context[:, : -sizes.summaries]
    return features[:, : _width(blueprint, features.shape[1])], context


def present_fraction(blueprint: Blueprint, features: Any) -> np.ndarray | None:
    """Return the fraction of entries that each observation has, shape (B,); None without a mask."""
    if not blueprint.sizes.has_mask:
        return None
    return np.asarray(features[:, blueprint.sizes.entry_count :], float).mean(axis=1)


def training_inputs(blueprint: Blueprint, features: Array) -> Array:
    """Return what training steps read.

    If the model hides entries at random, these are the features: a step computes summaries after it
    has hidden entries. Otherwise they are the inputs (N, I).
    """
    return features if blueprint.missing is not None else inputs_of_rows(blueprint, features)


def inputs_of_rows(blueprint: Blueprint, features: Array, key: Any = None) -> Array:
    """Compute the inputs (N, I) of many rows in blocks, to limit memory.

    Args:
        blueprint: Description of the model.
        features: Features of the rows, shape (N, C), or (N, 2 C) with a mask.
        key: Random key for hiding entries by `blueprint.missing`; None to hide none.
    """
    if key is None and not blueprint.sizes.summaries:
        return blueprint.inputs(features)
    return _inputs_of_rows(blueprint, features, key)


@compiled_per_size
@partial(jax.jit, static_argnums=0)
@full_precision
def _inputs_of_rows(blueprint: Blueprint, features: Array, key: Any) -> Array:
    n, count = len(features), -(-len(features) // BATCH_ROWS)
    starts = jnp.minimum(jnp.arange(count) * BATCH_ROWS, max(n - BATCH_ROWS, 0))
    size = min(BATCH_ROWS, n)
    out = jnp.zeros((n, blueprint.sizes.input_count), features.dtype)

    def block(i: Array, out: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(features, starts[i], size)
        if key is None:
            part = blueprint.inputs(rows)
        else:
            part = blueprint.hide(jax.random.fold_in(key, i), rows)
        return jax.lax.dynamic_update_slice_in_dim(out, part, starts[i], 0)

    return jax.lax.fori_loop(0, count, block, out)
