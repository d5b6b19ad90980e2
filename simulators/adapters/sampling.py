"""Exact samplers that the reference posteriors are made of.

Public names: `rejection`, `truncated_normal`, `log_interval_mass`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.special import log_ndtr, ndtr, ndtri

from sbi_flows.core.typing import Key


def rejection(
    key: Key, propose: Callable[[Key], tuple[Array, Array]], n: int, max_rounds: int = 10_000
) -> Array:
    """Collect the first n draws that are accepted.

    Args:
        key: Random key.
        propose: `key -> (draws (m, D), accepted (m,))`, the same m in every call.
        n: Number of draws to collect.
        max_rounds: Bound on the number of calls of `propose`.

    Returns:
        Draws of shape (n, D), independent of each other; the last rows are NaN if the rounds did
        not suffice.

    Example:
        >>> import jax
        >>> def propose(key):
        ...     z = jax.random.normal(key, (100, 1))
        ...     return z, z[:, 0] > 1
        >>> bool((rejection(jax.random.key(0), propose, 50) > 1).all())
        True
    """
    rows, _ = jax.eval_shape(propose, key)

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        _, count, rounds = state
        return (count < n) & (rounds < max_rounds)

    def again(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        draws, count, rounds = state
        proposed, accepted = propose(jax.random.fold_in(key, rounds))
        place = count + jnp.cumsum(accepted) - 1
        draws = draws.at[jnp.where(accepted, place, n)].set(proposed, mode="drop")
        return draws, count + jnp.sum(accepted), rounds + 1

    start = (jnp.full((n, *rows.shape[1:]), jnp.nan, rows.dtype), jnp.asarray(0), jnp.asarray(0))
    return lax.while_loop(unfinished, again, start)[0]


def truncated_normal(key: Key, loc: Array, scale: float, low: float, high: float, n: int) -> Array:
    """Normal variables conditioned to an interval, by the inverse CDF.

    Args:
        key: Random key.
        loc: Location of each entry, shape (D,).
        scale: Standard deviation.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of draws.

    Returns:
        Draws of shape (n, D), all in [low, high]; NaN in entries whose interval lies so far in the
        tail (13 standard deviations in float32) that its probability is zero in floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> z = truncated_normal(jax.random.key(0), jnp.array([5.0]), 1.0, -1.0, 1.0, 1000)
        >>> bool((z <= 1).all()), bool(z.mean() > 0.7)
        (True, True)
    """
    lower, upper, sign = _lower_tail((low - loc) / scale, (high - loc) / scale)
    a, b = ndtr(lower)[None], ndtr(upper)[None]
    u = jax.random.uniform(key, (n, *loc.shape), loc.dtype)
    z = jnp.where(b > 0, ndtri(a + u * (b - a)), jnp.nan)
    # the clip mends rounding (u = 0 would give -inf as well); it leaves NaN as it is
    return jnp.clip(loc[None] + scale * sign[None] * z, low, high)


def log_interval_mass(loc: Array, scale: float, low: float, high: float) -> Array:
    """Log probability that N(loc, scale^2) gives to [low, high]; finite far in the tails.

    Example:
        >>> import jax.numpy as jnp
        >>> print(jnp.round(jnp.exp(log_interval_mass(jnp.array([0.0]), 1.0, -1.0, 1.0)), 4))
        [0.6827]
    """
    lower, upper, _ = _lower_tail((low - loc) / scale, (high - loc) / scale)
    log_a, log_b = log_ndtr(lower), log_ndtr(upper)
    return log_b + jnp.log1p(-jnp.exp(log_a - log_b))


def _lower_tail(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Mirror intervals of the upper half, where CDFs round to 1, to the lower half."""
    upper_half = a + b > 0
    lower = jnp.where(upper_half, -b, a)
    upper = jnp.where(upper_half, -a, b)
    return lower, upper, jnp.where(upper_half, -1.0, 1.0).astype(a.dtype)
