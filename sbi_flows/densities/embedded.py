"""Features and embeddings of observations, as NumPy arrays.

Public names: `spaces_of`, `space_widths`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.core.precision import full_precision
from sbi_flows.densities.conditional import Blueprint, Weights, graph_of

BATCH_ROWS = 256
"""Number of rows that are embedded in one compiled call."""


def spaces_of(blueprint: Blueprint, weights: Weights, features: Any) -> tuple[np.ndarray, ...]:
    """Return features (B, C) and, with an embedding, the first member's embedding (B, F)."""
    rows = np.asarray(features)
    if blueprint.embedding is None:
        return (rows,)
    size = min(BATCH_ROWS, len(rows))
    parts = []
    for start in range(0, len(rows), size):
        # the last batch repeats rows, so that all batches have one compiled shape
        indices = np.arange(start, start + size) % len(rows)
        parts.append(np.asarray(_embedded(blueprint, weights, rows[indices])))
    return rows, np.concatenate(parts)[: len(rows)]


def space_widths(blueprint: Blueprint, weights: Weights, features: int) -> tuple[int, ...]:
    """Return the row length of each array from `spaces_of`: (C,), or (C, F) with an embedding."""
    if blueprint.embedding is None:
        return (features,)
    like = jax.ShapeDtypeStruct((1, features), float)
    return features, jax.eval_shape(partial(_embedded, blueprint), weights, like).shape[1]


@partial(jax.jit, static_argnums=0)
@full_precision
def _embedded(blueprint: Blueprint, weights: Weights, features: Array) -> Array:
    """Return the output (B, F) of the first member's embedding for features (B, C)."""
    first = jax.tree.map(lambda leaf: leaf[0], weights)
    return nnx.merge(graph_of(blueprint), *first).context(blueprint.select_features(features))
