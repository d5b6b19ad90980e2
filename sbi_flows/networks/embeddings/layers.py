"""Layers of embeddings: inputs with missing entries, convolutions as matrix products, attention.

Convolutions are shifted copies of the input, concatenated on the channels, and one matrix product.
An ensemble evaluates its members by `vmap`; a `vmap` of XLA's convolution over kernels becomes a
grouped convolution, which is slow on a CPU.

Public names: `Entry`, `ConvBlock`, `Downsample`, `AttentionBlock`, `AttentionPool`,
`space_to_depth`, `attend`.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sbi_flows.core.typing import Key
from sbi_flows.networks.embeddings.base import fill, soft_clip
from sbi_flows.networks.mlp import dropout

_INPUT_SCALE = 5.0
"""Magnitude of standardised inputs beyond which they enter logarithmically."""


class Entry(nnx.Module):
    """Linear layer for inputs with missing entries.

    It adds a learned vector for each missing channel. Without missing entries it is a linear layer.
    With one channel there is no such vector: callers ignore points that are entirely missing.

    Args:
        channels: Number of channels.
        width: Length of the output.
        has_own: Whether there is a second input of the same shape: see `base.own_scale`.
        rngs: Keys for the initial weights.
    """

    def __init__(self, channels: int, width: int, *, has_own: bool = False, rngs: nnx.Rngs) -> None:
        """Create the weights of values, of the second input and of missing entries."""

        def linear() -> nnx.Linear:
            return nnx.Linear(channels, width, use_bias=False, rngs=rngs)

        self.value = nnx.Linear(channels, width, rngs=rngs)
        self.missing = linear() if channels > 1 else None
        self.own = linear() if has_own else None

    def __call__(self, x: Array, mask: Array | None, own: Array | None = None) -> Array:
        """Map (*, channels) to (*, width)."""
        h = self.value(soft_clip(fill(x, mask), _INPUT_SCALE))
        if self.own is not None:
            assert own is not None
            h += self.own(soft_clip(own, _INPUT_SCALE))
        if mask is None or self.missing is None:
            return h
        return h + self.missing((~mask).astype(x.dtype))


def space_to_depth(
    x: Array, mask: Array | None, factors: tuple[int, ...], *, mark_padding: bool = False
) -> tuple[Array, Array | None]:
    """Join neighbouring grid points: (B, *grid, C) becomes (B, *coarse grid, prod(factors) * C).

    Zeros are appended at the end of an axis that is no multiple of its factor.

    Args:
        x: Array (B, *grid, C).
        mask: Mask of the same shape, or None.
        factors: Number of points to join along each axis of the grid.
        mark_padding: Whether to return a mask (1, ...) with False for the padding if `mask` is
            None.
    """
    pads = [-n % factor for n, factor in zip(x.shape[1:-1], factors, strict=True)]
    if mask is None and mark_padding and any(pads):
        mask = jnp.ones((1, *x.shape[1:]), bool)
    arrays = [_join(a, pads, factors) for a in (x, mask) if a is not None]
    return arrays[0], None if mask is None else arrays[1]


def _join(x: Array, pads: list[int], factors: tuple[int, ...]) -> Array:
    x = jnp.pad(x, [(0, 0), *((0, pad) for pad in pads), (0, 0)])
    coarse = [n // factor for n, factor in zip(x.shape[1:-1], factors, strict=True)]
    axes = len(factors)
    split = itertools.chain(*zip(coarse, factors, strict=True))
    x = x.reshape(x.shape[0], *split, x.shape[-1])
    order = (0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return x.transpose(order).reshape(x.shape[0], *coarse, math.prod(factors) * x.shape[-1])


def _neighbours(x: Array) -> Array:
    """Concatenate each grid point of (B, *grid, C) with its neighbours, on the channels.

    There are 3 points on one axis, 3 x 3 on two axes, and 7 on three axes (the point and its
    neighbours along each axis). Points outside the grid are zeros.
    """
    axes = x.ndim - 2
    grid = x.shape[1:-1]
    padded = jnp.pad(x, [(0, 0), *[(1, 1)] * axes, (0, 0)])
    slices = [
        padded[(slice(None), *(slice(s, s + n) for s, n in zip(shift, grid, strict=True)))]
        for shift in _shifts(axes)
    ]
    return jnp.concatenate(slices, axis=-1)


def _shifts(axes: int) -> list[tuple[int, ...]]:
    """Return the offsets of the neighbours of a point; 1 along each axis is the point itself."""
    shifts = itertools.product((0, 1, 2), repeat=axes)
    return [s for s in shifts if axes < 3 or sum(abs(i - 1) for i in s) <= 1]


class ConvBlock(nnx.Module):
    """Residual block h + W dropout(silu(convolution(silu(h)))) on a grid."""

    def __init__(self, width: int, axes: int, dropout: float, *, rngs: nnx.Rngs) -> None:
        """Create the two layers."""
        self.convolution = nnx.Linear(len(_shifts(axes)) * width, width, rngs=rngs)
        self.point = nnx.Linear(width, width, rngs=rngs)
        self.dropout = dropout

    def __call__(self, h: Array, present: Array | None, *, key: Key | None = None) -> Array:
        """Update features (B, *grid, width), which are zero at points that are not present."""
        inner = nnx.silu(self.convolution(_neighbours(nnx.silu(h))))
        return keep(h + self.point(dropout(key, inner, self.dropout)), present)


class Downsample(nnx.Module):
    """Strided convolution whose patches do not overlap."""

    def __init__(
        self, width: int, out_width: int, factors: tuple[int, ...], *, rngs: nnx.Rngs
    ) -> None:
        """Create the layer."""
        self.factors = factors
        self.linear = nnx.Linear(math.prod(factors) * width, out_width, rngs=rngs)

    def __call__(self, h: Array, present: Array | None) -> tuple[Array, Array | None]:
        """Map (B, *grid, width) to (B, *coarse grid, out_width); also coarsen `present`."""
        h, _ = space_to_depth(nnx.silu(h), None, self.factors)
        if present is not None:
            present = jnp.any(_join(present[..., None], self._pads(present), self.factors), axis=-1)
        return keep(self.linear(h), present), present

    def _pads(self, present: Array) -> list[int]:
        return [-n % f for n, f in zip(present.shape[1:], self.factors, strict=True)]


def keep(h: Array, present: Array | None) -> Array:
    """Set the features (B, *grid, C) of points that are not present to zero."""
    return h if present is None else fill(h, present[..., None])


def attend(query: Array, keys: Array, values: Array, mask: Array | None, heads: int) -> Array:
    """Compute multihead attention; a query that finds no element present gets zeros.

    Args:
        query: Queries (B, Q, W).
        keys: Keys (B, T, W).
        values: Values (B, T, W).
        mask: Whether each element is present, shape (B, T), or None.
        heads: Number of heads, a divisor of W.

    Returns:
        Weighted means of the values, shape (B, Q, W).
    """
    q, k, v = (a.reshape(*a.shape[:2], heads, a.shape[2] // heads) for a in (query, keys, values))
    full = None if mask is None else mask[:, None, None, :]
    mixed = nnx.dot_product_attention(q, k, v, mask=full).reshape(query.shape)
    return mixed if mask is None else fill(mixed, jnp.any(mask, axis=1)[:, None, None])


def masked_softmax(scores: Array, mask: Array | None) -> Array:
    """Compute the softmax over the last axis among present entries; all zeros if none is."""
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    lowest = jnp.finfo(scores.dtype).min / 2
    return fill(jax.nn.softmax(jnp.where(mask, scores, lowest), axis=-1), mask)


class AttentionBlock(nnx.Module):
    """Attention from one sequence to another, and a two-layer perceptron, both residual.

    Layers normalise their inputs (Xiong et al. 2020, "On Layer Normalization in the Transformer
    Architecture", arXiv:2002.04745).
    """

    def __init__(self, width: int, heads: int, dropout: float, *, rngs: nnx.Rngs) -> None:
        """Create the layers."""
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (
            nnx.Linear(width, width, use_bias=False, rngs=rngs) for _ in "qkvo"
        )
        self.first = nnx.Linear(width, 2 * width, rngs=rngs)
        self.second = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(
        self, h: Array, source: Array, present: Array | None, *, key: Key | None = None
    ) -> Array:
        """Update elements h (B, Q, width) by those of `source` (B, T, width) that are present."""
        normed = jax.nn.standardize(source)
        mixed = attend(
            self.query(jax.nn.standardize(h)),
            self.key(normed),
            self.value(normed),
            present,
            self.heads,
        )
        h = h + self.out(mixed)
        inner = nnx.silu(self.first(jax.nn.standardize(h)))
        return h + self.second(dropout(key, inner, self.dropout))


class AttentionPool(nnx.Module):
    """Weighted mean over a sequence; each head learns its own weights."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        """Create the layers."""
        self.score = nnx.Linear(width, heads, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.heads = heads

    def __call__(self, h: Array, present: Array | None) -> Array:
        """Pool (B, T, width) to (B, width)."""
        scores = jnp.swapaxes(self.score(h), 1, 2)
        weights = masked_softmax(scores, None if present is None else present[:, None, :])
        values = self.value(h).reshape(*h.shape[:2], self.heads, h.shape[2] // self.heads)
        return jnp.einsum("bht,bthd->bhd", weights, values).reshape(h.shape[0], h.shape[-1])
