"""Masked autoregressive bijector: the density is one parallel pass.

Sources: Papamakarios et al. 2017, "Masked Autoregressive Flow" (arXiv:1705.07057); Durkan et al.
2019 for splines in place of the affine transformer.
"""

from __future__ import annotations

from collections.abc import Callable

import distrax
import jax
import jax.numpy as jnp
from jax import Array

Transformer = Callable[[Array], distrax.BijectorLike]
"""Makes an elementwise bijector from parameters of shape (P, *, D)."""


class Autoregressive(distrax.Bijector):
    """Forward: noise to data, D passes. Inverse: data to noise, one pass.

    Args:
        conditioner: Maps data (*, D) to parameters (P, *, D), those of entry i from entries
            before i alone.
        transformer: Makes the elementwise bijector from data to noise.
        dim: D.
    """

    def __init__(
        self, conditioner: Callable[[Array], Array], transformer: Transformer, dim: int
    ) -> None:
        """Hold the two functions."""
        super().__init__(event_ndims_in=1)
        self._conditioner, self._transformer, self._dim = conditioner, transformer, dim

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Data (*, D) to noise (*, D) with the log determinant (*)."""
        noise, log_det = self._transformer(self._conditioner(y)).forward_and_log_det(y)
        return noise, jnp.sum(log_det, axis=-1)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Noise (*, D) to data (*, D) with the log determinant (*)."""

        def step(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            # after pass i the first i + 1 entries are final, since they saw only final ones
            return self._transformer(self._conditioner(carry[0])).inverse_and_log_det(x)

        data, log_det = jax.lax.fori_loop(0, self._dim, step, (jnp.zeros_like(x), x))
        return data, jnp.sum(log_det, axis=-1)
