"""The prior's bijection from standard coordinates to its support, behind the distrax interface."""

from __future__ import annotations

import distrax
import jax.numpy as jnp
from jax import Array

from sbi_flows.prior.prior import Prior


class Support(distrax.Bijector):
    """Forward: standard coordinates to parameters inside the prior's support.

    Args:
        prior: The prior.
    """

    def __init__(self, prior: Prior) -> None:
        """Hold the prior."""
        super().__init__(event_ndims_in=1)
        self._prior = prior

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Standard coordinates (*, d) to parameters (*, D) with the log determinant (*)."""
        y = self._prior.from_standard(x)
        return y, self._prior.standard_log_det(x, y)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Parameters (*, D) to (*, d); the log determinant is -inf outside the support."""
        inside = self._prior.contains(y)
        safe = jnp.where(inside[..., None], y, self._prior.center(y.shape[:-1]))
        x = self._prior.to_standard(safe)
        return x, jnp.where(inside, -self._prior.standard_log_det(x, safe), -jnp.inf)
