"""Residual multilayer perceptrons, with and without a context."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sbi_flows.typing import Key


class ResidualMLP(nnx.Module):
    """Input layer, residual blocks of equal width, output layer; also the shipped embedding.

    Args:
        in_features: Length of the input's last axis.
        out_features: Length of the output's last axis.
        width: Width of the hidden layers.
        blocks: Number of residual blocks of two layers each.
        dropout: Fraction of hidden units dropped in training.
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
        """Map (*, in_features) to (*, out_features); a key turns dropout on."""
        h = self.enter(x)
        for block, k in zip(self.blocks, split_key(key, len(self.blocks)), strict=True):
            h = block(h, key=k)
        return self.leave(nnx.silu(h))


class ResidualBlock(nnx.Module):
    """h + W2 dropout(act(W1 act(h)))."""

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
    """Zero a fraction `rate` of x, to within 1/256, and scale up the rest; no key, no change."""
    if key is None or rate == 0.0:
        return x
    # a byte an entry: on a CPU the random words take as long as the layer that they are made for
    words = jax.random.bits(key, (-(-x.size // 4),), jnp.uint32)
    chance = jnp.concatenate([(words >> shift) & 0xFF for shift in (0, 8, 16, 24)])
    kept = max(1, round(256 * (1.0 - rate)))
    mask = jnp.reshape(chance[: x.size], x.shape) < kept
    return jnp.where(mask, x * (256 / kept), 0.0)


def split_key(key: Key | None, n: int) -> Sequence[Key | None]:
    """Split a key into n; no key stays no key."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def fast_key(key: Key) -> Key:
    """A key of JAX's `unsafe_rbg` generator, made from any key.

    For initial weights and dropout masks: threefry costs as much as the network itself there, to
    compile and to run.
    """
    data = jnp.ravel(jax.random.key_data(key))
    return jax.random.wrap_key_data(jnp.resize(data, (4,)), impl="unsafe_rbg")
