"""Linear bijectors: LU-factored matrices and permutations."""

from __future__ import annotations

from collections.abc import Sequence

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class LULinear(distrax.Bijector):
    """y = L U x with a unit lower and a positive upper triangular factor.

    Args:
        lower: Entries of L below the diagonal (the others are ignored), shape (D, D).
        upper: Entries of U above the diagonal, shape (D, D).
        log_diagonal: Logarithm of U's diagonal, shape (D,).

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions, arXiv:1807.03039, section 3.2.
    """

    def __init__(self, lower: Array, upper: Array, log_diagonal: Array) -> None:
        """Assemble both factors."""
        super().__init__(event_ndims_in=1, is_constant_jacobian=True)
        eye = jnp.eye(len(log_diagonal), dtype=log_diagonal.dtype)
        self._lower = jnp.tril(lower, -1) + eye
        self._upper = jnp.triu(upper, 1) + jnp.diag(jnp.exp(log_diagonal))
        self._log_det = jnp.sum(log_diagonal)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """X (*, D) to y (*, D) with the log determinant (*)."""
        y = x @ (self._lower @ self._upper).T
        return y, jnp.broadcast_to(self._log_det, x.shape[:-1])

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Y (*, D) to x (*, D) with the log determinant (*)."""
        # one D x D inverse and a matrix product; a triangular solve a row is far slower on a CPU
        eye = jnp.eye(len(self._lower), dtype=self._lower.dtype)
        half = jax.scipy.linalg.solve_triangular(self._lower, eye, lower=True, unit_diagonal=True)
        inverse = jax.scipy.linalg.solve_triangular(self._upper, half, lower=False)
        return y @ inverse.T, jnp.broadcast_to(-self._log_det, y.shape[:-1])


class Permutation(distrax.Bijector):
    """y[..., i] = x[..., order[i]] with a fixed order."""

    def __init__(self, order: Sequence[int]) -> None:
        """Check the order; a static tuple, so that it can be part of a compiled program.

        Raises:
            ValueError: The order is not a permutation of 0 .. D - 1.
        """
        super().__init__(event_ndims_in=1, is_constant_jacobian=True)
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"order: expected a permutation of 0..{len(order) - 1}, got {order}")
        self._order = np.asarray(order)
        self._inverse = np.argsort(self._order)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Permute the last axis."""
        return x[..., self._order], jnp.zeros(x.shape[:-1], x.dtype)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Undo the permutation."""
        return y[..., self._inverse], jnp.zeros(y.shape[:-1], y.dtype)
