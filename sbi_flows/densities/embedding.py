"""Embeddings of a model: settings of this library, or flax modules of the user.

Public names: `Embedding`, `summary_count`, `has_summaries_only`, `check_embedding`,
`as_trainable`, `embed`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import Array

from sbi_flows.core.typing import Key, Obs
from sbi_flows.networks.embeddings import EmbeddingSettings

Embedding = EmbeddingSettings | nnx.Module | Callable[[nnx.Rngs], nnx.Module]
"""Settings of an embedding; or a flax module that maps observations (B, *event) to (B, F); or a
function `rngs -> module`."""


def summary_count(embedding: Embedding | None, like: Obs) -> int:
    """Return the number K of fixed summaries of an embedding, given one observation's shapes."""
    if not isinstance(embedding, EmbeddingSettings):
        return 0
    return len(embedding.summary_labels(like))


def has_summaries_only(embedding: Embedding | None) -> bool:
    """Return whether an embedding has fixed summaries only, and no network."""
    return isinstance(embedding, EmbeddingSettings) and embedding.summaries_only


def check_embedding(embedding: Any) -> None:
    """Raise ValueError if a value cannot be an embedding.

    The shape of its output is checked later, by `Blueprint.build`.

    Raises:
        ValueError: The value is a module with state other than parameters, or is neither a module
            nor a function of one `nnx.Rngs`.
    """
    if isinstance(embedding, EmbeddingSettings):
        return
    if isinstance(embedding, nnx.Module):
        as_trainable(embedding)
        return
    try:  # the metaclass of flax modules hides the signature of the class
        if isinstance(embedding, type):
            inspect.signature(embedding.__init__).bind(None, None)
        else:
            inspect.signature(embedding).bind(None)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"embedding: expected a module or a function of one nnx.Rngs, got {embedding!r}: "
            f"{error}; other arguments can be set by functools.partial"
        ) from None


def as_trainable(module: Any) -> nnx.Module:
    """Return the module if all of its state is trainable parameters; otherwise raise ValueError.

    State such as running statistics or random streams is rejected: it changes with every call, and
    a fitted posterior must not change.
    """
    if not isinstance(module, nnx.Module):
        raise ValueError(f"embedding: expected a flax nnx.Module, got {type(module).__name__}")
    other = nnx.state(module, nnx.Not(nnx.Param))
    kinds = {type(v).__name__ for v in jax.tree.leaves(other, is_leaf=_is_variable)}
    if kinds:
        raise ValueError(
            f"embedding: expected a module whose state is parameters (nnx.Param) only, got "
            f"{', '.join(sorted(kinds))}. Use LayerNorm in place of BatchNorm; for dropout, accept "
            "an argument `key` in __call__, as sf.ResidualMLP does; it is None outside training"
        )
    return module


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def embed(embedding: nnx.Module, x: Obs, mask: Obs | None, key: Key | None) -> Array:
    """Call the embedding, with a mask and a dropout key if it accepts them.

    Raises:
        ValueError: Entries can be missing, but the embedding does not accept a mask.
    """
    parameters = inspect.signature(type(embedding).__call__).parameters
    if mask is not None and "mask" not in parameters:
        raise ValueError(
            "embedding: expected a module that accepts an argument `mask` in __call__, True where "
            f"an entry is present, because entries can be missing, got {type(embedding).__name__}"
        )
    call: Any = embedding  # nnx.Module does not declare __call__
    given = {"mask": mask, "key": key}
    return call(x, **{name: value for name, value in given.items() if name in parameters})
