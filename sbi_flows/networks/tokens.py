"""A velocity network whose tokens are the parameters: attention between them.

Public names: `Tokens`.

Sources: Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762); Peebles & Xie 2023,
"Scalable Diffusion Models with Transformers" (arXiv:2212.09748), for how time and context enter;
Gloeckler et al. 2024, "All-in-one simulation-based inference" (arXiv:2404.09636), for parameters as
tokens and masks that state what is known of their structure.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sbi_flows.core.checks import require_count
from sbi_flows.core.typing import Key
from sbi_flows.networks.mlp import dropout, split_key
from sbi_flows.networks.shapes import align
from sbi_flows.networks.velocity import Told, ToldNetwork, VelocityNetwork


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens(Told):
    """Transformer over the parameters, for many of them or for ones that can be exchanged.

    In a fit the tokens are the parameters as the linear start whitens them, each with those before
    it: a posterior has the structure that `kinds` and `mask` state as far as the start has it.

    Attributes:
        width: Width of a token.
        blocks: Number of blocks of attention and a two-layer perceptron.
        heads: Number of heads of the attention; it divides the width.
        size: Number of neighbouring parameters that make a token.
        kinds: Kind of each token. Tokens of one kind can be exchanged: the velocity of a permuted
            point is the permuted velocity. None: each token is of its own kind.
        mask: Which token (row) attends to which (column); None for all to all. Every token attends
            to itself.
        context_blocks: Number of residual blocks of the context's own network.
        frequencies: Number of Fourier features of the time, in each of its two forms.
        dropout: Fraction of hidden units dropped in training.

    References:
        Scalable Diffusion Models with Transformers, arXiv:2212.09748; All-in-one simulation-based
        inference, arXiv:2404.09636.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> settings = Tokens(width=16, heads=2, size=2, kinds=(0, 1, 1))
        >>> network = settings.build(nnx.Rngs(0), dim=6, context_dim=3)
        >>> given = network.given(jnp.zeros((4, 3)))
        >>> network(jnp.zeros((10, 4, 6)), jnp.asarray(0.5), given).shape
        (10, 4, 6)
    """

    width: int = 64
    heads: int = 4
    size: int = 1
    kinds: tuple[int, ...] | None = None
    mask: tuple[tuple[bool, ...], ...] | None = None

    def __post_init__(self) -> None:
        """Refuse settings that make no network."""
        super().__post_init__()
        require_count(1, heads=self.heads, size=self.size)
        for name in ("kinds", "mask"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, tuple):
                raise ValueError(f"{name}: expected None or a tuple, got {type(value).__name__}")
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of width={self.width}, got {self.heads}")
        if self.mask is not None and {len(row) for row in self.mask} != {len(self.mask)}:
            raise ValueError("mask: expected as many columns as rows")

    def build(self, rngs: nnx.Rngs, dim: int, context_dim: int) -> VelocityNetwork:
        """Make the network, whose velocity is zero at first.

        Raises:
            ValueError: The dimension is no multiple of `size`, or there is not one kind, or not
                one row of the mask, for each token.
        """
        count, rest = divmod(dim, self.size)
        if rest:
            raise ValueError(f"size: expected a divisor of {dim} parameters, got {self.size}")
        for name in ("kinds", "mask"):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise ValueError(f"{name}: expected one for each of {count} tokens, got {value}")
        return _Tokens(self, rngs, count, context_dim)


class _Tokens(ToldNetwork):
    def __init__(self, settings: Tokens, rngs: nnx.Rngs, count: int, context_dim: int) -> None:
        super().__init__(settings, rngs, context_dim)
        self.size, self.count, width = settings.size, count, settings.width
        kinds = tuple(range(count)) if settings.kinds is None else settings.kinds
        self.kinds = tuple(sorted(set(kinds)).index(kind) for kind in kinds)
        self.enter = nnx.Linear(settings.size, width, rngs=rngs)
        self.kind = nnx.Embed(len(set(kinds)), width, rngs=rngs)
        self.blocks = nnx.List([_Block(settings, rngs) for _ in range(settings.blocks)])
        zeros = nnx.initializers.zeros_init()
        self.leave = nnx.Linear(width, settings.size, kernel_init=zeros, rngs=rngs)

    def __call__(self, z: Array, angle: Array, given: Array, *, key: Key | None = None) -> Array:
        """Velocity at points z (*draws, *batch, d) and angles (), or (*batch)."""
        told = self.told(angle, given)[..., None, :]
        h = self.enter(z.reshape(*z.shape[:-1], self.count, self.size))
        h += align(self.kind(jnp.asarray(self.kinds)), h)
        for block, k in zip(self.blocks, split_key(key, len(self.blocks)), strict=True):
            h = block(h, told, key=k)
        return self.leave(nnx.silu(jax.nn.standardize(h))).reshape(z.shape)


class _Block(nnx.Module):
    """Attention, then a perceptron, each scaled, shifted and gated by the time and the context."""

    def __init__(self, settings: Tokens, rngs: nnx.Rngs) -> None:
        width = settings.width
        self.settings = settings
        self.film = nnx.Linear(width, 6 * width, rngs=rngs)
        self.query, self.key, self.value, self.out = (
            nnx.Linear(width, width, use_bias=False, rngs=rngs) for _ in "qkvo"
        )
        self.first, self.second = (
            nnx.Linear(width, 2 * width, rngs=rngs),
            nnx.Linear(2 * width, width, rngs=rngs),
        )

    def __call__(self, h: Array, told: Array, *, key: Key | None = None) -> Array:
        """Map tokens (*, T, width), told (*batch, 1, width)."""
        films = (align(film, h) for film in jnp.split(self.film(told), 6, axis=-1))
        scale, shift, gate, scale_2, shift_2, gate_2 = films
        h = h + gate * self._attended(jax.nn.standardize(h) * (1.0 + scale) + shift)
        inner = nnx.silu(self.first(jax.nn.standardize(h) * (1.0 + scale_2) + shift_2))
        return h + gate_2 * self.second(dropout(key, inner, self.settings.dropout))

    def _attended(self, h: Array) -> Array:
        heads = self.settings.heads
        query, keys, values = (
            layer(h).reshape(*h.shape[:-1], heads, -1)
            for layer in (self.query, self.key, self.value)
        )
        mask = self.settings.mask
        seen = None if mask is None else jnp.asarray(mask) | jnp.eye(h.shape[-2], dtype=bool)
        if seen is not None:
            seen = seen.reshape((1,) * (h.ndim - 1) + seen.shape)
        return self.out(nnx.dot_product_attention(query, keys, values, mask=seen).reshape(h.shape))
