"""Residual multilayer perceptrons, and random numbers that are fast in compiled programs.

JAX's generators are slow on a CPU: drawing a dropout mask can take as long as evaluating
its layer. The functions `hashed_...` draw from a hash of each entry's index instead.

Public names: `ResidualMLP`, `dropout`, `hashed_words`, `hashed_uniform`, `hashed_normal`,
`split_key`, `split_keys`, `fast_key`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.scipy.special import ndtri

from sbi_flows.core.typing import Key


class ResidualMLP(nnx.Module):
    """Residual multilayer perceptron; also an embedding for observations that are vectors.

    It has an input layer, residual blocks of equal width, and an output layer.

    Args:
        in_features: Length of the input's last axis.
        out_features: Length of the output's last axis.
        width: Width of the hidden layers.
        blocks: Number of residual blocks of two layers each.
        dropout: Fraction of hidden units that dropout sets to zero in training.
        rngs: Keys for the initial weights.

    References:
        Deep Residual Learning for Image Recognition, arXiv:1512.03385.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> ResidualMLP(3, 8, rngs=nnx.Rngs(0))(jnp.ones((5, 3))).shape
        (5, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        width: int = 64,
        blocks: int = 2,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ) -> None:
        """Create the layers."""
        self.enter = nnx.Linear(in_features, width, rngs=rngs)
        self.blocks = nnx.List([ResidualBlock(width, dropout, rngs=rngs) for _ in range(blocks)])
        self.leave = nnx.Linear(width, out_features, rngs=rngs)

    def __call__(self, x: Array, *, key: Key | None = None) -> Array:
        """Map (*, in_features) to (*, out_features), with dropout if there is a key."""
        h = self.enter(x)
        for block, k in zip(self.blocks, split_key(key, len(self.blocks)), strict=True):
            h = block(h, key=k)
        return self.leave(nnx.silu(h))


class ResidualBlock(nnx.Module):
    """Residual block h + W2 dropout(silu(W1 silu(h)))."""

    def __init__(self, width: int, dropout: float, *, rngs: nnx.Rngs) -> None:
        """Create the two layers."""
        self.first = nnx.Linear(width, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.dropout = dropout

    def __call__(self, h: Array, *, key: Key | None = None) -> Array:
        """Map (*, width) to (*, width)."""
        y = nnx.silu(self.first(nnx.silu(h)))
        return h + self.second(dropout(key, y, self.dropout))


def dropout(key: Key | None, x: Array, rate: float) -> Array:
    """Set a random fraction `rate` of x to zero and scale up the rest; do nothing without a key."""
    if key is None or rate == 0.0:
        return x
    is_kept = hashed_words(key, x.shape) >= np.uint32(rate * 2**32)
    return jnp.where(is_kept, x / (1.0 - rate), 0.0)


def hashed_words(key: Key, shape: tuple[int, ...]) -> Array:
    """Draw random 32-bit words: a hash of the key and of each entry's index.

    These words are used for dropout, for the order of simulations in an epoch, and for noise in
    training. Each word takes a few instructions. The words do not depend on `vmap` or on the number
    of devices.

    Args:
        key: Random key.
        shape: Shape of the result.

    Returns:
        Array of uint32.
    """
    data = jnp.ravel(jax.random.key_data(key))
    strides = np.cumprod((1, *shape[:0:-1]), dtype=np.uint32)[::-1]
    words = data[0]
    for axis, stride in enumerate(strides):
        words = words + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return _hashed(_hashed(words) ^ data[-1])


def hashed_uniform(key: Key, shape: tuple[int, ...], dtype: Any) -> Array:
    """Draw uniform numbers in the open interval (0, 1) with `hashed_words`."""
    # (2^23 - 1 + 0.5) / 2^23 is the largest number: below one in float32
    return ((hashed_words(key, shape) >> 9).astype(dtype) + 0.5) / 2**23


def hashed_normal(key: Key, shape: tuple[int, ...], dtype: Any) -> Array:
    """Draw standard normal numbers with `hashed_words`."""
    return ndtri(hashed_uniform(key, shape, dtype))


def _hashed(words: Array) -> Array:
    """Mix the bits of 32-bit words by a bijection, the finaliser of MurmurHash3.

    Source: Austin Appleby, MurmurHash3 (2011), `fmix32`.
    """
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def split_key(key: Key | None, n: int) -> Sequence[Key | None]:
    """Split a key into a list of n keys for dropout; for None, return a list of n times None."""
    return [None] * n if key is None else list(split_keys(key, n))


def split_keys(key: Key, n: int) -> Key:
    """Split a key into n keys of the same generator, shape (n,), with `hashed_words`."""
    words = hashed_words(key, (n, *jax.random.key_data(key).shape))
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))


def fast_key(key: Key) -> Key:
    """Convert a key to one of JAX's `unsafe_rbg` generator, whose programs compile faster.

    Initial weights use this key: with the default generator (threefry), they would take a third of
    the compile time of a fit.
    """
    data = jnp.ravel(jax.random.key_data(key))
    return jax.random.wrap_key_data(jnp.resize(data, (4,)), impl="unsafe_rbg")
