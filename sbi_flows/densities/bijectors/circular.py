"""Rotation of circular entries, whose ends -sqrt 3 and sqrt 3 are the same point."""

from __future__ import annotations

import distrax
import jax.numpy as jnp
from jax import Array

from sbi_flows.networks.shapes import align
from sbi_flows.prior.circular import wrap


class Rotation(distrax.Bijector):
    """Bijector that adds an offset to each circular entry and wraps the sum.

    Args:
        offset: Offset of each entry, shape (*, d).
        circular: Which of the d entries are circular; the others do not change.
    """

    def __init__(self, offset: Array, circular: tuple[bool, ...]) -> None:
        """Store the offsets."""
        super().__init__(event_ndims_in=1, is_constant_jacobian=True)
        self._offset, self._circular = offset, circular

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Rotate entries (*, d) by the offset; the log determinant (*) is zero."""
        return self._rotated(x, 1.0)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Rotate entries (*, d) back; the log determinant (*) is zero."""
        return self._rotated(y, -1.0)

    def _rotated(self, x: Array, sign: float) -> tuple[Array, Array]:
        circular = align(jnp.asarray(self._circular), x)
        turned = wrap(x + sign * align(self._offset, x))
        return jnp.where(circular, turned, x), jnp.zeros(x.shape[:-1], x.dtype)
