"""Normalising flows: spline (NSF) and affine (MAF), autoregressive or coupling.

Sources: Durkan et al. 2019, "Neural Spline Flows" (arXiv:1906.04032); Papamakarios et al. 2017,
"Masked Autoregressive Flow for Density Estimation" (arXiv:1705.07057).
"""

from __future__ import annotations

import dataclasses

import distrax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sbi_flows.bijectors.autoregressive import Autoregressive, Transformer
from sbi_flows.bijectors.coupling import Coupling
from sbi_flows.bijectors.linear import LULinear, Permutation
from sbi_flows.bijectors.spline import RationalQuadraticSpline
from sbi_flows.densities.base import Density
from sbi_flows.networks.conditioner import Conditioner
from sbi_flows.networks.mlp import split_key
from sbi_flows.typing import Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class NSF:
    """Neural spline flow.

    Attributes:
        transforms: Number of spline layers.
        bins: Number of bins of each spline.
        hidden: Widths of the conditioner's hidden layers.
        coupling: Coupling layers in place of masked autoregressive ones: draws cost one pass
            whatever D, at some loss of accuracy.
        bound: The splines act on (-bound, bound) in whitened units and are the identity outside.
        dropout: Fraction of hidden units dropped in training.

    References:
        Neural Spline Flows, arXiv:1906.04032.

    Example:
        >>> import jax
        >>> density = NSF(transforms=2).build(jax.random.key(0), dim=3, context_dim=4)
        >>> density(jax.numpy.zeros((5, 4))).batch_shape
        (5,)
    """

    transforms: int = 5
    bins: int = 8
    hidden: tuple[int, ...] = (64, 64)
    coupling: bool = False
    bound: float = 5.0
    dropout: float = 0.0

    def build(self, key: Key, dim: int, context_dim: int) -> Density:
        """Make the flow for z in R^dim; it starts at the identity."""
        spline = _Spline(self.bins, self.bound)
        return _build(self, spline, key, dim, context_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAF:
    """Affine flow: masked autoregressive, or coupling (Real NVP).

    Attributes:
        transforms: Number of affine layers.
        hidden: Widths of the conditioner's hidden layers.
        coupling: Coupling layers in place of masked autoregressive ones.
        dropout: Fraction of hidden units dropped in training.

    References:
        Masked Autoregressive Flow for Density Estimation, arXiv:1705.07057.
    """

    transforms: int = 5
    hidden: tuple[int, ...] = (64, 64)
    coupling: bool = False
    dropout: float = 0.0

    def build(self, key: Key, dim: int, context_dim: int) -> Density:
        """Make the flow for z in R^dim; it starts at the identity."""
        return _build(self, _Affine(), key, dim, context_dim)


@dataclasses.dataclass(frozen=True)
class _Spline:
    bins: int
    bound: float

    @property
    def params(self) -> int:
        return 3 * self.bins - 1

    def __call__(self, params: Array) -> distrax.Bijector:
        return RationalQuadraticSpline(params, self.bound)


@dataclasses.dataclass(frozen=True)
class _Affine:
    params = 2

    def __call__(self, params: Array) -> distrax.Bijector:
        # bounded log scales: an unbounded one overflows on the first outlier
        return distrax.ScalarAffine(params[0], log_scale=3.0 * jnp.tanh(params[1] / 3.0))


class Flow(Density):
    """A chain of coupling or autoregressive layers, each after a linear map."""

    def __init__(self, layers: list[FlowLayer], dim: int) -> None:
        """Hold the layers, data side first."""
        self.layers = nnx.List(layers)
        self.dim = dim

    def __call__(self, context: Array, *, key: Key | None = None) -> distrax.Distribution:
        """The flow given contexts (*, C), a distribution over R^dim."""
        zeros = jnp.zeros((*context.shape[:-1], self.dim), context.dtype)
        base = distrax.MultivariateNormalDiag(zeros, jnp.ones_like(zeros))
        keys = split_key(key, len(self.layers))
        bijectors = [b for f, k in zip(self.layers, keys) for b in f.bijectors(context, k)]
        return distrax.Transformed(base, distrax.Chain(bijectors))


class FlowLayer(nnx.Module):
    """One elementwise transformer with its conditioner, and the linear map behind it."""

    def __init__(
        self, conditioner: Conditioner, transformer: Transformer, dim: int, coupling: bool
    ) -> None:
        """Start the linear map at the reversal of the entries."""
        self.conditioner = conditioner
        self.transformer, self.dim, self.coupling = transformer, dim, coupling
        self.lower = nnx.Param(jnp.zeros((dim, dim)))
        self.upper = nnx.Param(jnp.zeros((dim, dim)))
        self.log_diagonal = nnx.Param(jnp.zeros(dim))

    def bijectors(self, context: Array, key: Key | None) -> list[distrax.Bijector]:
        """Noise-to-data bijectors, the data side first."""

        def conditioner(x: Array) -> Array:
            return self.conditioner(x, context, key=key)

        if self.coupling:
            layer = Coupling(conditioner, self.transformer, self.dim // 2)
        else:
            layer = Autoregressive(conditioner, self.transformer, self.dim)
        if self.dim == 1:
            return [layer]
        linear = LULinear(self.lower[...], self.upper[...], self.log_diagonal[...])
        return [layer, linear, Permutation(tuple(reversed(range(self.dim))))]


def _build(
    settings: NSF | MAF, transformer: _Spline | _Affine, key: Key, dim: int, context_dim: int
) -> Flow:
    coupling = settings.coupling and dim > 1
    split = dim // 2
    sizes = (split, dim - split) if coupling else (dim, dim)
    rngs = nnx.Rngs(key)
    layers = []
    for _ in range(settings.transforms):
        conditioner = Conditioner(
            *sizes,
            transformer.params,
            context_dim=context_dim,
            hidden=settings.hidden,
            dropout=settings.dropout,
            masked=not coupling,
            rngs=rngs,
        )
        layers.append(FlowLayer(conditioner, transformer, dim, coupling))
    return Flow(layers, dim)
