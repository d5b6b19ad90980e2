"""Observations with missing entries, which are NaN.

Public names: `keep_first`, `gaussian_posterior`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import cho_solve, solve_triangular

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key


def keep_first(x: Array, count: int) -> Array:
    """Replace all but the first `count` rows of an observation by NaN.

    Args:
        x: Observation, shape (trials, *event).
        count: Number of rows to keep, from 0 to the number of rows.

    Returns:
        The observation, in the shape of x.

    Raises:
        ValueError: `count` is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> print(keep_first(jnp.array([1.0, 2.0, 3.0]), 2))
        [ 1.  2. nan]
    """
    if not 0 <= count <= len(x):
        raise ValueError(f"trials: expected 0 to {len(x)}, got {count}")
    return x.at[count:].set(jnp.nan)


@full_precision
def gaussian_posterior(key: Key, design: Array, scale: Array, x: Array, n: int) -> Array:
    """Draw from the posterior of a linear Gaussian model given the entries of x that are not NaN.

    The prior is theta ~ N(0, I), and the entries of x are independent given theta:
    x_m ~ N((H theta)_m, scale_m^2). The posterior precision is I + H' S^-1 H, where the rows of
    missing entries are left out of H, and S is the diagonal matrix of the variances.

    Args:
        key: Random key.
        design: Matrix H, shape (M, D).
        scale: Standard deviation of the noise of each entry, shape (M,).
        x: Observation, shape (M,); a missing entry is NaN.
        n: Number of draws.

    Returns:
        Draws, shape (n, D). They are draws of the prior if all entries are missing.

    References:
        Bishop 2006, Pattern Recognition and Machine Learning, equations 2.116 and 2.117.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, scale = jnp.array([2.0, jnp.nan]), jnp.array([0.1, 0.1])
        >>> draws = gaussian_posterior(jax.random.key(0), jnp.eye(2), scale, x, 1000)
        >>> print(draws.std(axis=0).round(1))
        [0.1 1. ]
    """
    is_missing = jnp.isnan(x)
    white = jnp.where(is_missing[:, None], 0.0, design / scale[:, None])
    target = jnp.where(is_missing, 0.0, x / scale)
    dim = design.shape[1]
    factor = jnp.linalg.cholesky(jnp.eye(dim) + white.T @ white)
    mean = cho_solve((factor, True), white.T @ target)
    noise = jax.random.normal(key, (dim, n))
    return mean[None] + solve_triangular(factor.T, noise, lower=False).T
