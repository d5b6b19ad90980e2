"""Embedding of observations that consist of several arrays.

Public names: `Fusion`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sbi_flows.core.checks import require_count, require_fraction, require_object
from sbi_flows.core.typing import Key
from sbi_flows.networks.embeddings.base import (
    MAX_SUMMARIES,
    EmbeddingSettings,
    fill,
    leaf_shape,
    project,
    require_network,
    soft_clip,
)
from sbi_flows.networks.embeddings.layers import Entry
from sbi_flows.networks.embeddings.summaries import LINEAR
from sbi_flows.networks.mlp import ResidualMLP, split_key
from sbi_flows.observations.shared import SharedAxes

MAX_FLAT = 512
"""Number of entries of a part None up to which they are summaries as they are."""


@dataclasses.dataclass(frozen=True, init=False)
class Fusion(EmbeddingSettings):
    """Embedding of a dict of arrays, each of which has its own embedding.

    A part is one array with its embedding. If all entries of a part are missing, a learned vector
    replaces its embedding. A network combines the embeddings of all parts.

    Args:
        parts: Dict from the names of the arrays to their embeddings, or pairs (name, embedding).
            None suits an array of a few numbers: a residual network reads its entries. Its fixed
            summaries are its entries, or 64 fixed random projections of more than 512 entries, and
            the fraction of entries that are present.
        width: Width of the hidden layers.
        blocks: Number of residual blocks of the network that combines the parts.
        features: Length of the embedding.
        dropout: Fraction of hidden units that dropout sets to zero in training.

    Attributes:
        parts: Pairs (name, embedding), sorted by name.

    References:
        Radev et al. 2023, "BayesFlow: Amortized Bayesian Workflows With Neural Networks",
        arXiv:2306.16015, for networks that combine several sources of data.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from sbi_flows.networks.embeddings import SeriesNet
        >>> settings = Fusion({"spectrum": SeriesNet(width=8), "redshift": None}, features=4)
        >>> x = {"spectrum": jnp.ones((5, 20)), "redshift": jnp.ones((5,))}
        >>> like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), x)
        >>> settings.build(nnx.Rngs(0), like)(x, None).shape
        (5, 4)
    """

    parts: tuple[tuple[str, EmbeddingSettings | None], ...]
    width: int = 64
    blocks: int = 1
    features: int = 32
    dropout: float = 0.0

    def __init__(
        self,
        parts: Mapping[str, EmbeddingSettings | None]
        | tuple[tuple[str, EmbeddingSettings | None], ...],
        *,
        width: int = 64,
        blocks: int = 1,
        features: int = 32,
        dropout: float = 0.0,
    ) -> None:
        """Store the parts in the order of their names."""
        require_count(1, width=width, features=features)
        require_count(0, blocks=blocks)
        require_fraction(dropout=dropout)
        values = {"width": width, "blocks": blocks, "features": features, "dropout": dropout}
        for name, value in {"parts": _sorted_parts(parts), **values}.items():
            object.__setattr__(self, name, value)

    def check(self, like: Any) -> None:
        """Raise ValueError unless the observation is a dict with the names of the parts."""
        names = [name for name, _ in self.parts]
        if not isinstance(like, Mapping):
            got = f"shape {tuple(like.shape)}" if hasattr(like, "shape") else type(like).__name__
            raise ValueError(f"embedding: Fusion expects a dict of arrays {names}, got {got}")
        if sorted(like, key=str) != names:
            raise ValueError(
                f"embedding: Fusion expects a dict of arrays {names}, got {sorted(like, key=str)}"
            )
        for name, part in self.parts:
            try:
                _flat_size(like[name]) if part is None else part.check(like[name])
            except ValueError as error:
                raise ValueError(f"{error} (part {name!r})") from None

    def shared(self, like: Any) -> SharedAxes:
        """Return the axes of each array along which all entries share one standardisation."""
        axes = [((),) if part is None else part.shared(like[name]) for name, part in self.parts]
        return tuple(leaf for part in axes for leaf in part)

    def growing(self, like: Any) -> SharedAxes:
        """Return the axes of each array along which an observation may be shorter."""
        axes = [((),) if part is None else part.growing(like[name]) for name, part in self.parts]
        return tuple(leaf for part in axes for leaf in part)

    def summary_labels(self, like: Any) -> tuple[str, ...]:
        """Return the names of the fixed summaries of all parts."""
        labels: list[str] = []
        for name, part in self.parts:
            if part is None:
                labels += [
                    *_flat_labels(name, _flat_size(like[name])),
                    f"fraction of {name} present",
                ]
            else:
                labels += [f"{name}: {label}" for label in part.summary_labels(like[name])]
        return tuple(labels)

    def summarise(self, x: Any, mask: Any) -> Array:
        """Compute the fixed summaries (B, K) of all parts.

        For a part None, see the class.
        """
        values = []
        for name, part in self.parts:
            present = None if mask is None else mask[name]
            if part is not None:
                values.append(part.summarise(x[name], present))
            else:
                rows = _flatten(fill(x[name], present))
                values += [_flat_summaries(rows), _present_fraction(rows, present)]
        batch = jax.tree.leaves(x)[0]
        return jnp.concatenate([jnp.zeros((batch.shape[0], 0), batch.dtype), *values], axis=1)

    def build(self, rngs: nnx.Rngs, like: Any) -> nnx.Module:
        """Create the network."""
        self.check(like)
        return _Fusion(self, rngs, like)


def _sorted_parts(parts: Any) -> tuple[tuple[str, EmbeddingSettings | None], ...]:
    """Check the parts, and return them as pairs in the order of the names."""
    require_object("parts", parts, (Mapping, tuple, list), "a dict from names to embeddings")
    pairs = dict(parts)
    if not pairs or len(pairs) != len(parts):
        raise ValueError(f"parts: expected one or more different names, got {len(pairs)}")
    for name, part in pairs.items():
        if not isinstance(name, str):
            raise ValueError(f"parts: expected names as keys, got {name!r}")
        if part is not None:
            require_network(f"parts[{name!r}]", part, "an embedding or None")
    return tuple((name, pairs[name]) for name in sorted(pairs))


def _flat_size(like: Any) -> int:
    """Return the number of entries of a part whose embedding is None."""
    ranks = tuple(range(100))
    return math.prod(leaf_shape("a part None", "one array", like, ranks))


def _flat_labels(name: str, size: int) -> list[str]:
    if size > MAX_FLAT:
        return [f"{name}, projection {i}" for i in range(MAX_SUMMARIES)]
    return [name] if size == 1 else [f"{name}[{i}]" for i in range(size)]


def _flat_summaries(rows: Array) -> Array:
    """Return the entries of rows (B, C), or fixed random projections of many entries."""
    if rows.shape[1] > MAX_FLAT:
        rows = project(rows, MAX_SUMMARIES)
    return soft_clip(rows, LINEAR)


def _present_fraction(rows: Array, mask: Array | None) -> Array:
    """Return the fraction of entries that are present, shape (B, 1)."""
    if mask is None:
        return jnp.ones((rows.shape[0], 1), rows.dtype)
    return jnp.mean(_flatten(mask), axis=1, keepdims=True, dtype=rows.dtype)


class _Fusion(nnx.Module):
    def __init__(self, settings: Fusion, rngs: nnx.Rngs, like: Any) -> None:
        width, rate = settings.width, settings.dropout
        self.names = tuple(name for name, _ in settings.parts)
        self.parts = nnx.List(
            [
                _Flat(_flat_size(like[name]), settings, rngs)
                if part is None
                else part.build(rngs, like[name])
                for name, part in settings.parts
            ]
        )
        sizes = [width if part is None else part.features for _, part in settings.parts]
        self.tokens = nnx.List([_zeros(size) for size in sizes])
        self.absent = nnx.Linear(len(sizes), width, use_bias=False, rngs=rngs)
        self.enter = nnx.Linear(sum(sizes), width, rngs=rngs)
        self.leave = ResidualMLP(
            width, settings.features, width=width, blocks=settings.blocks, dropout=rate, rngs=rngs
        )

    def __call__(self, x: Any, mask: Any, *, key: Key | None = None) -> Array:
        """Map dicts of arrays (B, *event) to embeddings (B, features)."""
        keys = split_key(key, len(self.names) + 1)
        embedded, flags = [], []
        for name, part, token, k in zip(self.names, self.parts, self.tokens, keys[1:], strict=True):
            h = part(x[name], None if mask is None else mask[name], key=k)
            if mask is not None:
                is_present = _any_leaf(mask[name])
                h = jnp.where(is_present, h, token[...][None])
                flags.append(~is_present)
            embedded.append(h)
        h = self.enter(jnp.concatenate(embedded, axis=-1))
        if flags:
            h = h + self.absent(jnp.concatenate(flags, axis=-1).astype(h.dtype))
        return self.leave(h, key=keys[0])


class _Flat(nnx.Module):
    """Network of the entries of an array."""

    def __init__(self, size: int, settings: Fusion, rngs: nnx.Rngs) -> None:
        width, rate = settings.width, settings.dropout
        self.enter = Entry(size, width, rngs=rngs)
        self.leave = ResidualMLP(width, width, width=width, blocks=1, dropout=rate, rngs=rngs)

    def __call__(self, x: Array, mask: Array | None, *, key: Key | None = None) -> Array:
        """Map arrays (B, *event) to (B, width)."""
        h = self.enter(_flatten(x), None if mask is None else _flatten(mask))
        return self.leave(h, key=key)


def _flatten(x: Array) -> Array:
    """Flatten arrays (B, *event) to (B, N)."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _zeros(size: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(size, jnp.float32))


def _any_leaf(mask: Any) -> Array:
    """Return whether any entry is present in each row, shape (B, 1)."""
    flags = [jnp.any(_flatten(leaf), axis=1) for leaf in jax.tree.leaves(mask)]
    return jnp.any(jnp.stack(flags, axis=-1), axis=-1, keepdims=True)
