"""Networks that turn earlier entries and a context into a bijector's parameters.

Both give the parameters' axis first, `(P, *, D)`, as the spline wants it, and zeros at the start,
so that every bijector starts at the identity. The context enters each hidden layer and the output
through maps of its own: what depends on the context alone is computed once an observation, however
many draws are made for it.

Source: Germain et al. 2015, "MADE" (arXiv:1502.03509), for the masks.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.bijectors.linear import align
from sbi_flows.networks.mlp import dropout, split_key
from sbi_flows.typing import Key


class Conditioner(nnx.Module):
    """Residual network over (inputs, context), masked where the outputs must be autoregressive.

    Args:
        in_dim: Number of inputs.
        out_dim: Number of entries to make parameters for.
        params: P, number of parameters an entry.
        context_dim: Length of the context.
        hidden: Width of each hidden layer; equal widths are joined by residual connections.
        dropout: Fraction of hidden units dropped in training.
        masked: Parameters of entry i depend on inputs before i alone (needs in_dim == out_dim).
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
        self.layers = nnx.List([
            nnx.Linear(a, b, rngs=rngs, use_bias=False) for a, b in zip(self.dims, hidden)
        ])
        self.contexts = nnx.List([nnx.Linear(context_dim, b, rngs=rngs) for b in hidden])
        zeros = nnx.initializers.zeros_init()
        outputs = params * out_dim
        self.leave = nnx.Linear(
            hidden[-1], outputs, use_bias=False, kernel_init=zeros, rngs=rngs
        )
        self.leave_context = nnx.Linear(context_dim, outputs, kernel_init=zeros, rngs=rngs)

    def __call__(self, x: Array, context: Array, *, key: Key | None = None) -> Array:
        """Map inputs (*, in_dim) and context (*, context_dim) to parameters (P, *, out_dim)."""
        keys = split_key(key, len(self.layers))
        masks = self._masks()
        h = x
        for i, (layer, from_context) in enumerate(zip(self.layers, self.contexts, strict=True)):
            entering = h if i == 0 else dropout(keys[i], nnx.silu(h), self.dropout)
            new = entering @ (layer.kernel[...] * masks[i])
            new += align(from_context(context), new)
            h = h + new if h.shape == new.shape and i else new
        out = nnx.silu(h) @ (self.leave.kernel[...] * masks[-1])
        out += align(self.leave_context(context), out)
        out = jnp.reshape(out, (*out.shape[:-1], self.params, self.out_dim))
        return jnp.moveaxis(out, -2, 0)

    def _masks(self) -> list[Array | float]:
        """One mask a layer, output last; scaled up to keep the layers' variance."""
        if not self.masked:
            return [1.0] * len(self.dims)
        degrees = [np.arange(1, self.out_dim + 1)]
        degrees += [np.sort(np.arange(width) % self.out_dim) for width in self.dims[1:]]
        masks = [a[:, None] <= b[None, :] for a, b in zip(degrees, degrees[1:])]
        out = degrees[-1][:, None] <= np.arange(self.out_dim)[None, :]
        masks.append(np.tile(out, (1, self.params)))
        return [jnp.asarray(m / math.sqrt(max(m.mean(), 0.25)), jnp.float32) for m in masks]
