"""The embedding in an artefact: one of the library's by its arguments, another by what it does.

Public names: `encode`, `decode`, `is_given`, `Made`, `answers`, `compare`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sbi_flows.artefact.settings import MOST, MOST_LAYERS
from sbi_flows.artefact.strict import checked, counted, fields
from sbi_flows.core.errors import ArtefactError
from sbi_flows.core.precision import full_precision
from sbi_flows.densities.conditional import Blueprint, Embedding, Weights, graph_of
from sbi_flows.networks.graph import PointCloud
from sbi_flows.networks.mlp import ResidualMLP

_CLASSES = {kind.__name__: kind for kind in (ResidualMLP, PointCloud)}

_ARGUMENTS = {
    "ResidualMLP": ("in_features", "out_features", "width", "blocks", "dropout"),
    "PointCloud": ("space", "marks", "features", "vectors", "width", "rounds"),
}

TOLERANCE = 1e-3
"""Of a given embedding's answers, as a share of the largest: devices and precisions differ."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A function of `nnx.Rngs` that makes one of the library's embeddings.

    Attributes:
        kind: Name of its class.
        arguments: Names and values of what it is made with.
    """

    kind: str
    arguments: tuple[tuple[str, Any], ...]

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        """A new one."""
        return _CLASSES[self.kind](**dict(self.arguments), rngs=rngs)


def encode(embedding: Embedding | None) -> Any:
    """The embedding as plain data: with its arguments, or with the name of the user's class."""
    if embedding is None:
        return None
    module: Any = embedding
    if not isinstance(module, nnx.Module):
        module = nnx.eval_shape(lambda: embedding(nnx.Rngs(0)))  # type: ignore[operator]
    kind = type(module).__name__
    if type(module) is _CLASSES.get(kind):
        return {"type": kind, "arguments": _arguments(module)}
    return {"type": None, "arguments": {"name": type(module).__qualname__}}


def is_given(value: Any) -> bool:
    """Whether plain data name an embedding that the user has to give."""
    return isinstance(value, dict) and value.get("type", "") is None


def decode(value: Any, given: Embedding | None) -> Embedding | None:
    """The embedding that the data describe, or the given one where they cannot.

    Raises:
        ArtefactError: The data are malformed, or none is given.
    """
    if value is None:
        return None
    kind, arguments = fields("embedding", value, "type", "arguments")
    if kind is None:
        (name,) = fields("embedding.arguments", arguments, "name")
        if given is None:
            raise ArtefactError(
                f"its embedding is none of this library's: load(path, embedding=...) takes it, "
                f"expected {checked('embedding', name, str, 'a name'):.80}"
            )
        return given
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise ArtefactError(f"embedding: expected one of {list(_CLASSES)}, got {kind!r:.80}")
    arguments = checked("embedding.arguments", arguments, dict, "an object")
    if not arguments.keys() <= set(_ARGUMENTS[kind]):
        raise ArtefactError(f"embedding: expected {_ARGUMENTS[kind]}, got {sorted(arguments)[:10]}")
    for name, argument in arguments.items():
        if name == "dropout" and isinstance(argument, float | int) and 0.0 <= argument < 1.0:
            continue
        layers = name in ("blocks", "rounds")
        counted(f"embedding.{name}", argument, 0, MOST_LAYERS if layers else MOST)
    return Made(kind, tuple(sorted(arguments.items())))


def _arguments(module: Any) -> dict[str, Any]:
    """What one of the library's embeddings was made with."""
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
def answers(blueprint: Blueprint, weights: Weights) -> jax.Array:
    """What the embeddings of all members make of two fixed observations, shape (M, 2, F)."""
    count = 2 * blueprint.sizes.feature_count
    features = jnp.cos(jnp.arange(1.0, count + 1.0)).reshape(2, -1)

    def one(own: Weights) -> jax.Array:
        return nnx.merge(graph_of(blueprint), *own).context(features)

    return jax.lax.map(one, weights)


def compare(blueprint: Blueprint, weights: Weights, there: np.ndarray) -> None:
    """Refuse an embedding that makes something else of an observation than the one that was saved.

    Raises:
        ArtefactError: It does.
    """
    found = np.asarray(answers(blueprint, weights), np.float64)
    apart = np.abs(found - there)
    if not np.all(apart <= TOLERANCE * np.max(np.abs(there), initial=1e-30)):
        raise ArtefactError(
            f"embedding: expected one that computes as the one that was saved, got "
            f"one that differs by up to {np.max(apart):.2g}"
        )
