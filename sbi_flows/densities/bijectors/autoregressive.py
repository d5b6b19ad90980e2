"""Masked autoregressive bijector: the density is one parallel pass.

Sources: Papamakarios et al. 2017, "Masked Autoregressive Flow" (arXiv:1705.07057); Durkan et al.
2019 for splines in place of the affine transformer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import distrax
import jax
import jax.numpy as jnp
from jax import Array

Transformer = Callable[[Array], distrax.BijectorLike]
"""Makes an elementwise bijector over values (D, *) from parameters (P, D, *)."""


@runtime_checkable
class Masked(Protocol):
    """A network whose parameters of an entry depend on the inputs up to its own place alone."""

    def __call__(self, x: Array) -> Array:
        """Inputs (D - 1, *) to the parameters (P, D - 1, *) of all entries."""
        ...

    def begin(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """What it holds for inputs (*shape) of which none is known."""
        ...

    def advance(self, i: Array, x: Array, units: Any) -> tuple[Any, Array]:
        """Once input i is known, later ones of x (D - 1, *) zero: parameters (P, 1, *) of entry i.

        With what it then holds.
        """
        ...


class Autoregressive(distrax.Bijector):
    """Inverse: data to noise, one pass. Forward: noise to data, the same pass entry by entry.

    Args:
        first: Parameters of entry 0, shape (P, 1, *context). They depend on the context alone, so
            that many draws for one context share them.
        conditioner: Makes the parameters of entries 1 to D - 1 from the data but its last entry,
            those of each from the entries before it alone. None if D = 1.
        transformer: Makes the elementwise bijector from data to noise.
    """

    def __init__(
        self,
        first: Array,
        conditioner: Masked | None,
        transformer: Transformer,
    ) -> None:
        """Hold the parameters and the functions."""
        super().__init__(event_ndims_in=1)
        self._first, self._conditioner, self._transformer = first, conditioner, transformer

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Data (*, D) to noise (*, D) with the log determinant (*)."""
        entries = jnp.moveaxis(y, -1, 0)
        first, rest = entries[:1], entries[1:]
        params = self._params_0(y)
        if self._conditioner is None:
            head, head_det = self._transformer(params).forward_and_log_det(first)
            return jnp.moveaxis(head, 0, -1), head_det[0]
        others = self._conditioner(entries[:-1])
        if params.shape[2:] == others.shape[2:]:
            transformer = self._transformer(jnp.concatenate([params, others], axis=1))
            noise, log_det = transformer.forward_and_log_det(entries)
            return jnp.moveaxis(noise, 0, -1), jnp.sum(log_det, axis=0)
        # many draws share the parameters of entry 0
        head, head_det = self._transformer(params).forward_and_log_det(first)
        tail, tail_det = self._transformer(others).forward_and_log_det(rest)
        noise = jnp.moveaxis(jnp.concatenate([head, tail]), 0, -1)
        return noise, head_det[0] + jnp.sum(tail_det, axis=0)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Noise (*, D) to data (*, D) with the log determinant (*)."""
        entries = jnp.moveaxis(x, -1, 0)
        first, rest = entries[:1], entries[1:]
        head, head_det = self._transformer(self._params_0(x)).inverse_and_log_det(first)
        conditioner = self._conditioner
        if conditioner is None:
            return jnp.moveaxis(head, 0, -1), head_det[0]

        def step(i: Array, carry: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
            data, total, units = carry
            # entries that are not there yet are zero
            units, params = conditioner.advance(i, data[:-1], units)
            noise = jax.lax.dynamic_slice_in_dim(rest, i, 1)
            entry, log_det = self._transformer(params).inverse_and_log_det(noise)
            data = jax.lax.dynamic_update_slice_in_dim(data, entry, i + 1, 0)
            return data, total + log_det[0], units

        data = jnp.concatenate([head, jnp.zeros_like(rest)])
        carry = data, head_det[0], conditioner.begin(head.shape[1:], x.dtype)
        data, log_det, _ = jax.lax.fori_loop(0, len(rest), step, carry)
        return jnp.moveaxis(data, 0, -1), log_det

    def _params_0(self, like: Array) -> Array:
        # the draws' axes come before the contexts'
        params, (count, _, *context) = self._first, self._first.shape
        return jnp.reshape(params, (count, 1, *(1,) * (like.ndim - 1 - len(context)), *context))
