"""Embedding of sets by attention between elements.

Public names: `SetTransformer`.

Source: Lee et al. 2019, "Set Transformer: A Framework for Attention-based Permutation-Invariant
Neural Networks" (arXiv:1810.00825).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sbi_flows.core.checks import require_count, require_fraction, require_heads
from sbi_flows.core.typing import Key
from sbi_flows.networks.embeddings.base import EmbeddingSettings, log_count
from sbi_flows.networks.embeddings.elements import Elements, SetSettings, require_each
from sbi_flows.networks.embeddings.layers import AttentionBlock
from sbi_flows.networks.mlp import ResidualMLP, split_key


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetTransformer(SetSettings):
    """Embedding of a set in which elements interact; it does not depend on their order.

    Axis 0 of an observation is the set: (n,), (n, C), or (n, *element) with `each`. In each block,
    a few learned inducing points attend to the elements, and the elements attend to the inducing
    points, so that the cost is proportional to the number of elements. Learned seeds attend to the
    result. Elements whose entries are all missing are left out.

    Attributes:
        each: Embedding of one element, for example `SeriesNet()`; None if an element is a number
            or a vector.
        width: Length of the vector of each element.
        blocks: Number of induced set attention blocks.
        heads: Number of attention heads, a divisor of `width`.
        inducing: Number of inducing points of a block.
        seeds: Number of learned seeds, whose outputs are concatenated.
        features: Length of the embedding.
        dropout: Fraction of hidden units that dropout sets to zero in training.

    References:
        Set Transformer, arXiv:1810.00825, equations 6-12.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> like = jax.ShapeDtypeStruct((10, 2), jnp.float32)
        >>> settings = SetTransformer(width=8, heads=2, inducing=4, features=4)
        >>> settings.build(nnx.Rngs(0), like)(jnp.ones((5, 10, 2)), None).shape
        (5, 4)
    """

    each: EmbeddingSettings | None = None
    width: int = 64
    blocks: int = 2
    heads: int = 4
    inducing: int = 16
    seeds: int = 2
    features: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is invalid."""
        require_each(self.each)
        require_heads(self.width, self.heads)
        require_count(1, features=self.features)
        require_count(1, inducing=self.inducing, seeds=self.seeds)
        require_count(0, blocks=self.blocks)
        require_fraction(dropout=self.dropout)

    def build(self, rngs: nnx.Rngs, like: Any) -> nnx.Module:
        """Create the network."""
        self.check(like)
        return _SetTransformer(self, rngs, like)


class _SetTransformer(nnx.Module):
    def __init__(self, settings: SetTransformer, rngs: nnx.Rngs, like: Any) -> None:
        width = settings.width
        self.elements = Elements(settings.each, width, rngs=rngs, like=like)
        self.blocks = nnx.List([_InducedBlock(settings, rngs) for _ in range(settings.blocks)])
        self.seeds = _learned_points(settings.seeds, width, rngs)
        self.pool = AttentionBlock(width, settings.heads, settings.dropout, rngs=rngs)
        self.leave = ResidualMLP(
            settings.seeds * width + 1,
            settings.features,
            width=width,
            blocks=1,
            dropout=settings.dropout,
            rngs=rngs,
        )

    def __call__(self, x: Array, mask: Array | None, *, key: Key | None = None) -> Array:
        """Map sets (B, n, *element) to embeddings (B, features)."""
        keys = split_key(key, len(self.blocks) + 3)
        h, present = self.elements(x, mask, key=keys[0])
        for block, k in zip(self.blocks, keys[3:], strict=True):
            h = block(h, present, key=k)
        pooled = self.pool(_repeat(self.seeds, h), h, present, key=keys[1])
        pooled = pooled.reshape(h.shape[0], math.prod(pooled.shape[1:]))
        return self.leave(jnp.concatenate([pooled, log_count(h, present)], axis=-1), key=keys[2])


class _InducedBlock(nnx.Module):
    """Induced set attention block: elements exchange information through inducing points."""

    def __init__(self, settings: SetTransformer, rngs: nnx.Rngs) -> None:
        width, heads, rate = settings.width, settings.heads, settings.dropout
        self.inducing = _learned_points(settings.inducing, width, rngs)
        self.gather = AttentionBlock(width, heads, rate, rngs=rngs)
        self.spread = AttentionBlock(width, heads, rate, rngs=rngs)

    def __call__(self, h: Array, present: Array | None, *, key: Key | None = None) -> Array:
        """Update elements (B, n, width)."""
        keys = split_key(key, 2)
        induced = self.gather(_repeat(self.inducing, h), h, present, key=keys[0])
        return self.spread(h, induced, None, key=keys[1])


def _learned_points(count: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), (count, width), jnp.float32))


def _repeat(points: nnx.Param, h: Array) -> Array:
    """Repeat learned points (K, width) for each set of the batch: (B, K, width)."""
    return jnp.broadcast_to(points[...][None], (h.shape[0], *points.shape))
