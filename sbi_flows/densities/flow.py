"""Normalising flows: spline (NSF) and affine (MAF), autoregressive or coupling.

Sources: Durkan et al. 2019, "Neural Spline Flows" (arXiv:1906.04032); Papamakarios et al. 2017,
"Masked Autoregressive Flow for Density Estimation" (arXiv:1705.07057).

Public names: `NSF`, `MAF`, `Flow`, `FlowLayer`, `LayerContext`.
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
        coupling: Whether to use coupling layers in place of masked autoregressive layers. Coupling
            layers draw in one pass through the network in any dimension, but are less accurate.
        bound: The splines act on (-bound, bound), in units of the noise, and are the identity
            outside.
        context_width: Width of a residual network that encodes the context for all layers; 0
            means no such network.
        context_blocks: Number of residual blocks of that network.
        dropout: Fraction of hidden units that dropout sets to zero in training.

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
        """Raise ValueError if a setting is out of range."""
        _check(self)
        require_count(2, bins=self.bins)
        require_positive(bound=self.bound)

    def build(self, key: Key, dim: int, context_dim: int) -> Density:
        """Build the flow for z in R^dim; it is the identity initially."""
        spline = _Spline(self.bins, self.bound)
        return _build(self, spline, key, dim, context_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAF:
    """Affine flow: masked autoregressive, or coupling (Real NVP).

    Attributes:
        transforms: Number of affine layers.
        hidden: Widths of the conditioner's hidden layers.
        coupling: Whether to use coupling layers in place of masked autoregressive layers.
        context_width: Width of a residual network that encodes the context for all layers; 0
            means no such network.
        context_blocks: Number of residual blocks of that network.
        dropout: Fraction of hidden units that dropout sets to zero in training.

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
        """Raise ValueError if a setting is out of range."""
        _check(self)

    def build(self, key: Key, dim: int, context_dim: int) -> Density:
        """Build the flow for z in R^dim; it is the identity initially."""
        return _build(self, _Affine(), key, dim, context_dim)


@dataclasses.dataclass(frozen=True)
class _Spline:
    """Elementwise transformer of an NSF, from parameters (P, D, *)."""

    bins: int
    bound: float

    @property
    def params(self) -> int:
        return 3 * self.bins - 1

    def __call__(self, params: Array) -> distrax.Bijector:
        return RationalQuadraticSpline(params, self.bound)


@dataclasses.dataclass(frozen=True)
class _Affine:
    """Elementwise transformer of a MAF, from parameters (P, D, *)."""

    params = 2

    def __call__(self, params: Array) -> distrax.Bijector:
        # log scales are bounded: an unbounded one overflows at the first outlier
        return distrax.ScalarAffine(params[0], log_scale=3.0 * jnp.tanh(params[1] / 3.0))


class Flow(Density):
    """Normalising flow of coupling or autoregressive layers with linear maps between them.

    Args:
        make_layer: Function from a key to a layer.
        keys: One key for each layer.
        encoder: Network that encodes the context for all layers; None means no such network.
        dim: Number of entries.
    """

    def __init__(
        self,
        make_layer: Callable[[Key], FlowLayer],
        keys: Key,
        encoder: ResidualMLP | None,
        dim: int,
    ) -> None:
        """Build the layers and stack their arrays."""
        template = nnx.eval_shape(lambda: make_layer(keys[0]))
        stacked = jax.vmap(lambda key: nnx.as_pure(nnx.state(make_layer(key))))(keys)
        self.layers = nnx.merge(nnx.graphdef(template), stacked)
        self.depth, self.dim = len(keys), dim
        self.encoder = nnx.data(encoder)

    def __call__(self, context: Array, *, key: Key | None = None) -> distrax.Distribution:
        """Return the flow for contexts (*, C); see `Density.__call__`."""
        encoder_key, layers_key = split_key(key, 2)
        if self.encoder is not None:
            encoded = self.encoder(context, key=encoder_key)
            context = jnp.concatenate([context, encoded], axis=-1)
        base = StandardNormal((*context.shape[:-1], self.dim), context.dtype)
        graph, arrays = nnx.split(self.layers)
        keys = None if layers_key is None else split_keys(layers_key, self.depth)
        # one matrix product encodes the context for all layers
        encode = jax.vmap(lambda weights: nnx.merge(graph, weights).encode_context(context))
        contexts = encode(arrays)

        def make_layer(inputs: tuple[Any, LayerContext, Key | None]) -> list[distrax.Bijector]:
            weights, layer_context, key = inputs
            return nnx.merge(graph, weights).bijectors(layer_context, key)

        layers = Repeated(make_layer, (arrays, contexts, keys), unroll=key is not None)
        return TransformedDistribution(base, layers)


class LayerContext(NamedTuple):
    """Encoded contexts of one layer, and its linear map.

    Attributes:
        first: Parameters of entry 0, shape (P, 1, *); None in a coupling layer.
        rest: Contexts as `Conditioner.encode_context` returns them; None in one dimension.
        linear: Factors of the linear map, which does not depend on the context.
    """

    first: Array | None
    rest: tuple[Array, Array] | None
    linear: LU


class FlowLayer(nnx.Module):
    """Layer of a flow: an elementwise transformer with its conditioner, and a linear map.

    Args:
        settings: Settings of the flow.
        transformer: Function from parameters to the elementwise bijector.
        dim: Number of entries.
        context_dim: Length of the context.
        rngs: Keys for the initial weights.
    """

    def __init__(
        self,
        settings: NSF | MAF,
        transformer: _Spline | _Affine,
        dim: int,
        context_dim: int,
        rngs: nnx.Rngs,
    ) -> None:
        """Create the networks; the linear map initially reverses the order of the entries."""
        self.transformer, self.dim = transformer, dim
        coupling = settings.coupling and dim > 1
        self.split = dim // 2 if coupling else 1
        self.first = nnx.data(None)
        if not coupling:
            # a linear layer suffices: the context encoder is non-linear. Zeros give the identity.
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

    def encode_context(self, context: Array) -> LayerContext:
        """Compute everything that depends only on contexts (*, C), and assemble the linear map."""
        first = None if self.first is None else jnp.moveaxis(self.first(context), -1, 0)[:, None]
        rest = None if self.rest is None else self.rest.encode_context(context)
        factors = lu(self.lower[...], self.upper[...], self.log_diagonal[...])
        return LayerContext(first, rest, factors)

    def bijectors(self, context: LayerContext, key: Key | None) -> list[distrax.Bijector]:
        """Return the bijectors from noise to data; the bijector nearest the data comes first."""
        conditioner = None
        if self.rest is not None and context.rest is not None:
            conditioner = Conditioned(self.rest, context.rest, key)
        if context.first is not None:
            layer = Autoregressive(context.first, conditioner, self.transformer)
        elif conditioner is not None:
            layer = Coupling(conditioner, self.transformer, self.split)
        else:
            raise ValueError("context: expected parameters of the first or of the other entries")
        if self.dim == 1:
            return [layer]
        # the inverse of LULinear: training multiplies by the matrix, only draws need its inverse
        return [layer, distrax.Inverse(LULinear(context.linear))]


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
