"""Transformer velocity network; each token holds one or more parameters.

Public names: `Tokens`.

Sources: Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762); Peebles & Xie 2023,
"Scalable Diffusion Models with Transformers" (arXiv:2212.09748), for how time and context enter;
Gloeckler et al. 2024, "All-in-one simulation-based inference" (arXiv:2404.09636), for parameters as
tokens, and for attention masks that encode known dependences.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sbi_flows.core.checks import require_count, require_heads
from sbi_flows.core.typing import Key
from sbi_flows.networks.mlp import dropout, split_key
from sbi_flows.networks.shapes import align
from sbi_flows.networks.velocity import TimeContextNetwork, TimeContextSettings, VelocityNetwork


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens(TimeContextSettings):
    """Transformer over the parameters, for many parameters or for exchangeable ones.

    In a fit, the linear start first whitens the parameters by a lower triangular matrix: entry i
    becomes a combination of parameters 0 to i. `kinds` and `mask` describe the structure of these
    whitened parameters. The posterior has this structure only if the whitening matrix also has it.

    Attributes:
        width: Width of a token.
        blocks: Number of blocks; each has an attention layer and a two-layer perceptron.
        heads: Number of attention heads; `width` must be a multiple of it.
        size: Number of consecutive parameters in one token.
        kinds: Kind of each token. Tokens of one kind are exchangeable: permuting them permutes the
            velocity. None gives each token its own kind.
        mask: Whether each token (row) attends to each other token (column); None for all to all.
            Every token attends to itself.
        context_blocks: Number of residual blocks of the network that encodes the context.
        frequencies: Number of Fourier frequencies of the time; see `time_features`.
        dropout: Fraction of hidden units that dropout sets to zero in training.

    References:
        Scalable Diffusion Models with Transformers, arXiv:2212.09748; All-in-one simulation-based
        inference, arXiv:2404.09636.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> settings = Tokens(width=16, heads=2, size=2, kinds=(0, 1, 1))
        >>> network = settings.build(nnx.Rngs(0), dim=6, context_dim=3)
        >>> encoded = network.encode_context(jnp.zeros((4, 3)))
        >>> network(jnp.zeros((10, 4, 6)), jnp.asarray(0.5), encoded).shape
        (10, 4, 6)
    """

    width: int = 64
    heads: int = 4
    size: int = 1
    kinds: tuple[int, ...] | None = None
    mask: tuple[tuple[bool, ...], ...] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is invalid."""
        super().__post_init__()
        require_heads(self.width, self.heads)
        require_count(1, size=self.size)
        for name in ("kinds", "mask"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, tuple):
                raise ValueError(f"{name}: expected None or a tuple, got {type(value).__name__}")
        if self.mask is not None and {len(row) for row in self.mask} != {len(self.mask)}:
            raise ValueError("mask: expected as many columns as rows")

    def build(self, rngs: nnx.Rngs, dim: int, context_dim: int) -> VelocityNetwork:
        """Create the network; its initial velocity is zero.

        Args:
            rngs: Keys for the initial weights.
            dim: Number of parameters.
            context_dim: Length of the context.

        Raises:
            ValueError: The number of parameters is not a multiple of `size`, or `kinds` or `mask`
                do not have one entry for each token.
        """
        count, rest = divmod(dim, self.size)
        if rest:
            raise ValueError(f"size: expected a divisor of {dim} parameters, got {self.size}")
        for name in ("kinds", "mask"):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise ValueError(f"{name}: expected one for each of {count} tokens, got {value}")
        return _Tokens(self, rngs, count, context_dim)


class _Tokens(TimeContextNetwork):
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

    def __call__(self, z: Array, angle: Array, encoded: Array, *, key: Key | None = None) -> Array:
        """Compute the velocity at points z (*draws, *batch, d) and angles (), or (*batch)."""
        condition = self.condition(angle, encoded)[..., None, :]
        h = self.enter(z.reshape(*z.shape[:-1], self.count, self.size))
        h += align(self.kind(jnp.asarray(self.kinds)), h)
        for block, k in zip(self.blocks, split_key(key, len(self.blocks)), strict=True):
            h = block(h, condition, key=k)
        return self.leave(nnx.silu(jax.nn.standardize(h))).reshape(z.shape)


class _Block(nnx.Module):
    """Attention and a two-layer perceptron, both modulated by the time and the context.

    For each of the two parts, the time and the context determine a scale and a shift of its input,
    and a factor (gate) of its output.
    """

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

    def __call__(self, h: Array, condition: Array, *, key: Key | None = None) -> Array:
        """Update tokens (*, T, width), given the combined time and context (*batch, 1, width)."""
        films = (align(film, h) for film in jnp.split(self.film(condition), 6, axis=-1))
        scale, shift, gate, scale_2, shift_2, gate_2 = films
        h = h + gate * self._attend(jax.nn.standardize(h) * (1.0 + scale) + shift)
        inner = nnx.silu(self.first(jax.nn.standardize(h) * (1.0 + scale_2) + shift_2))
        return h + gate_2 * self.second(dropout(key, inner, self.settings.dropout))

    def _attend(self, h: Array) -> Array:
        """Compute self-attention of tokens (*, T, width)."""
        heads = self.settings.heads
        query, keys, values = (
            layer(h).reshape(*h.shape[:-1], heads, -1)
            for layer in (self.query, self.key, self.value)
        )
        mask = self.settings.mask
        full = None if mask is None else jnp.asarray(mask) | jnp.eye(h.shape[-2], dtype=bool)
        if full is not None:
            full = full.reshape((1,) * (h.ndim - 1) + full.shape)
        return self.out(nnx.dot_product_attention(query, keys, values, mask=full).reshape(h.shape))
