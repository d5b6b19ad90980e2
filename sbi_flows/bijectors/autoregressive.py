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
"""Makes an elementwise bijector over values (D, *) from parameters (P, D, *)."""


class Autoregressive(distrax.Bijector):
    """Forward: noise to data, D - 1 passes. Inverse: data to noise, one pass.

    Args:
        first: Parameters of entry 0, shape (P, 1, *context). They depend on the context alone, so
            that many draws for one context share them.
        conditioner: Maps the data but its last entry (*, D - 1) to the parameters (P, D - 1, *)
            of entries 1 to D - 1, those of each from the entries before it alone; called with
            `entry=i`, to those of the i-th of them, (P, 1, *). None if D = 1.
        transformer: Makes the elementwise bijector from data to noise.
    """

    def __init__(
        self,
        first: Array,
        conditioner: Callable[..., Array] | None,
        transformer: Transformer,
    ) -> None:
        """Hold the parameters and the functions."""
        super().__init__(event_ndims_in=1)
        self._first, self._conditioner, self._transformer = first, conditioner, transformer

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Data (*, D) to noise (*, D) with the log determinant (*)."""
        first, rest = _first_and_rest(y)
        head, head_det = self._entry_0(y).forward_and_log_det(first)
        if self._conditioner is None:
            return jnp.moveaxis(head, 0, -1), head_det[0]
        transformer = self._transformer(self._conditioner(y[..., :-1]))
        tail, tail_det = transformer.forward_and_log_det(rest)
        return _joined(head, tail), head_det[0] + jnp.sum(tail_det, axis=0)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Noise (*, D) to data (*, D) with the log determinant (*)."""
        first, rest = _first_and_rest(x)
        head, head_det = self._entry_0(x).inverse_and_log_det(first)
        conditioner = self._conditioner
        if conditioner is None:
            return jnp.moveaxis(head, 0, -1), head_det[0]

        def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            tail, total = carry
            # entries that are not there yet are zero: the mask keeps them out
            transformer = self._transformer(conditioner(_joined(head, tail[:-1]), entry=i))
            noise = jax.lax.dynamic_slice_in_dim(rest, i, 1)
            entry, log_det = transformer.inverse_and_log_det(noise)
            tail = jax.lax.dynamic_update_slice_in_dim(tail, entry, i, 0)
            return tail, total + log_det[0]

        zeros = jnp.zeros_like(rest)
        tail, log_det = jax.lax.fori_loop(0, len(rest), step, (zeros, head_det[0]))
        return _joined(head, tail), log_det

    def _entry_0(self, like: Array) -> distrax.BijectorLike:
        # the draws' axes come before the contexts'
        params, (count, _, *context) = self._first, self._first.shape
        shape = (count, 1, *(1,) * (like.ndim - 1 - len(context)), *context)
        return self._transformer(jnp.reshape(params, shape))


def _first_and_rest(value: Array) -> tuple[Array, Array]:
    """Entry 0 and the others of a value (*, D), as (1, *) and (D - 1, *)."""
    entries = jnp.moveaxis(value, -1, 0)
    return entries[:1], entries[1:]


def _joined(first: Array, rest: Array) -> Array:
    """Entries (1, *) and (D - 1, *) as a value (*, D)."""
    return jnp.moveaxis(jnp.concatenate([first, rest]), 0, -1)
