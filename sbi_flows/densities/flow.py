"""Normalising flows: spline (NSF) and affine (MAF), autoregressive or coupling.

Sources: Durkan et al. 2019, "Neural Spline Flows" (arXiv:1906.04032); Papamakarios et al. 2017,
"Masked Autoregressive Flow for Density Estimation" (arXiv:1705.07057).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sbi_flows.core.checks import require_count, require_fraction, require_positive
from sbi_flows.core.typing import Key
from sbi_flows.densities.base import Density, StandardNormal, TransformedDistribution
from sbi_flows.densities.bijectors.autoregressive import Autoregressive
from sbi_flows.densities.bijectors.coupling import Coupling
from sbi_flows.densities.bijectors.linear import LU, LULinear, lu
from sbi_flows.densities.bijectors.repeated import Repeated
from sbi_flows.densities.bijectors.spline import RationalQuadraticSpline
from sbi_flows.networks.conditioner import Conditioned, Conditioner
from sbi_flows.networks.mlp import ResidualMLP, split_key, split_keys


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
        context_width: Width of the residual network that the context passes before the layers
            share it; zero leaves the context as it is.
        context_blocks: Number of its residual blocks.
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
    context_width: int = 64
    context_blocks: int = 2
    dropout: float = 0.15

    def __post_init__(self) -> None:
        """Refuse settings that make no flow."""
        _check(self)
        require_count(2, bins=self.bins)
        require_positive(bound=self.bound)

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
        context_width: Width of the residual network that the context passes before the layers
            share it; zero leaves the context as it is.
        context_blocks: Number of its residual blocks.
        dropout: Fraction of hidden units dropped in training.

    References:
        Masked Autoregressive Flow for Density Estimation, arXiv:1705.07057.
    """

    transforms: int = 5
    hidden: tuple[int, ...] = (64, 64)
    coupling: bool = False
    context_width: int = 64
    context_blocks: int = 2
    dropout: float = 0.15

    def __post_init__(self) -> None:
        """Refuse settings that make no flow."""
        _check(self)

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
    """A chain of coupling or autoregressive layers, each before a linear map."""

    def __init__(
        self,
        make_layer: Callable[[Key], FlowLayer],
        keys: Key,
        encoder: ResidualMLP | None,
        dim: int,
    ) -> None:
        """Make one layer a key, their arrays stacked, and hold the context's own network."""
        template = nnx.eval_shape(lambda: make_layer(keys[0]))
        stacked = jax.vmap(lambda key: nnx.as_pure(nnx.state(make_layer(key))))(keys)
        self.layers = nnx.merge(nnx.graphdef(template), stacked)
        self.depth, self.dim = len(keys), dim
        self.encoder = nnx.data(encoder)

    def __call__(self, context: Array, *, key: Key | None = None) -> distrax.Distribution:
        """The flow given contexts (*, C), a distribution over R^dim."""
        first, second = split_key(key, 2)
        if self.encoder is not None:
            context = jnp.concatenate([context, self.encoder(context, key=first)], axis=-1)
        base = StandardNormal((*context.shape[:-1], self.dim), context.dtype)
        graph, arrays = nnx.split(self.layers)
        keys = None if second is None else split_keys(second, self.depth)
        # what the context alone gives is one product for all layers, and so on
        given = jax.vmap(lambda own: nnx.merge(graph, own).given(context))(arrays)

        def layer(inputs: tuple[Any, Given, Key | None]) -> list[distrax.Bijector]:
            own, given, key = inputs
            return nnx.merge(graph, own).bijectors(given, key)

        layers = Repeated(layer, (arrays, given, keys), written_out=key is not None)
        return TransformedDistribution(base, layers)


class Given(NamedTuple):
    """What is made for all layers at once.

    Attributes:
        first: Parameters of entry 0, shape (P, 1, *); None in a coupling layer.
        rest: What `Conditioner.encode_context` returns; None in one dimension.
        linear: The factors of the linear map, which no context changes.
    """

    first: Array | None
    rest: tuple[Array, Array] | None
    linear: LU


class FlowLayer(nnx.Module):
    """One elementwise transformer with its conditioner, and the linear map behind it."""

    def __init__(
        self,
        settings: NSF | MAF,
        transformer: _Spline | _Affine,
        dim: int,
        context_dim: int,
        rngs: nnx.Rngs,
    ) -> None:
        """Start the linear map at the reversal of the entries."""
        self.transformer, self.dim = transformer, dim
        coupling = settings.coupling and dim > 1
        self.split = dim // 2 if coupling else 1
        self.first = nnx.data(None)
        if not coupling:
            # the context's own network is non-linear already; zeros start at the identity
            self.first = nnx.Linear(
                context_dim,
                transformer.params,
                kernel_init=nnx.initializers.zeros_init(),
                rngs=rngs,
            )
        self.rest = nnx.data(None)
        if dim > 1:
            self.rest = Conditioner(
                self.split if coupling else dim - 1,
                dim - self.split,
                transformer.params,
                context_dim=context_dim,
                hidden=settings.hidden,
                dropout=settings.dropout,
                masked=not coupling,
                rngs=rngs,
            )
        self.lower = nnx.Param(jnp.zeros((dim, dim)))
        self.upper = nnx.Param(jnp.zeros((dim, dim)))
        self.log_diagonal = nnx.Param(jnp.zeros(dim))

    def given(self, context: Array) -> Given:
        """What contexts (*, C) add to the layer, and its linear map."""
        first = None if self.first is None else jnp.moveaxis(self.first(context), -1, 0)[:, None]
        rest = None if self.rest is None else self.rest.encode_context(context)
        return Given(first, rest, lu(self.lower[...], self.upper[...], self.log_diagonal[...]))

    def bijectors(self, given: Given, key: Key | None) -> list[distrax.Bijector]:
        """Noise-to-data bijectors, the data side first."""
        rest = None
        if self.rest is not None and given.rest is not None:
            rest = Conditioned(self.rest, given.rest, key)
        if given.first is not None:
            layer = Autoregressive(given.first, rest, self.transformer)
        else:
            layer = Coupling(rest, self.transformer, self.split)  # type: ignore[arg-type]
        if self.dim == 1:
            return [layer]
        # the direction that training takes is the product, the other one solves
        return [layer, distrax.Inverse(LULinear(given.linear))]


def _check(settings: NSF | MAF) -> None:
    require_count(1, transforms=settings.transforms)
    require_count(0, context_width=settings.context_width, context_blocks=settings.context_blocks)
    require_fraction(dropout=settings.dropout)
    if not isinstance(settings.hidden, tuple) or not settings.hidden:
        raise ValueError(f"hidden: expected a tuple of at least one width, got {settings.hidden}")
    for width in settings.hidden:
        require_count(1, hidden=width)


def _build(
    settings: NSF | MAF, transformer: _Spline | _Affine, key: Key, dim: int, context_dim: int
) -> Flow:
    encoder_key, layer_key = jax.random.split(key)
    width, encoder = settings.context_width, None
    if width:
        encoder = ResidualMLP(
            context_dim,
            width,
            width=width,
            blocks=settings.context_blocks,
            dropout=settings.dropout,
            rngs=nnx.Rngs(encoder_key),
        )

    def make_layer(key: Key) -> FlowLayer:
        return FlowLayer(settings, transformer, dim, context_dim + width, nnx.Rngs(key))

    return Flow(make_layer, jax.random.split(layer_key, settings.transforms), encoder, dim)
