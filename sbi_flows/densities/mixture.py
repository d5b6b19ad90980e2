"""Mixture of Gaussians with full covariances (mixture density network).

Source: Bishop 1994, "Mixture Density Networks", NCRG/94/004.

Public names: `GaussianMixture`.
"""

from __future__ import annotations

import dataclasses

import distrax
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sbi_flows.core.checks import require_count, require_fraction
from sbi_flows.core.typing import Key
from sbi_flows.densities.base import Density
from sbi_flows.networks.mlp import ResidualMLP


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianMixture:
    """Mixture of Gaussians; a residual network computes weights, means and covariances.

    Attributes:
        components: Number of components.
        width: Width of the network.
        blocks: Number of residual blocks of the network.
        dropout: Fraction of hidden units that dropout sets to zero in training.

    References:
        Mixture Density Networks, Bishop 1994.

    Example:
        >>> import jax
        >>> density = GaussianMixture(components=3).build(jax.random.key(0), dim=2, context_dim=4)
        >>> density(jax.numpy.zeros((5, 4))).event_shape
        (2,)
    """

    components: int = 8
    width: int = 64
    blocks: int = 2
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is out of range."""
        require_count(1, components=self.components, width=self.width)
        require_count(0, blocks=self.blocks)
        require_fraction(dropout=self.dropout)

    def build(self, key: Key, dim: int, context_dim: int) -> Density:
        """Build the mixture over R^dim; initially it is close to a standard normal."""
        return _Mixture(self, key, dim, context_dim)


class _Mixture(Density):
    """Mixture density network; see `GaussianMixture`."""

    def __init__(self, settings: GaussianMixture, key: Key, dim: int, context_dim: int) -> None:
        weight_key, shift_key = jax.random.split(key)
        self.components, self.dim = settings.components, dim
        triangle = dim * (dim + 1) // 2
        self.network = ResidualMLP(
            context_dim,
            settings.components * (1 + dim + triangle),
            width=settings.width,
            blocks=settings.blocks,
            dropout=settings.dropout,
            rngs=nnx.Rngs(weight_key),
        )
        kernel = self.network.leave.kernel
        kernel[...] = jnp.zeros_like(kernel[...])
        # Small offsets: components that start equal have equal gradients and stay equal.
        self.shift = nnx.Param(0.1 * jax.random.normal(shift_key, (settings.components, dim)))

    def __call__(self, context: Array, *, key: Key | None = None) -> distrax.Distribution:
        """Return the mixture for contexts (*, C); see `Density.__call__`."""
        out = self.network(context, key=key)
        out = jnp.reshape(out, (*out.shape[:-1], self.components, -1))
        logits, means, entries = jnp.split(out, [1, 1 + self.dim], axis=-1)
        means += jnp.broadcast_to(self.shift[...], means.shape)
        rows, columns = jnp.tril_indices(self.dim)
        scale = jnp.zeros((*entries.shape[:-1], self.dim, self.dim), entries.dtype)
        diagonal = rows == columns
        entries = jnp.where(
            jnp.broadcast_to(diagonal, entries.shape), jnp.exp(3 * jnp.tanh(entries / 3)), entries
        )
        scale = scale.at[..., rows, columns].set(entries)
        return distrax.MixtureSameFamily(
            distrax.Categorical(logits=logits[..., 0]),
            distrax.MultivariateNormalTri(means, scale),
        )
