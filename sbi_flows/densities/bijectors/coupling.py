"""Coupling bijector: one half transforms the other; both directions are one pass.

Source: Dinh et al. 2017, "Density estimation using Real NVP" (arXiv:1605.08803).
"""

from __future__ import annotations

from collections.abc import Callable

import distrax
import jax.numpy as jnp
from jax import Array

from sbi_flows.densities.bijectors.autoregressive import Transformer


class Coupling(distrax.Bijector):
    """Leaves the first `split` entries and transforms the others given them.

    Args:
        conditioner: Maps the first entries (split, *) to parameters (P, D - split, *).
        transformer: Makes the elementwise bijector from data to noise.
        split: Number of entries left as they are.
    """

    def __init__(
        self, conditioner: Callable[[Array], Array], transformer: Transformer, split: int
    ) -> None:
        """Hold the two functions."""
        super().__init__(event_ndims_in=1)
        self._conditioner, self._transformer, self._split = conditioner, transformer, split

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Data (*, D) to noise (*, D) with the log determinant (*)."""
        return self._map(y, "forward_and_log_det")

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Noise (*, D) to data (*, D) with the log determinant (*)."""
        return self._map(x, "inverse_and_log_det")

    def _map(self, value: Array, method: str) -> tuple[Array, Array]:
        entries = jnp.moveaxis(value, -1, 0)
        kept, changed = entries[: self._split], entries[self._split :]
        transformer = self._transformer(self._conditioner(kept))
        out, log_det = getattr(transformer, method)(changed)
        joined = jnp.moveaxis(jnp.concatenate([kept, out]), 0, -1)
        return joined, jnp.sum(log_det, axis=0)
