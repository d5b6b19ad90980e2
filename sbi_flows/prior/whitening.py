"""Affine map that gives the coordinates of `SupportMap` sites mean 0 and identity covariance.

Sites without an elementwise CDF are mapped to unconstrained coordinates, which have the scales and
the correlations of the prior. The affine map removes both; `whitening_of` computes it.

Public names: `Whitening`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sbi_flows.core.precision import FULL


class Whitening(NamedTuple):
    """Affine map u = loc + scale * (lower @ y) of s coordinates.

    Attributes:
        loc: Mean of the unconstrained coordinates u, shape (s,).
        scale: Standard deviations of u, positive, shape (s,).
        lower: Cholesky factor of the correlation matrix of u, shape (s, s); None for the identity.
    """

    loc: Any
    scale: Any
    lower: Any = None

    def forward(self, y: Array) -> Array:
        """Map whitened coordinates y (*, s) to unconstrained coordinates u (*, s)."""
        loc, scale = (_row(a, y) for a in (self.loc, self.scale))
        if self.lower is not None:
            lower = jnp.asarray(self.lower, y.dtype)
            y = jnp.matmul(y, lower.T, precision=FULL)
        return loc + scale * y

    def inverse(self, u: Array) -> Array:
        """Map unconstrained coordinates u (*, s) to whitened coordinates y (*, s)."""
        loc, scale = (_row(a, u) for a in (self.loc, self.scale))
        y = (u - loc) / scale
        if self.lower is None:
            return y
        columns = jnp.reshape(y, (-1, y.shape[-1])).T
        lower = jnp.asarray(self.lower, u.dtype)
        solved = jax.scipy.linalg.solve_triangular(lower, columns, lower=True)
        return jnp.reshape(solved.T, y.shape)

    def log_det(self) -> Array:
        """Return the log Jacobian determinant of `forward`, which is a constant."""
        total = jnp.sum(jnp.log(jnp.asarray(self.scale, float)))
        if self.lower is None:
            return total
        return total + jnp.sum(jnp.log(jnp.diagonal(jnp.asarray(self.lower, float))))


def _row(values: Any, like: Array) -> Array:
    """Reshape an array (s,) so that it broadcasts with `like` (*, s)."""
    return jnp.reshape(jnp.asarray(values, like.dtype), (1,) * (like.ndim - 1) + (-1,))
