"""Codec of embeddings.

For an embedding of this library, the file contains its settings, or its class and arguments. For an
embedding of the user's own class, the file contains its outputs for two fixed observations. The
user must then supply the embedding again when the file is loaded, and its outputs are compared with
the saved outputs.

Public names: `encode`, `decode`, `is_users`, `LibraryEmbedding`, `probe_outputs`,
`require_same_outputs`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sbi_flows.artefact import settings
from sbi_flows.artefact.strict import expect_fields, expect_integer, expect_type
from sbi_flows.core.errors import ArtefactError
from sbi_flows.core.precision import full_precision
from sbi_flows.densities.conditional import Blueprint, Weights, graph_of
from sbi_flows.densities.embedding import Embedding
from sbi_flows.networks.embeddings import EmbeddingSettings
from sbi_flows.networks.graph import PointCloud
from sbi_flows.networks.mlp import ResidualMLP

_CLASSES = {kind.__name__: kind for kind in (ResidualMLP, PointCloud)}

_ARGUMENTS = {
    "ResidualMLP": ("in_features", "out_features", "width", "blocks", "dropout"),
    "PointCloud": ("space", "marks", "features", "vectors", "width", "rounds"),
}

TOLERANCE = 1e-3
"""Maximum difference between outputs, relative to the largest output. It allows for rounding errors
on other devices and in other precisions."""


@dataclasses.dataclass(frozen=True)
class LibraryEmbedding:
    """Callable that takes `nnx.Rngs` and creates an embedding of this library.

    Attributes:
        kind: Name of the class of the embedding.
        arguments: Names and values of the constructor's arguments.
    """

    kind: str
    arguments: tuple[tuple[str, Any], ...]

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        """Create the embedding."""
        return _CLASSES[self.kind](**dict(self.arguments), rngs=rngs)


def encode(embedding: Embedding | None) -> Any:
    """Convert an embedding to JSON data.

    The data contain the class and arguments of an embedding of this library, or only the name of
    the class of a user's embedding.
    """
    if embedding is None:
        return None
    if isinstance(embedding, EmbeddingSettings):
        return settings.encode("embedding", embedding)
    module: Any = embedding
    if not isinstance(module, nnx.Module):
        module = nnx.eval_shape(lambda: embedding(nnx.Rngs(0)))  # type: ignore[operator]
    kind = type(module).__name__
    if type(module) is _CLASSES.get(kind):
        return {"type": kind, "arguments": _arguments(module)}
    return {"type": None, "arguments": {"name": type(module).__qualname__}}


def is_users(value: Any) -> bool:
    """Return whether the JSON data describe an embedding that the user must supply again."""
    return isinstance(value, dict) and value.get("type", "") is None


def decode(value: Any, user_embedding: Embedding | None) -> Embedding | None:
    """Convert JSON data to an embedding.

    Args:
        value: The data.
        user_embedding: Embedding that the user supplied, or None. It is returned if the data
            describe an embedding of the user's own class.

    Raises:
        ArtefactError: The data are malformed, or the user did not supply a needed embedding.
    """
    if value is None:
        return None
    if isinstance(value, dict) and "fields" in value:
        return settings.decode("embedding", value, *settings.EMBEDDINGS)
    kind, arguments = expect_fields("embedding", value, "type", "arguments")
    if kind is None:
        (name,) = expect_fields("embedding.arguments", arguments, "name")
        if user_embedding is None:
            raise ArtefactError(
                f"its embedding is not one of this library: load(path, embedding=...) takes it, "
                f"expected {expect_type('embedding', name, str, 'a name'):.80}"
            )
        return user_embedding
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise ArtefactError(f"embedding: expected one of {list(_CLASSES)}, got {kind!r:.80}")
    arguments = expect_type("embedding.arguments", arguments, dict, "an object")
    if not arguments.keys() <= set(_ARGUMENTS[kind]):
        raise ArtefactError(f"embedding: expected {_ARGUMENTS[kind]}, got {sorted(arguments)[:10]}")
    for name, argument in arguments.items():
        if name == "dropout" and isinstance(argument, float | int) and 0.0 <= argument < 1.0:
            continue
        layers = name in ("blocks", "rounds")
        expect_integer(
            f"embedding.{name}",
            argument,
            0,
            settings.MAX_LAYERS if layers else settings.MAX_INTEGER,
        )
    return LibraryEmbedding(kind, tuple(sorted(arguments.items())))


def _arguments(module: Any) -> dict[str, Any]:
    """Return the constructor's arguments of an embedding of this library."""
    if isinstance(module, ResidualMLP):
        blocks = list(module.blocks)
        values = (
            module.enter.in_features,
            module.leave.out_features,
            module.enter.out_features,
            len(blocks),
            blocks[0].dropout if blocks else 0.0,
        )
    else:
        values = (
            module.space,
            module.marks,
            module.leave.leave.out_features,
            module.vectors,
            module.enter.out_features,
            len(module.messages),
        )
    return dict(zip(_ARGUMENTS[type(module).__name__], values, strict=True))


@functools.partial(jax.jit, static_argnums=0)
@full_precision
def probe_outputs(blueprint: Blueprint, weights: Weights) -> jax.Array:
    """Compute the outputs of the embeddings of all members for two fixed observations.

    Returns:
        Outputs, shape (M, 2, F), for M members and F outputs of an embedding.
    """
    sizes = blueprint.sizes
    features = jnp.cos(jnp.arange(1.0, 2 * sizes.entry_count + 1.0)).reshape(2, -1)
    if sizes.has_mask:
        features = jnp.concatenate([features, jnp.ones_like(features)], axis=1)

    def embed(member: Weights) -> jax.Array:
        return nnx.merge(graph_of(blueprint), *member).context(blueprint.inputs(features))

    return jax.lax.map(embed, weights)


def require_same_outputs(blueprint: Blueprint, weights: Weights, saved: np.ndarray) -> None:
    """Raise ArtefactError if the user's embedding and the saved embedding have different outputs.

    Args:
        blueprint: Blueprint of the ensemble, with the user's embedding.
        weights: Weights of the members, from the file.
        saved: Outputs of the saved embedding, shape (M, 2, F).
    """
    outputs = np.asarray(probe_outputs(blueprint, weights), np.float64)
    differences = np.abs(outputs - saved)
    if not np.all(differences <= TOLERANCE * np.max(np.abs(saved), initial=1e-30)):
        raise ArtefactError(
            f"embedding: expected one that computes as the one that was saved, got "
            f"one that differs by up to {np.max(differences):.2g}"
        )
