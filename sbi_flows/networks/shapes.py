"""Explicit broadcasting. Implicit rank promotion hides mistakes, so the tests forbid it.

Public name: `align`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def align(value: Array, like: Array) -> Array:
    """Prepend axes of length 1 until `value` has as many axes as `like`."""
    return jnp.reshape(value, (1,) * (like.ndim - value.ndim) + value.shape)
