"""Embedding of images, spectra and cubes on a regular grid.

Public names: `ConvNet`.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385).
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
    masked_mean,
    own_scale,
)
from sbi_flows.networks.embeddings.grids import GridSettings
from sbi_flows.networks.embeddings.layers import (
    AttentionPool,
    ConvBlock,
    Downsample,
    Entry,
    keep,
    space_to_depth,
)
from sbi_flows.networks.embeddings.summaries import Statistic, grid_statistics
from sbi_flows.networks.mlp import ResidualMLP, split_key
from sbi_flows.observations.shared import SharedAxes

FINAL_SIZE = 8
"""Number of grid points along each axis after the last stage, at most."""

_EXPECTED = {
    1: "an array (L,) or (L, C)",
    2: "an image (H, W) or (H, W, C)",
    3: "a cube (D, H, W) or (D, H, W, C)",
}
_MAX_HALVINGS = {1: 5, 2: 3, 3: 1}
"""Maximum number of stages after the stem, by the number of axes; it limits the cost."""

_GROWTH = {1: 4, 2: 4, 3: 2}
"""Ratio of the width of the last stage to `width`, by the number of axes."""

_COSINES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNet(GridSettings):
    """Embedding of an array on a grid by residual convolutions; any size of the grid is allowed.

    An observation has the shape of the grid, or of the grid and a last axis of channels. The first
    stage joins neighbouring pixels. Each following stage halves the long axes, until the grid has
    at most 8 points along each axis. The last stage has the width 4 * `width` (2 * `width` on three
    axes). Each earlier stage has half the width of the next one, but at least `width`. A plain mean
    and learned weighted means over the last grid enter the output network. An image of 64 x 64
    pixels costs about 10 million multiplications.

    Attributes:
        axes: Number of axes of the grid: 1, 2 or 3.
        width: Width of the first stage on large grids. Small grids have fewer stages, of which the
            first is wider.
        blocks: Number of residual blocks of each stage.
        heads: Number of learned weighted means, a divisor of `width`.
        is_located: Whether the network reads the coordinates of the last grid. Without them, the
            embedding changes little if the content of an image is shifted.
        features: Length of the embedding.
        dropout: Fraction of hidden units that dropout sets to zero in training.

    References:
        Deep Residual Learning for Image Recognition, arXiv:1512.03385.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> like = jax.ShapeDtypeStruct((17, 20), jnp.float32)
        >>> network = ConvNet(width=4, features=8).build(nnx.Rngs(0), like)
        >>> network(jnp.ones((5, 17, 20)), None).shape
        (5, 8)
    """

    axes: int = 2
    width: int = 16
    blocks: int = 1
    heads: int = 4
    is_located: bool = True
    features: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is invalid."""
        require_heads(self.width, self.heads)
        require_count(1, axes=self.axes, blocks=self.blocks, features=self.features)
        require_fraction(dropout=self.dropout)
        if self.axes > 3:
            raise ValueError(f"axes: expected 1, 2 or 3, got {self.axes}")

    def growing(self, like: Any) -> SharedAxes:
        """Return no axes: an image must have the size of the simulated images."""
        return ((),)

    def build(self, rngs: nnx.Rngs, like: Any) -> nnx.Module:
        """Create the network."""
        *grid, channels = self._shape(like)
        return _ConvNet(self, rngs, channels, _stages(tuple(grid), _MAX_HALVINGS[self.axes]))

    def _statistics(self, shape: tuple[int, ...]) -> list[Statistic]:
        return grid_statistics(shape)

    def _shape(self, like: Any) -> tuple[int, ...]:
        """Return the shape with a channel axis."""
        ranks = (self.axes, self.axes + 1)
        shape = leaf_shape("ConvNet", _EXPECTED[self.axes], like, ranks)
        return shape if len(shape) == self.axes + 1 else (*shape, 1)


