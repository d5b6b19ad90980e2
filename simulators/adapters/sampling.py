"""Exact samplers used by the reference posteriors.

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
    """Draw by rejection sampling.

    Args:
        key: Random key.
        propose: Function of a key that returns proposals, shape (m, D), and which of them are
            accepted, shape (m,). m is the same in every call.
        n: Number of draws.
        max_rounds: Maximum number of calls of `propose`.

    Returns:
        Independent draws, shape (n, D). If `max_rounds` is reached, the last rows are NaN.

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

    def one_round(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        draws, count, rounds = state
        proposed, accepted = propose(jax.random.fold_in(key, rounds))
        place = count + jnp.cumsum(accepted) - 1
        draws = draws.at[jnp.where(accepted, place, n)].set(proposed, mode="drop")
        return draws, count + jnp.sum(accepted), rounds + 1

    start = (jnp.full((n, *rows.shape[1:]), jnp.nan, rows.dtype), jnp.asarray(0), jnp.asarray(0))
    return lax.while_loop(unfinished, one_round, start)[0]


def truncated_normal(key: Key, loc: Array, scale: float, low: float, high: float, n: int) -> Array:
    """Draw from normal distributions truncated to an interval, by the inverse CDF.

    Args:
        key: Random key.
        loc: Mean of each entry before truncation, shape (D,).
        scale: Standard deviation before truncation.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of draws.

    Returns:
        Draws in [low, high], shape (n, D). An entry is NaN if its interval lies so far in the tail
        (13 standard deviations in float32) that its probability is zero in floating point.

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
    # The clip corrects rounding errors, and -inf at u = 0. It leaves NaN unchanged.
    return jnp.clip(loc[None] + scale * sign[None] * z, low, high)


def log_interval_mass(loc: Array, scale: float, low: float, high: float) -> Array:
    """Compute the log probability of [low, high] under N(loc, scale^2), finite far in the tails.

    Example:
        >>> import jax.numpy as jnp
        >>> print(jnp.round(jnp.exp(log_interval_mass(jnp.array([0.0]), 1.0, -1.0, 1.0)), 4))
        [0.6827]
    """
    lower, upper, _ = _lower_tail((low - loc) / scale, (high - loc) / scale)
    log_a, log_b = log_ndtr(lower), log_ndtr(upper)
    return log_b + jnp.log1p(-jnp.exp(log_a - log_b))


def _lower_tail(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Mirror intervals above the mean to below the mean, because CDFs above it round to 1.

    Returns the lower ends, the upper ends, and the sign (-1 for mirrored intervals).
    """
    upper_half = a + b > 0
    lower = jnp.where(upper_half, -b, a)
    upper = jnp.where(upper_half, -a, b)
    return lower, upper, jnp.where(upper_half, -1.0, 1.0).astype(a.dtype)
