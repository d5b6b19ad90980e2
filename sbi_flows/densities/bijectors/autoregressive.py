"""Masked autoregressive bijector, whose density takes one pass through the network.

Sources: Papamakarios et al. 2017, "Masked Autoregressive Flow" (arXiv:1705.07057); Durkan et al.
2019, "Neural Spline Flows" (arXiv:1906.04032), for splines in place of the affine transformer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import distrax
import jax
import jax.numpy as jnp
from jax import Array

Transformer = Callable[[Array], distrax.BijectorLike]
"""Function from parameters (P, D, *) to an elementwise bijector over values (D, *)."""


@runtime_checkable
class MaskedConditioner(Protocol):
    """Protocol of masked networks: parameters of entry i + 1 depend only on entries 0 to i."""

    def __call__(self, x: Array) -> Array:
        """Compute the parameters (P, D - 1, *) of entries 1 to D - 1 from entries (D - 1, *)."""
        ...

    def begin(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return the initial hidden units for a batch of this shape, before any entry is known."""
        ...

    def advance(self, i: Array, x: Array, units: Any) -> tuple[Any, Array]:
        """Update the hidden units with entry i, and compute the parameters of entry i + 1.

        Args:
            i: Index of the entry that has become known.
            x: Entries (D - 1, *); those after entry i are zero.
            units: Hidden units, as `begin` or the previous call returned them.

        Returns:
            The new hidden units, and the parameters (P, 1, *) of entry i + 1.
        """
        ...


class Autoregressive(distrax.Bijector):
    """Masked autoregressive bijector.

    The inverse, data to noise, takes one pass through the conditioner. The forward map, noise to
    data, makes the same computations one entry after the other.

    Args:
        first: Parameters of entry 0, shape (P, 1, *context). They depend on the context only, and
            all draws for one context share them.
        conditioner: Network that computes the parameters of entries 1 to D - 1 from the entries
            before each of them. None if D = 1.
        transformer: Function from parameters to the elementwise bijector from data to noise.
    """

    def __init__(
        self,
        first: Array,
        conditioner: MaskedConditioner | None,
        transformer: Transformer,
    ) -> None:
        """Store the parameters and the functions."""
        super().__init__(event_ndims_in=1)
        self._first, self._conditioner, self._transformer = first, conditioner, transformer

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Map data (*, D) to noise (*, D); the log determinant has shape (*)."""
        entries = jnp.moveaxis(y, -1, 0)
        first, rest = entries[:1], entries[1:]
        params = self._first_params(y)
        if self._conditioner is None:
            noise, log_det = self._transformer(params).forward_and_log_det(first)
            return jnp.moveaxis(noise, 0, -1), log_det[0]
        rest_params = self._conditioner(entries[:-1])
        if params.shape[2:] == rest_params.shape[2:]:
            transformer = self._transformer(jnp.concatenate([params, rest_params], axis=1))
            noise, log_det = transformer.forward_and_log_det(entries)
            return jnp.moveaxis(noise, 0, -1), jnp.sum(log_det, axis=0)
        # all draws for one context share the parameters of entry 0
        head, head_log_det = self._transformer(params).forward_and_log_det(first)
        tail, tail_log_det = self._transformer(rest_params).forward_and_log_det(rest)
        noise = jnp.moveaxis(jnp.concatenate([head, tail]), 0, -1)
        return noise, head_log_det[0] + jnp.sum(tail_log_det, axis=0)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Map noise (*, D) to data (*, D); the log determinant has shape (*)."""
        entries = jnp.moveaxis(x, -1, 0)
        first, rest = entries[:1], entries[1:]
        head, head_log_det = self._transformer(self._first_params(x)).inverse_and_log_det(first)
        conditioner = self._conditioner
        if conditioner is None:
            return jnp.moveaxis(head, 0, -1), head_log_det[0]

        def step(i: Array, carry: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
            data, total, units = carry
            units, params = conditioner.advance(i, data[:-1], units)
            noise = jax.lax.dynamic_slice_in_dim(rest, i, 1)
            entry, log_det = self._transformer(params).inverse_and_log_det(noise)
            data = jax.lax.dynamic_update_slice_in_dim(data, entry, i + 1, 0)
            return data, total + log_det[0], units

        # entries that are not known yet are zero
        data = jnp.concatenate([head, jnp.zeros_like(rest)])
        carry = data, head_log_det[0], conditioner.begin(head.shape[1:], x.dtype)
        data, log_det, _ = jax.lax.fori_loop(0, len(rest), step, carry)
        return jnp.moveaxis(data, 0, -1), log_det

    def _first_params(self, like: Array) -> Array:
        """Return the parameters of entry 0, with length-1 axes for the draws of `like`."""
        params, (count, _, *context) = self._first, self._first.shape
        return jnp.reshape(params, (count, 1, *(1,) * (like.ndim - 1 - len(context)), *context))
