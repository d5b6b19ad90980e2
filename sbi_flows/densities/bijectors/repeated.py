"""Composition of layers that have the same structure but different arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import distrax
import jax
import jax.numpy as jnp
from jax import Array

MAX_UNROLLED_LAYERS = 6
"""Maximum number of layers that are unrolled in one iteration of the loop over layers."""


class Repeated(distrax.Bijector):
    """Composition of the layers `make(arrays[0])`, `make(arrays[1])`, ..., from data to noise.

    Args:
        make: Function from the arrays of one layer to its bijectors, which map noise to data; the
            bijector nearest the data comes first.
        arrays: Arrays of all layers, stacked on a leading axis.
        unroll: Whether the inverse unrolls the loop over up to `MAX_UNROLLED_LAYERS` layers. This
            saves about a sixth of the time of a training step, because a loop copies all arrays
            that a layer stores for the derivative. Without unrolling, compilation is faster.
    """

    def __init__(
        self,
        make: Callable[[Any], list[distrax.Bijector]],
        arrays: Any,
        *,
        unroll: bool = False,
    ) -> None:
        """Store the function and the arrays."""
        super().__init__(event_ndims_in=1)
        self._make, self._arrays = make, arrays
        layers = len(jax.tree.leaves(arrays)[0])
        self._unroll = min(layers, MAX_UNROLLED_LAYERS) if unroll else 1

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Map noise (*, D) to data (*, D); the log determinant has shape (*)."""

        def step(carry: tuple[Array, Array], arrays: Any) -> tuple[tuple[Array, Array], None]:
            value, total = carry
            for bijector in reversed(self._make(arrays)):
                value, log_det = bijector.forward_and_log_det(value)
                total = total + log_det
            return (value, total), None

        carry = (x, jnp.zeros(x.shape[:-1], x.dtype))
        return jax.lax.scan(step, carry, self._arrays, reverse=True)[0]

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Map data (*, D) to noise (*, D); the log determinant has shape (*)."""

        def step(carry: tuple[Array, Array], arrays: Any) -> tuple[tuple[Array, Array], None]:
            value, total = carry
            for bijector in self._make(arrays):
                value, log_det = bijector.inverse_and_log_det(value)
                total = total + log_det
            return (value, total), None

        carry = (y, jnp.zeros(y.shape[:-1], y.dtype))
        return jax.lax.scan(step, carry, self._arrays, unroll=self._unroll)[0]
