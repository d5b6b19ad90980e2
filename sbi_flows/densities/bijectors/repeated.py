"""One kind of layer applied many times with different arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import distrax
import jax
import jax.numpy as jnp
from jax import Array

UNROLLED = 6
"""Most layers that are written out one after another."""


class Repeated(distrax.Bijector):
    """Composition of `make(arrays[0])`, `make(arrays[1])`, ..., the first one nearest the data.

    Args:
        make: Builds one layer's bijectors (noise to data, data side first) from its arrays.
        arrays: The layers' arrays, stacked on a leading axis.
        written_out: In the inverse, write up to `UNROLLED` layers out one after another in place of
            a loop, which reads and writes each array that a layer stores for the derivative once
            more, a sixth of the time of a step of the training. Others take less time to compile.
    """

    def __init__(
        self,
        make: Callable[[Any], list[distrax.Bijector]],
        arrays: Any,
        *,
        written_out: bool = False,
    ) -> None:
        """Hold the function and the arrays."""
        super().__init__(event_ndims_in=1)
        self._make, self._arrays = make, arrays
        layers = len(jax.tree.leaves(arrays)[0])
        self._unroll = min(layers, UNROLLED) if written_out else 1

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Noise (*, D) to data (*, D) with the log determinant (*)."""

        def step(carry: tuple[Array, Array], arrays: Any) -> tuple[tuple[Array, Array], None]:
            value, total = carry
            for bijector in reversed(self._make(arrays)):
                value, log_det = bijector.forward_and_log_det(value)
                total = total + log_det
            return (value, total), None

        carry = (x, jnp.zeros(x.shape[:-1], x.dtype))
        return jax.lax.scan(step, carry, self._arrays, reverse=True)[0]

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Data (*, D) to noise (*, D) with the log determinant (*)."""

        def step(carry: tuple[Array, Array], arrays: Any) -> tuple[tuple[Array, Array], None]:
            value, total = carry
            for bijector in self._make(arrays):
                value, log_det = bijector.inverse_and_log_det(value)
                total = total + log_det
            return (value, total), None

        carry = (y, jnp.zeros(y.shape[:-1], y.dtype))
        return jax.lax.scan(step, carry, self._arrays, unroll=self._unroll)[0]
