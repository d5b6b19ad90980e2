"""Coupling bijector: it transforms a part of the entries with parameters computed from the rest.

Both directions take one pass through the conditioner.

Source: Dinh et al. 2017, "Density estimation using Real NVP" (arXiv:1605.08803).
"""

from __future__ import annotations

from collections.abc import Callable

import distrax
import jax.numpy as jnp
from jax import Array

from sbi_flows.densities.bijectors.autoregressive import Transformer


class Coupling(distrax.Bijector):
    """Bijector that leaves the first `split` entries unchanged and transforms the others.

    Args:
        conditioner: Function from the first entries (split, *) to parameters (P, D - split, *).
        transformer: Function from parameters to the elementwise bijector from data to noise.
        split: Number of unchanged entries.
    """

    def __init__(
        self, conditioner: Callable[[Array], Array], transformer: Transformer, split: int
    ) -> None:
        """Store the conditioner and the transformer."""
        super().__init__(event_ndims_in=1)
        self._conditioner, self._transformer, self._split = conditioner, transformer, split

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Map data (*, D) to noise (*, D); the log determinant has shape (*)."""
        fixed, changed = self._halves(y)
        transformer = self._transformer(self._conditioner(fixed))
        noise, log_det = transformer.forward_and_log_det(changed)
        return _join(fixed, noise), jnp.sum(log_det, axis=0)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Map noise (*, D) to data (*, D); the log determinant has shape (*)."""
        fixed, changed = self._halves(x)
        transformer = self._transformer(self._conditioner(fixed))
        data, log_det = transformer.inverse_and_log_det(changed)
        return _join(fixed, data), jnp.sum(log_det, axis=0)

    def _halves(self, value: Array) -> tuple[Array, Array]:
        entries = jnp.moveaxis(value, -1, 0)
        return entries[: self._split], entries[self._split :]


def _join(fixed: Array, changed: Array) -> Array:
    return jnp.moveaxis(jnp.concatenate([fixed, changed]), 0, -1)
