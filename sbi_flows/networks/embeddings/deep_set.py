"""Embedding of sets by a sum over elements.

Public names: `DeepSet`.

Source: Zaheer et al. 2017, "Deep Sets" (arXiv:1703.06114).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sbi_flows.core.checks import require_count, require_fraction, require_heads
from sbi_flows.core.typing import Key
from sbi_flows.networks.embeddings.base import EmbeddingSettings, fill, log_count, masked_mean
from sbi_flows.networks.embeddings.elements import Elements, SetSettings, require_each
from sbi_flows.networks.embeddings.layers import AttentionPool
from sbi_flows.networks.mlp import ResidualBlock, ResidualMLP, split_key


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSet(SetSettings):
    """Embedding of a set; it does not depend on the order of the elements.

    Axis 0 of an observation is the set: (n,), (n, C), or (n, *element) with `each`. A network maps
    each element to a vector. The mean, the maximum and a learned weighted mean of these vectors,
    together with the number of elements, enter a second network. Elements whose entries are all
    missing are left out, so the number of elements may differ between observations.

    Attributes:
        each: Embedding of one element, for example `SeriesNet()`; None if an element is a number
            or a vector.
        width: Width of the network that maps each element. The second network has four times this
            width; it is evaluated once for each set.
        layers: Number of residual blocks of the network that maps each element.
        heads: Number of learned weighted means, a divisor of `width`.
        features: Length of the embedding.
        dropout: Fraction of hidden units that dropout sets to zero in training.

    References:
        Deep Sets, arXiv:1703.06114.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> like = jax.ShapeDtypeStruct((10, 2), jnp.float32)
        >>> network = DeepSet(width=8, features=4).build(nnx.Rngs(0), like)
        >>> network(jnp.ones((5, 10, 2)), None).shape
        (5, 4)
    """

    each: EmbeddingSettings | None = None
    width: int = 32
    layers: int = 1
    heads: int = 4
    features: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is invalid."""
        require_each(self.each)
        require_heads(self.width, self.heads)
        require_count(1, features=self.features)
        require_count(0, layers=self.layers)
        require_fraction(dropout=self.dropout)

    def build(self, rngs: nnx.Rngs, like: Any) -> nnx.Module:
        """Create the network."""
        self.check(like)
        return _DeepSet(self, rngs, like)


class _DeepSet(nnx.Module):
    def __init__(self, settings: DeepSet, rngs: nnx.Rngs, like: Any) -> None:
        width, rate = settings.width, settings.dropout
        self.elements = Elements(settings.each, width, rngs=rngs, like=like)
        self.blocks = nnx.List(
            [ResidualBlock(width, rate, rngs=rngs) for _ in range(settings.layers)]
        )
        self.pool = AttentionPool(width, settings.heads, rngs=rngs)
        self.leave = ResidualMLP(
            3 * width + 1, settings.features, width=4 * width, blocks=2, dropout=rate, rngs=rngs
        )

    def __call__(self, x: Array, mask: Array | None, *, key: Key | None = None) -> Array:
        """Map sets (B, n, *element) to embeddings (B, features)."""
        keys = split_key(key, len(self.blocks) + 2)
        h, present = self.elements(x, mask, key=keys[0])
        for block, k in zip(self.blocks, keys[2:], strict=True):
            h = block(h, key=k)
        h = nnx.silu(h)
        listed = None if present is None else present[..., None]
        pooled = [
            masked_mean(h, listed, 1),
            _masked_max(h, listed),
            self.pool(h, present),
            log_count(h, present),
        ]
        return self.leave(jnp.concatenate(pooled, axis=-1), key=keys[1])


def _masked_max(h: Array, present: Array | None) -> Array:
    """Compute the maximum over axis 1 of the present elements; zeros if there are none."""
    if present is None:
        return jnp.max(h, axis=1)
    lowest = jnp.full_like(h, jnp.finfo(h.dtype).min)
    return fill(jnp.max(jnp.where(present, h, lowest), axis=1), jnp.any(present, axis=1))
