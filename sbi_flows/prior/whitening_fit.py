"""Compute the affine map that whitens the coordinates of `SupportMap` sites.

For a multivariate normal, the map follows from its Cholesky factor. For other distributions it is
estimated from draws of the prior, which are made with a fixed key.

Public names: `whitening_of`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

from sbi_flows.core.precision import full_precision
from sbi_flows.prior.checks import base_of
from sbi_flows.prior.maps import SupportMap
from sbi_flows.prior.site_prior import SitePrior
from sbi_flows.prior.whitening import Whitening

MAX_JOINT = 512
"""Maximum number of coordinates whose correlations are estimated. With more, only means and scales
are estimated."""

MAX_EXACT = 2048
"""Maximum number of coordinates for which a matrix is stored."""

_CLIP = 6.0
"""Maximum distance from the median, in robust standard deviations; larger values are clipped."""

_SHRINKAGE = 1e-5
"""Weight of the identity in a correlation matrix, which makes it positive definite."""


def whitening_of(prior: SitePrior, theta: Array) -> Whitening | None:
    """Compute the affine map of a prior's `SupportMap` sites.

    Args:
        prior: The prior, with concrete parameters and without an affine map.
        theta: Draws of the prior, shape (n, D).

    Returns:
        The map; None if no site needs one.
    """
    layouts = zip(prior.names, prior.site_kinds, prior.layout.standard_shapes, strict=True)
    sites = [(name, shape) for name, kind, shape in layouts if kind is SupportMap]
    if not sites:
        return None
    sizes = [math.prod(shape) for _, shape in sites]
    exact = [
        None if prior.is_model else _normal_block(prior.distributions[name], shape)
        for name, shape in sites
    ]
    if all(block is not None for block in exact):
        return _joined([block for block in exact if block is not None])
    parts = _estimated(prior, theta, sum(sizes) <= MAX_JOINT)
    loc, scale, correlations = (None if a is None else np.asarray(a, np.float64) for a in parts)
    if prior.is_model:
        sizes, exact = [sum(sizes)], [None]
    ends = np.cumsum(sizes)
    blocks = [
        _estimated_block(loc, scale, correlations, slice(end - size, end), len(theta))
        if block is None
        else block
        for block, size, end in zip(exact, sizes, ends, strict=True)
    ]
    return _joined(blocks)


def _normal_block(distribution: dist.Distribution, shape: tuple[int, ...]) -> Whitening | None:
    """Return the exact map of a multivariate normal; None for other distributions."""
    base = base_of(distribution)
    if type(base) is not dist.MultivariateNormal:
        return None
    loc = np.broadcast_to(np.asarray(base.loc, np.float64), shape)
    factor = np.broadcast_to(np.asarray(base.scale_tril, np.float64), (*shape, shape[-1]))
    scale = np.linalg.norm(factor, axis=-1)
    factors = (factor / scale[..., None]).reshape(-1, shape[-1], shape[-1])
    lower = _block_diagonal(list(factors)) if loc.size <= MAX_EXACT else None
    return Whitening(loc.reshape(-1), scale.reshape(-1), lower)


def _estimated_block(
    loc: Any, scale: Any, correlations: np.ndarray | None, part: slice, count: int
) -> Whitening:
    """Return the map of the coordinates `part`, given estimates from `count` draws."""
    lower = None
    if correlations is not None:
        block = correlations[part, part]
        eye = np.eye(len(block))
        # correlations as small as the error of the estimate are set to zero
        if np.max(np.abs(block - eye), initial=0.0) > 5.0 / math.sqrt(count):
            lower = np.linalg.cholesky((1.0 - _SHRINKAGE) * block + _SHRINKAGE * eye)
            lower /= np.linalg.norm(lower, axis=1, keepdims=True)
    return Whitening(loc[part], scale[part], lower)


def _joined(blocks: list[Whitening]) -> Whitening:
    """Join the maps of independent blocks of coordinates."""
    loc, scale = (np.concatenate([getattr(b, n) for b in blocks]) for n in ("loc", "scale"))
    if len(loc) > MAX_EXACT or all(block.lower is None for block in blocks):
        return Whitening(loc, scale)
    factors = [np.eye(len(b.loc)) if b.lower is None else np.asarray(b.lower) for b in blocks]
    return Whitening(loc, scale, _block_diagonal(factors))


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    matrix = np.zeros((sum(map(len, blocks)),) * 2)
    start = 0
    for block in blocks:
        matrix[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return matrix


@partial(jax.jit, static_argnums=2)
@full_precision
def _estimated(prior: SitePrior, theta: Array, is_joint: bool) -> tuple[Array, Array, Array | None]:
    """Estimate mean, scale and correlations of unconstrained coordinates from prior draws.

    Values further than `_CLIP` robust standard deviations from the median are clipped, so that the
    estimates are finite for every prior. Values are scaled before they are squared, so that squares
    do not overflow.
    """
    u = prior.unchecked_to_standard(theta)[:, prior.support_columns]
    u = jnp.where(jnp.isfinite(u), u, jnp.nan)
    low, below, median, above, high = jnp.nanquantile(
        u, jnp.asarray([0.005, 0.16, 0.5, 0.84, 0.995], u.dtype), axis=0
    )
    spread = 0.5 * (above - below)
    spread = jnp.where(spread > 0.0, spread, (high - low) / 5.0)
    spread = jnp.where(spread > 0.0, spread, 1.0)
    median = jnp.where(jnp.isfinite(median), median, 0.0)
    v = jnp.clip(jnp.nan_to_num((u - median[None]) / spread[None]), -_CLIP, _CLIP)
    mean, sd = jnp.mean(v, axis=0), jnp.std(v, axis=0)
    sd = jnp.where(sd > 0.0, sd, 1.0)
    z = (v - mean[None]) / sd[None]
    correlations = z.T @ z / len(z) if is_joint else None
    return median + spread * mean, spread * sd, correlations
