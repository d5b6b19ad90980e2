"""Parts of a flow with circular entries: conditioner and flags of its layers.

Public names: `CircularConditioned`, `layer_flags`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.networks.conditioner import Conditioned
from sbi_flows.prior.circular import HALF_WIDTH


class CircularConditioned(NamedTuple):
    """Conditioner that reads cosine and sine of circular entries, and adds a flag to parameters.

    Attributes:
        conditioned: The conditioner with its contexts, of 2 n inputs.
        inputs: Which of the n entries that it reads are circular: 1 or 0, shape (n,).
        outputs: Which of the entries whose parameters it computes are circular, shape (m,).
    """

    conditioned: Conditioned
    inputs: Array
    outputs: Array

    def __call__(self, x: Array) -> Array:
        """Compute parameters (P + 1, m, *) from entries (n, *)."""
        return with_flags(self.conditioned(self._read(x)), self.outputs)

    def begin(self, shape: tuple[int, ...], dtype: Any) -> list[Array]:
        """See `Conditioner.begin`."""
        return self.conditioned.begin(shape, dtype)

    def advance(self, i: Array, x: Array, units: list[Array]) -> tuple[list[Array], Array]:
        """See `Conditioner.advance`."""
        units, params = self.conditioned.advance(i, self._read(x), units)
        return units, with_flags(params, jax.lax.dynamic_slice_in_dim(self.outputs, i, 1))

    def _read(self, x: Array) -> Array:
        """Return the inputs (2 n, *) of the network: cosines and sines, or entries and zeros."""
        is_circular = self.inputs.reshape((-1,) + (1,) * (x.ndim - 1)) > 0.5
        angle = x * (math.pi / HALF_WIDTH)
        cos = jnp.where(is_circular, jnp.cos(angle), x)
        return jnp.concatenate([cos, jnp.where(is_circular, jnp.sin(angle), 0.0)])


def with_flags(params: Array, flags: Array) -> Array:
    """Append the flags (D,) of entries as the last of their parameters (P, D, *)."""
    row = flags.astype(params.dtype).reshape((1, -1) + (1,) * (params.ndim - 2))
    return jnp.concatenate([params, jnp.broadcast_to(row, (1, *params.shape[1:]))])


def layer_flags(circular: tuple[bool, ...], depth: int) -> np.ndarray:
    """Return which entries are circular in each layer, 1 or 0, shape (depth + 1, D).

    The linear map after each layer reverses the entries. The last row is for the noise.
    """
    flags = np.asarray(circular, np.float32)
    return np.stack([flags if i % 2 == 0 else flags[::-1] for i in range(depth + 1)])
