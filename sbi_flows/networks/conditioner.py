"""Networks that turn earlier entries and a context into a bijector's parameters.

They take entries `(D, *)` and give `(P, D, *)`: the rows of a batch stay contiguous in memory from
the first layer to the last, so that what a spline does with the parameters vectorises over them and
nothing is transposed on the way, which on a CPU would take longer than all products. They give
zeros at the start, so that every bijector starts at the identity. The context enters the first
hidden layer and the output through maps of its own: what depends on the context alone is computed
once an observation, however many draws are made for it.

Source: Germain et al. 2015, "MADE" (arXiv:1502.03509), for the masks.
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
        out_dim: Number of entries to make parameters for.
        params: P, number of parameters an entry.
        context_dim: Length of the context.
        hidden: Width of each hidden layer; equal widths are joined by residual connections.
        dropout: Fraction of the units of all hidden layers but the last that are dropped in
            training; of a single hidden layer's too.
        masked: Parameters of entry i depend on inputs 0 to i alone (needs in_dim == out_dim).
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

    def given(self, context: Array) -> tuple[Array, Array]:
        """What a context (*, context_dim) adds to the first hidden layer and to the parameters.

        Shapes (hidden[0], *) and (P, out_dim, *).
        """
        hidden = jnp.moveaxis(self.context(context), -1, 0)
        out = jnp.moveaxis(self.leave_context(context), -1, 0)
        out += self.bias[...].reshape((-1,) + (1,) * (out.ndim - 1))
        return hidden, jnp.reshape(out, (self.params, self.out_dim, *out.shape[1:]))

    def __call__(self, x: Array, given: tuple[Array, Array], *, key: Key | None = None) -> Array:
        """Map inputs (in_dim, *) and what `given` says to parameters (P, out_dim, *)."""
        keys = split_key(key, len(self.layers))
        kernels, (hidden, shared) = self._kernels(), given
        h = _times(kernels[0], x)
        h += _spaced(hidden, h, 1)
        for kernel, k in zip(kernels[1:-1], keys[1:], strict=True):
            new = _times(kernel, dropout(k, nnx.silu(h), self.dropout))
            h = h + new if h.shape == new.shape else new
        last = nnx.silu(h)
        if len(self.layers) == 1:
            last = dropout(keys[0], last, self.dropout)
        out = _times(kernels[-1], last)
        out = jnp.reshape(out, (self.params, self.out_dim, *out.shape[1:]))
        return out + _spaced(shared, out, 2)

    def begin(self, shape: tuple[int, ...], dtype: Any) -> list[Array]:
        """The units of each hidden layer, (width, *shape), before any input is known."""
        return [jnp.zeros((width, *shape), dtype) for width in self.dims[1:]]

    def advance(
        self, i: Array, x: Array, units: list[Array], given: tuple[Array, Array]
    ) -> tuple[list[Array], Array]:
        """Compute the units that input i was missing for, and the parameters of entry i.

        A masked network's alone, and without dropout: going on from entry to entry costs a single
        pass in all.

        Args:
            i: Number of the input that has become known.
            x: Inputs (in_dim, *); those after i are zero.
            units: Of each hidden layer, as they were at i - 1.
            given: As for a call.

        Returns:
            The units, and parameters (P, 1, *).
        """
        kernels, (hidden, shared) = self._kernels(), given
        before, held, h = x, [], None
        for layer, (kernel, known) in enumerate(zip(kernels[:-1], units, strict=True)):
            width, wider = self.dims[layer + 1], self.dims[layer]
            first, size = _block(width, self.out_dim)
            start = jnp.asarray(first)[i]
            new = _times(jax.lax.dynamic_slice_in_dim(kernel, start, size, 1), before)
            if h is None:
                new += _spaced(jax.lax.dynamic_slice_in_dim(hidden, start, size), new, 1)
            h = new if h is None or width != wider else h + new
            before = jax.lax.dynamic_update_slice_in_dim(known, nnx.silu(h), start, 0)
            held.append(before)
        kernel = jnp.reshape(kernels[-1], (-1, self.params, self.out_dim))
        kernel = jax.lax.dynamic_index_in_dim(kernel, i, axis=2, keepdims=False)
        out = _times(kernel, before)[:, None]
        return held, out + _spaced(jax.lax.dynamic_index_in_dim(shared, i, 1), out, 2)

    def _kernels(self) -> list[Array]:
        """Kernels (inputs, outputs) of the hidden layers and of the output, masked."""
        layers = [*self.layers, self.leave]
        return [n.kernel[...] * mask for n, mask in zip(layers, self._masks(), strict=True)]

    def _masks(self) -> list[Array | float]:
        """One mask a layer, output last; scaled up to keep the layers' variance."""
        if not self.masked:
            return [1.0] * len(self.dims)
        degrees = [np.arange(self.out_dim)]
        degrees += [_spread(width, self.out_dim) for width in self.dims[1:]]
        masks = [a[:, None] <= b[None, :] for a, b in itertools.pairwise(degrees)]
        out = degrees[-1][:, None] <= np.arange(self.out_dim)[None, :]
        masks.append(np.tile(out, (1, self.params)))
        return [jnp.asarray(m / math.sqrt(max(m.mean(), 0.25)), jnp.float32) for m in masks]


def _spread(width: int, count: int) -> np.ndarray:
    """Degrees of the units of a layer, from 0 to count - 1 in even shares; always the last one."""
    return count - 1 - (np.arange(width) * count // width)[::-1]


def _block(width: int, count: int) -> tuple[np.ndarray, int]:
    """First unit of each degree, and how many units from there on hold all of any degree.

    What a block holds beyond its degree is computed too early, and again in its turn, or again.
    """
    degrees = _spread(width, count)
    size = int(np.bincount(degrees, minlength=count).max())
    return np.minimum(np.searchsorted(degrees, np.arange(count)), width - size), size


def _times(kernel: Array, h: Array) -> Array:
    """Multiply units h (H, *) by a kernel (H, O); shape (O, *)."""
    if len(h) == 1:
        # the product with a single unit would be fused with all that the unit is made of, and
        # compute that anew for each of the outputs
        kernel, h = (jnp.concatenate([a, jnp.zeros_like(a)]) for a in (kernel, h))
    return jnp.tensordot(kernel, h, axes=((0,), (0,)))


def _spaced(value: Array, like: Array, first: int) -> Array:
    """Axes of length 1 behind the first ones: the draws' axes, which come before the contexts'."""
    return jnp.expand_dims(value, tuple(range(first, first + like.ndim - value.ndim)))


class Conditioned(NamedTuple):
    """A conditioner with what contexts give it.

    Attributes:
        network: The conditioner.
        given: What `Conditioner.given` said of the contexts.
        key: Key of the dropout; none without.
    """

    network: Conditioner
    given: tuple[Array, Array]
    key: Key | None = None

    def __call__(self, x: Array) -> Array:
        """Inputs (in_dim, *) to parameters (P, out_dim, *)."""
        return self.network(x, self.given, key=self.key)

    def begin(self, shape: tuple[int, ...], dtype: Any) -> list[Array]:
        """See `Conditioner.begin`."""
        return self.network.begin(shape, dtype)

    def advance(self, i: Array, x: Array, units: list[Array]) -> tuple[list[Array], Array]:
        """See `Conditioner.advance`."""
        return self.network.advance(i, x, units, self.given)
