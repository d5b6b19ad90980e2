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
    """Forward: noise to data, D - 1 passes. Inverse: data to noise, one pass.

    Args:
        first: Parameters of entry 0, shape (P, *context, 1). They depend on the context alone, so
            that many draws for one context share them.
        conditioner: Maps the data but its last entry (*, D - 1) to the parameters (P, *, D - 1)
            of entries 1 to D - 1, those of each from the entries before it alone; None if D = 1.
        transformer: Makes the elementwise bijector from data to noise.
    """

    def __init__(
        self,
        first: Array,
        conditioner: Callable[[Array], Array] | None,
        transformer: Transformer,
    ) -> None:
        """Hold the parameters and the functions."""
        super().__init__(event_ndims_in=1)
        self._first, self._conditioner, self._transformer = first, conditioner, transformer

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Data (*, D) to noise (*, D) with the log determinant (*)."""
        head, head_det = self._entry_0(y).forward_and_log_det(y[..., :1])
        if self._conditioner is None:
            return head, head_det[..., 0]
        rest = self._transformer(self._conditioner(y[..., :-1]))
        tail, tail_det = rest.forward_and_log_det(y[..., 1:])
        noise = jnp.concatenate([head, tail], axis=-1)
        return noise, head_det[..., 0] + jnp.sum(tail_det, axis=-1)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """Noise (*, D) to data (*, D) with the log determinant (*)."""
        head, head_det = self._entry_0(x).inverse_and_log_det(x[..., :1])
        conditioner = self._conditioner
        if conditioner is None:
            return head, head_det[..., 0]

        def step(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            # after pass i the entries up to i + 1 are final, since they saw only final ones
            before = jnp.concatenate([head, carry[0][..., :-1]], axis=-1)
            return self._transformer(conditioner(before)).inverse_and_log_det(x[..., 1:])

        zeros = jnp.zeros_like(x[..., 1:])
        tail, tail_det = jax.lax.fori_loop(0, x.shape[-1] - 1, step, (zeros, zeros))
        data = jnp.concatenate([head, tail], axis=-1)
        return data, head_det[..., 0] + jnp.sum(tail_det, axis=-1)

    def _entry_0(self, like: Array) -> distrax.BijectorLike:
        # the parameters' axis stays in front of the draws' axes
        params, (count, *context) = self._first, self._first.shape
        shape = (count, *(1,) * (like.ndim - len(context)), *context)
        return self._transformer(jnp.reshape(params, shape))
