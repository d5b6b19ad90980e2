"""Linear bijector between the layers of a flow: a reversal and two triangular factors.

Source: Kingma & Dhariwal 2018, "Glow" (arXiv:1807.03039), section 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import distrax
import jax
import jax.numpy as jnp
from jax import Array

from sbi_flows.core.precision import FULL


class LU(NamedTuple):
    """Triangular factors of a matrix, their product and its log determinant.

    Attributes:
        lower: Unit lower triangular L, shape (D, D).
        upper: Upper triangular U with a positive diagonal, shape (D, D).
        product: L U with its rows reversed, shape (D, D).
        log_det: Log determinant of U, shape ().
    """

    lower: Array
    upper: Array
    product: Array
    log_det: Array


def lu(lower: Array, upper: Array, log_diagonal: Array) -> LU:
    """Assemble the triangular factors from unconstrained arrays.

    Args:
        lower: Entries of L below the diagonal, shape (D, D); the others are ignored.
        upper: Entries of U above the diagonal, shape (D, D); the others are ignored.
        log_diagonal: Logarithm of the diagonal of U, shape (D,).
    """
    lower = jnp.tril(lower, -1) + jnp.eye(len(log_diagonal), dtype=log_diagonal.dtype)
    upper = jnp.triu(upper, 1) + jnp.diag(jnp.exp(log_diagonal))
    product = jnp.matmul(lower, upper, precision=FULL)
    return LU(lower, upper, jnp.flip(product, axis=0), jnp.sum(log_diagonal))


class LULinear(distrax.Bijector):
    """Linear bijector y = P L U x, where P reverses the order of the entries.

    Args:
        factors: Triangular factors, as `lu` returns them.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions, arXiv:1807.03039, section 3.2.
    """

    def __init__(self, factors: LU) -> None:
        """Store the factors."""
        super().__init__(event_ndims_in=1, is_constant_jacobian=True)
        self._factors = factors

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Map x (*, D) to y (*, D); the log determinant has shape (*)."""
        factors = self._factors
        y = jnp.matmul(x, factors.product.T, precision=FULL)
        return y, jnp.broadcast_to(factors.log_det, x.shape[:-1])

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Map y (*, D) to x (*, D); the log determinant has shape (*)."""
        # Inverting one D x D matrix and multiplying is far faster on a CPU than a solve per row.
        lower, upper, _, log_det = self._factors
        eye = jnp.eye(len(lower), dtype=lower.dtype)
        half = jax.scipy.linalg.solve_triangular(lower, eye, lower=True, unit_diagonal=True)
        inverse = jax.scipy.linalg.solve_triangular(upper, half, lower=False)
        x = jnp.matmul(y, jnp.flip(inverse.T, axis=0), precision=FULL)
        return x, jnp.broadcast_to(-log_det, y.shape[:-1])