def _stages(grid: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    """Return the downsampling factors of the stem and of each stage after it.

    Args:
        grid: Shape of the grid.
        most: Maximum number of stages after the stem.
    """
    halvings = [max(0, math.ceil(math.log2(n / FINAL_SIZE))) for n in grid]
    stem = [max(h - most, min(h, 1)) for h in halvings]
    rest = [h - s for h, s in zip(halvings, stem, strict=True)]
    # long axes are halved first
    later = [tuple(2 if r > i else 1 for r in rest) for i in reversed(range(max(rest)))]
    return [tuple(2**s for s in stem), *later]


class _ConvNet(nnx.Module):
    def __init__(
        self, settings: ConvNet, rngs: nnx.Rngs, channels: int, stages: list[tuple[int, ...]]
    ) -> None:
        axes, rate = settings.axes, settings.dropout
        last = settings.width * _GROWTH[axes]
        widths = [max(settings.width, last >> i) for i in reversed(range(len(stages)))]
        self.axes, self.stem = axes, stages[0]
        self.enter = Entry(channels * math.prod(self.stem), widths[0], has_own=True, rngs=rngs)
        self.blocks = nnx.List(
            [
                nnx.List([ConvBlock(w, axes, rate, rngs=rngs) for _ in range(settings.blocks)])
                for w in widths
            ]
        )
        self.down = nnx.List(
            [
                Downsample(w, out, factors, rngs=rngs)
                for w, out, factors in zip(widths[:-1], widths[1:], stages[1:], strict=True)
            ]
        )
        if settings.is_located:
            self.position = nnx.Linear(_COSINES * axes, last, use_bias=False, rngs=rngs)
        else:
            self.position = None
        self.pool = AttentionPool(last, settings.heads, rngs=rngs)
        self.leave = ResidualMLP(
            2 * last, settings.features, width=last, blocks=1, dropout=rate, rngs=rngs
        )

    def __call__(self, x: Array, mask: Array | None, *, key: Key | None = None) -> Array:
        """Map arrays (B, *grid) or (B, *grid, C) to embeddings (B, features)."""
        x, mask = as_channels(x, mask, self.axes)
        keys = iter(split_key(key, sum(map(len, self.blocks)) + 1))
        patches, marks = space_to_depth(x, mask, self.stem, mark_padding=True)
        own = own_scale(x, mask, tuple(range(1, self.axes + 1)))
        own, _ = space_to_depth(own, None, self.stem)
        # padding is thinner than a patch, so without a mask no patch is missing
        present = None if mask is None else any_present(marks, self.axes + 1)
        h = keep(self.enter(patches, marks, own), present)
        for stage, blocks in enumerate(self.blocks):
            if stage > 0:
                h, present = self.down[stage - 1](h, present)
            if stage == len(self.blocks) - 1 and self.position is not None:
                h = keep(h + self.position(_coordinates(h)), present)
            for block in blocks:
                h = block(h, present, key=next(keys))
        points = math.prod(h.shape[1:-1])
        h = h.reshape(h.shape[0], points, h.shape[-1])
        if present is not None:
            present = present.reshape(present.shape[0], points)
        listed = None if present is None else present[..., None]
        pooled = jnp.concatenate([masked_mean(h, listed, 1), self.pool(h, present)], axis=-1)
        return self.leave(pooled, key=next(keys))


def _coordinates(h: Array) -> Array:
    """Return cosines (1, *grid, F) of the coordinates of the grid points of h (B, *grid, C)."""
    grid = h.shape[1:-1]
    features = []
    for axis, n in enumerate(grid):
        angles = np.pi * (np.arange(n) + 0.5)[:, None] / n * np.arange(1, _COSINES + 1)[None, :]
        shape = [1] * len(grid) + [_COSINES]
        shape[axis] = n
        features.append(np.broadcast_to(np.cos(angles).reshape(shape), (*grid, _COSINES)))
    return jnp.asarray(np.concatenate(features, axis=-1)[None], h.dtype)
