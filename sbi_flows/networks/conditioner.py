"""Conditioners: networks that compute a bijector's parameters from its inputs and a context.

A conditioner maps inputs `(D, *)` to parameters `(P, D, *)`. The batch axes come last, so that the
rows of a batch are contiguous in memory in every layer. The spline then vectorises over them, and
no array is transposed; on a CPU, transposing would take longer than all matrix products. The output
layer is initially zero, so that every bijector starts as the identity. Two linear maps of the
context are added to the first hidden layer and to the output. These maps are computed once for each
observation, and reused for all draws.

Source: Germain et al. 2015, "MADE" (arXiv:1502.03509), for the masks.

Public names: `Conditioner`, `Conditioned`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.core.typing import Key
from sbi_flows.networks.mlp import dropout, split_key


class Conditioner(nnx.Module):
    """Residual network over (inputs, context), masked where the outputs must be autoregressive.

    Args:
        in_dim: Number of inputs.
        out_dim: Number of outputs, each with P parameters.
        params: Number P of parameters for each output.
        context_dim: Length of the context.
        hidden: Width of each hidden layer. Consecutive layers of equal width have a residual
            connection.
        dropout: Fraction of hidden units that dropout sets to zero in training. The last
            hidden layer has no dropout, unless it is the only one.
        masked: Whether parameters of output i depend on inputs 0 to i only. This requires
            in_dim == out_dim.
        rngs: Keys for the initial weights.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        params: int,
        *,
        context_dim: int,
        hidden: tuple[int, ...],
        dropout: float = 0.0,
        masked: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        """Create the layers; the output layers are zero."""
        self.params, self.out_dim = params, out_dim
        self.dropout, self.masked, self.dims = dropout, masked, (in_dim, *hidden)
        self.layers = nnx.List(
            [nnx.Linear(a, b, rngs=rngs, use_bias=False) for a, b in itertools.pairwise(self.dims)]
        )
        self.context = nnx.Linear(context_dim, hidden[0], rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        outputs = params * out_dim
        self.leave = nnx.Linear(hidden[-1], outputs, use_bias=False, kernel_init=zeros, rngs=rngs)
        self.leave_context = nnx.Linear(
            context_dim, outputs, use_bias=False, kernel_init=zeros, rngs=rngs
        )
        self.bias = nnx.Param(jnp.zeros(outputs))

    def encode_context(self, context: Array) -> tuple[Array, Array]:
        """Compute the terms that a context adds to the first hidden layer and to the parameters.

        Args:
            context: Shape (*, context_dim).

        Returns:
            The two terms, shapes (hidden[0], *) and (P, out_dim, *).
        """
        hidden = jnp.moveaxis(self.context(context), -1, 0)
        out = jnp.moveaxis(self.leave_context(context), -1, 0)
        out += self.bias[...].reshape((-1,) + (1,) * (out.ndim - 1))
        return hidden, jnp.reshape(out, (self.params, self.out_dim, *out.shape[1:]))

    def __call__(self, x: Array, encoded: tuple[Array, Array], *, key: Key | None = None) -> Array:
        """Compute parameters (P, out_dim, *).

        Args:
            x: Inputs (in_dim, *).
            encoded: Context, as `encode_context` returns it; it need not have the axes of draws.
            key: Random key of dropout; None turns dropout off.
        """
        keys = split_key(key, len(self.layers))
        kernels, (hidden_bias, output_bias) = self._kernels(), encoded
        h = _multiply(kernels[0], x)
        h += _add_draw_axes(hidden_bias, h, 1)
        for kernel, k in zip(kernels[1:-1], keys[1:], strict=True):
            new = _multiply(kernel, dropout(k, nnx.silu(h), self.dropout))
            h = h + new if h.shape == new.shape else new
        last = nnx.silu(h)
        if len(self.layers) == 1:
            last = dropout(keys[0], last, self.dropout)
        out = _multiply(kernels[-1], last)
        out = jnp.reshape(out, (self.params, self.out_dim, *out.shape[1:]))
        return out + _add_draw_axes(output_bias, out, 2)

    def begin(self, shape: tuple[int, ...], dtype: Any) -> list[Array]:
        """Return the initial units of each hidden layer, (width, *shape): no input is known yet."""
        return [jnp.zeros((width, *shape), dtype) for width in self.dims[1:]]

    def advance(
        self, i: Array, x: Array, units: list[Array], encoded: tuple[Array, Array]
    ) -> tuple[list[Array], Array]:
        """Compute the hidden units that depend on input i, and the parameters of output i.

        An autoregressive bijector is inverted entry by entry. Each call of `advance` computes only
        the hidden units that depend on the new entry, so that all calls together cost one pass
        through the network. The network must be masked. Dropout is off.

        Args:
            i: Index of the input that has become known.
            x: Inputs (in_dim, *); those after i are zero.
            units: Units of each hidden layer, as `begin` or the last call returned them.
            encoded: Context, as `encode_context` returns it.

        Returns:
            The updated units, and parameters (P, 1, *) of output i.
        """
        kernels, (hidden_bias, output_bias) = self._kernels(), encoded
        inputs, updated_units, h = x, [], None
        for layer, (kernel, old_units) in enumerate(zip(kernels[:-1], units, strict=True)):
            width, width_before = self.dims[layer + 1], self.dims[layer]
            first_units, size = _unit_block(width, self.out_dim)
            start = jnp.asarray(first_units)[i]
            new = _multiply(jax.lax.dynamic_slice_in_dim(kernel, start, size, 1), inputs)
            if h is None:
                bias = jax.lax.dynamic_slice_in_dim(hidden_bias, start, size)
                new += _add_draw_axes(bias, new, 1)
            h = new if h is None or width != width_before else h + new
            inputs = jax.lax.dynamic_update_slice_in_dim(old_units, nnx.silu(h), start, 0)
            updated_units.append(inputs)
        kernel = jnp.reshape(kernels[-1], (-1, self.params, self.out_dim))
        kernel = jax.lax.dynamic_index_in_dim(kernel, i, axis=2, keepdims=False)
        out = _multiply(kernel, inputs)[:, None]
        bias = jax.lax.dynamic_index_in_dim(output_bias, i, 1)
        return updated_units, out + _add_draw_axes(bias, out, 2)

    def _kernels(self) -> list[Array]:
        """Return the masked kernels (inputs, outputs) of the hidden layers and of the output."""
        layers = [*self.layers, self.leave]
        return [n.kernel[...] * mask for n, mask in zip(layers, self._masks(), strict=True)]

    def _masks(self) -> list[Array | float]:
        """Return one mask for each layer, the output last, scaled so that variances stay one."""
        if not self.masked:
            return [1.0] * len(self.dims)
        degrees = [np.arange(self.out_dim)]
        degrees += [_unit_degrees(width, self.out_dim) for width in self.dims[1:]]
        masks = [a[:, None] <= b[None, :] for a, b in itertools.pairwise(degrees)]
        out = degrees[-1][:, None] <= np.arange(self.out_dim)[None, :]
        masks.append(np.tile(out, (1, self.params)))
        return [jnp.asarray(m / math.sqrt(max(m.mean(), 0.25)), jnp.float32) for m in masks]


def _unit_degrees(width: int, count: int) -> np.ndarray:
    """Return the degree of each unit of a layer: the largest input that the unit depends on.

    Degrees increase from 0 to count - 1, each for about the same number of units. If there are
    fewer units than inputs, some degrees do not occur, but the last one always does.
    """
    return count - 1 - (np.arange(width) * count // width)[::-1]


def _unit_block(width: int, count: int) -> tuple[np.ndarray, int]:
    """Return the first unit of each degree, and the number of units in a block.

    All blocks have the same size, as slices under `jit` require: the number of units of the most
    frequent degree. The block of a rarer degree also contains units of other degrees. The block of
    their own degree computes these units again, from all their inputs.
    """
    degrees = _unit_degrees(width, count)
    size = int(np.bincount(degrees, minlength=count).max())
    return np.minimum(np.searchsorted(degrees, np.arange(count)), width - size), size


def _multiply(kernel: Array, h: Array) -> Array:
    """Multiply units h (H, *) by a kernel (H, O); shape (O, *)."""
    if len(h) == 1:
        # XLA would fuse the product with one unit into the computation of the unit, and repeat that
        # computation for each output
        kernel, h = (jnp.concatenate([a, jnp.zeros_like(a)]) for a in (kernel, h))
    return jnp.tensordot(kernel, h, axes=((0,), (0,)))


def _add_draw_axes(value: Array, like: Array, first: int) -> Array:
    """Insert axes of length 1 for draws, between the `first` axes and the axes of contexts."""
    return jnp.expand_dims(value, tuple(range(first, first + like.ndim - value.ndim)))


class Conditioned(NamedTuple):
    """A conditioner together with encoded contexts.

    Attributes:
        network: The conditioner.
        encoded: Contexts, as `Conditioner.encode_context` returns them.
        key: Random key of dropout; None turns dropout off.
    """

    network: Conditioner
    encoded: tuple[Array, Array]
    key: Key | None = None

    def __call__(self, x: Array) -> Array:
        """Compute parameters (P, out_dim, *) from inputs (in_dim, *)."""
        return self.network(x, self.encoded, key=self.key)

    def begin(self, shape: tuple[int, ...], dtype: Any) -> list[Array]:
        """See `Conditioner.begin`."""
        return self.network.begin(shape, dtype)

    def advance(self, i: Array, x: Array, units: list[Array]) -> tuple[list[Array], Array]:
        """See `Conditioner.advance`."""
        return self.network.advance(i, x, units, self.encoded)
