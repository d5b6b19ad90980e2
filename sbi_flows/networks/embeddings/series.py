"""Embedding of time series.

Public names: `SeriesNet`.

Sources: Nie et al. 2023, "A Time Series is Worth 64 Words: Long-term Forecasting with Transformers"
(arXiv:2211.14730), for patches of a series as tokens; Vaswani et al. 2017, "Attention Is All You
Need" (arXiv:1706.03762).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.core.checks import require_count, require_fraction, require_heads
from sbi_flows.core.typing import Key
from sbi_flows.networks.embeddings.base import (
    any_present,
    as_channels,
    leaf_shape,
    log_count,
    masked_mean,
    own_scale,
)
from sbi_flows.networks.embeddings.grids import GridSettings
from sbi_flows.networks.embeddings.layers import (
    AttentionBlock,
    AttentionPool,
    ConvBlock,
    Downsample,
    Entry,
    keep,
    space_to_depth,
)
from sbi_flows.networks.embeddings.summaries import Statistic, series_statistics
from sbi_flows.networks.mlp import ResidualMLP, split_key
from sbi_flows.observations.shared import SharedAxes

MAX_TOKENS = 128
"""Maximum number of tokens in the attention layers, if the stride is chosen automatically."""

_MAX_FIRST_FACTOR = 32
_FACTOR = 4
_OCTAVES = 8
"""Number of frequencies of the features of position; the longest period is 512 tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeriesNet(GridSettings):
    """Embedding of a regularly sampled time series, for up to 100,000 points.

    An observation has shape (T,) or (T, C). Strided convolutions reduce the series to tokens of
    `stride` points. Each token contains its position, counted from the start of the series.
    Attention layers combine the tokens. A learned weighted mean and a plain mean of the tokens
    enter the output network, with the number of points. Missing points are allowed anywhere.
    Additional missing points at the end do not change the output of the network, so series of
    different lengths can be padded to one length. Coarse means and the spectrum, two kinds of fixed
    summaries, depend on the padded length.

    Attributes:
        width: Width of the first convolutions. If `stride` exceeds 32, all layers after them have
            the width 2 * `width`.
        stride: Number of points in one token, a power of two. None chooses the smallest stride that
            gives at most 128 tokens.
        blocks: Number of attention layers.
        heads: Number of attention heads, a divisor of `width`.
        features: Length of the embedding.
        dropout: Fraction of hidden units that dropout sets to zero in training.

    References:
        A Time Series is Worth 64 Words, arXiv:2211.14730.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> like = jax.ShapeDtypeStruct((50, 2), jnp.float32)
        >>> network = SeriesNet(width=8, stride=4, features=4).build(nnx.Rngs(0), like)
        >>> network(jnp.ones((5, 50, 2)), None).shape
        (5, 4)
    """

    width: int = 32
    stride: int | None = None
    blocks: int = 1
    heads: int = 4
    features: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is invalid."""
        require_heads(self.width, self.heads)
        require_count(1, features=self.features)
        require_count(0, blocks=self.blocks)
        require_fraction(dropout=self.dropout)
        if self.stride is not None:
            require_count(1, stride=self.stride)
            if self.stride & (self.stride - 1):
                raise ValueError(f"stride: expected a power of two, got {self.stride}")

    def growing(self, like: Any) -> SharedAxes:
        """Return the time axis: a series may end early."""
        return ((0,),)

    def build(self, rngs: nnx.Rngs, like: Any) -> nnx.Module:
        """Create the network; it can also be applied to series of another length."""
        length, channels = self._shape(like)
        stride = self.stride or _automatic_stride(length)
        return _SeriesNet(self, rngs, channels, _factors(stride))

    def _statistics(self, shape: tuple[int, ...]) -> list[Statistic]:
        return series_statistics(shape)

    def _shape(self, like: Any) -> tuple[int, int]:
        """Return the length and the number of channels."""
        shape = leaf_shape("SeriesNet", "a series (T,) or (T, C)", like, (1, 2))
        return shape[0], shape[1] if len(shape) == 2 else 1


def _automatic_stride(length: int) -> int:
    """Return the smallest power of two that leaves at most `MAX_TOKENS` tokens."""
    return 2 ** max(0, math.ceil(math.log2(length / MAX_TOKENS)))


def _factors(stride: int) -> tuple[int, ...]:
    """Split a stride into the factors of the stages; the first one may be larger."""
    factors = [min(stride, _MAX_FIRST_FACTOR)]
    stride //= factors[0]
    while stride > 1:
        factors.append(min(stride, _FACTOR))
        stride //= factors[-1]
    return tuple(factors)


class _SeriesNet(nnx.Module):
    def __init__(
        self, settings: SeriesNet, rngs: nnx.Rngs, channels: int, factors: tuple[int, ...]
    ) -> None:
        rate, heads = settings.dropout, settings.heads
        widths = [settings.width * min(2, stage + 1) for stage in range(len(factors))]
        width = widths[-1]
        self.factors = factors
        self.enter = Entry(channels * factors[0], widths[0], has_own=True, rngs=rngs)
        self.blocks = nnx.List([ConvBlock(w, 1, rate, rngs=rngs) for w in widths])
        self.down = nnx.List(
            [
                Downsample(w, out, (factor,), rngs=rngs)
                for w, out, factor in zip(widths[:-1], widths[1:], factors[1:], strict=True)
            ]
        )
        self.position = nnx.Linear(2 * _OCTAVES + 1, width, rngs=rngs)
        self.attention = nnx.List(
            [AttentionBlock(width, heads, rate, rngs=rngs) for _ in range(settings.blocks)]
        )
        self.pool = AttentionPool(width, heads, rngs=rngs)
        self.leave = ResidualMLP(
            2 * width + 1, settings.features, width=2 * width, blocks=1, dropout=rate, rngs=rngs
        )

    def __call__(self, x: Array, mask: Array | None, *, key: Key | None = None) -> Array:
        """Map series (B, T) or (B, T, C) to embeddings (B, features)."""
        x, mask = as_channels(x, mask, 1)
        count = log_count(x, any_present(mask, 2))
        keys = iter(split_key(key, len(self.blocks) + len(self.attention) + 1))
        patches, marks = space_to_depth(x, mask, self.factors[:1], mark_padding=True)
        own, _ = space_to_depth(own_scale(x, mask, (1,)), None, self.factors[:1])
        # padding is shorter than a patch, so without a mask no token is missing
        present = None if mask is None else any_present(marks, 2)
        h = keep(self.enter(patches, marks, own), present)
        h = self.blocks[0](h, present, key=next(keys))
        for down, block in zip(self.down, list(self.blocks)[1:], strict=True):
            h, present = down(h, present)
            h = block(h, present, key=next(keys))
        h = h + self.position(_position_features(h))
        for attention in self.attention:
            h = attention(h, h, present, key=next(keys))
        listed = None if present is None else present[..., None]
        pooled = [self.pool(h, present), masked_mean(h, listed, 1), count]
        return self.leave(jnp.concatenate(pooled, axis=-1), key=next(keys))


def _position_features(h: Array) -> Array:
    """Return features (1, T, 17) of the position of tokens (B, T, width), from the start."""
    index = np.arange(h.shape[1], dtype=np.float64)[:, None]
    phases = index * np.pi / 2.0 ** np.arange(1, _OCTAVES + 1)[None, :]
    features = [index / MAX_TOKENS, np.sin(phases), np.cos(phases)]
    return jnp.asarray(np.concatenate(features, axis=-1)[None], h.dtype)
