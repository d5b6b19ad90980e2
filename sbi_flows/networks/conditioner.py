"""Networks that turn earlier entries and a context into a bijector's parameters.

They give `(P, D, *)`: the rows of a batch stay contiguous in memory, so that what a spline does
with the parameters vectorises over them. They give zeros at the start, so that every bijector
starts at the identity. The context enters the first hidden layer and the output through maps of its
own: what depends on the context alone is computed once an observation, however many draws are made
for it.

Source: Germain et al. 2015, "MADE" (arXiv:1502.03509), for the masks.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.networks.mlp import dropout, split_key
from sbi_flows.networks.shapes import align
from sbi_flows.typing import Key


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

    def __call__(
        self, x: Array, context: Array, *, key: Key | None = None, entry: Array | None = None
    ) -> Array:
        """Map inputs (*, in_dim) and context (*, context_dim) to parameters (P, out_dim, *).

        With the number of an `entry`, to those of this one alone, (P, 1, *).
        """
        keys = split_key(key, len(self.layers))
        masks = self._masks()
        h = x @ (self.layers[0].kernel[...] * masks[0])
        h += align(self.context(context), h)
        for layer, mask, k in zip(self.layers[1:], masks[1:-1], keys[1:], strict=True):
            new = dropout(k, nnx.silu(h), self.dropout) @ (layer.kernel[...] * mask)
            h = h + new if h.shape == new.shape else new
        last = nnx.silu(h)
        if len(self.layers) == 1:
            last = dropout(keys[0], last, self.dropout)
        columns = partial(self._columns, entry=entry)
        out = _outputs_first(columns(self.leave.kernel[...] * masks[-1]), last)
        shared = _outputs_first(columns(self.leave_context.kernel[...]), context)
        shared += columns(self.bias[...][None]).reshape((-1,) + (1,) * (context.ndim - 1))
        out += jnp.expand_dims(shared, tuple(range(1, 1 + last.ndim - context.ndim)))
        entries = self.out_dim if entry is None else 1
        return jnp.reshape(out, (self.params, entries, *out.shape[1:]))

    def _columns(self, kernel: Array, entry: Array | None) -> Array:
        """Columns of a kernel (H, P D) that one entry needs, (H, P); all of them for None."""
        if entry is None:
            return kernel
        columns = jnp.reshape(kernel, (-1, self.params, self.out_dim))
        return jax.lax.dynamic_index_in_dim(columns, entry, axis=2, keepdims=False)

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


def _outputs_first(kernel: Array, h: Array) -> Array:
    """Multiply h (*, H) by a kernel (H, O); shape (O, *)."""
    return jnp.tensordot(kernel, h, axes=((0,), (h.ndim - 1,)))
