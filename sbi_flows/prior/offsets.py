"""Split a narrow distribution far from zero into an offset and a distribution near zero.

Single precision cannot represent the values of, for example, a uniform prior of a Julian date. The
distribution of the value minus an offset replaces the distribution of such a site. The offset is
computed in double precision and is static data of the prior (`Layout.offset`). JAX computes with
values minus the offset. The methods for users subtract and add the offset on the host.

Public names: `split_offset`, `split_offsets`, `TRUNCATED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpyro.distributions as dist
from numpyro.distributions.truncated import (
    LeftTruncatedDistribution,
    RightTruncatedDistribution,
    TwoSidedTruncatedDistribution,
)

from sbi_flows.core.doubles import HALF_ULP, MAX_ROUNDING, is_single_precision
from sbi_flows.core.pytrees import is_traced

_LOCATION_SCALE = (
    *(dist.Normal, dist.Cauchy, dist.Laplace, dist.Logistic, dist.Gumbel, dist.StudentT),
    dist.SoftLaplace,
)
"""Distributions that are translated by changing `loc`."""

TRUNCATED = {
    LeftTruncatedDistribution: ("low",),
    RightTruncatedDistribution: ("high",),
    TwoSidedTruncatedDistribution: ("low", "high"),
}
"""Names of the bounds of truncated distributions."""


def split_offset(
    distribution: dist.Distribution,
) -> tuple[dist.Distribution, np.ndarray | None]:
    """Split a distribution into a distribution near zero and an offset in double precision.

    Args:
        distribution: The distribution of a site.

    Returns:
        Distribution of the value minus the offset, and the offset, which has the shape of a value.
        If single precision resolves the width of the distribution, or if its class is not
        supported, the same distribution and None.

    Example:
        >>> near_zero, offset = split_offset(dist.Uniform(2459000.0, 2459001.0))
        >>> near_zero.low, near_zero.high, offset
        (-0.5, 0.5, array(2459000.5))
    """
    if is_traced(distribution) or not is_single_precision():
        return distribution, None
    try:
        with np.errstate(all="ignore"):
            pair = _location_and_width(distribution)
    except (TypeError, ValueError):  # arguments that are not numbers are refused later
        return distribution, None
    if pair is None or not all(np.all(np.isfinite(part)) for part in pair):
        return distribution, None
    location, width = pair
    if not np.any(HALF_ULP * np.abs(location) > MAX_ROUNDING * width):
        return distribution, None
    shape = (*distribution.batch_shape, *distribution.event_shape)
    return _minus_location(distribution, location), np.broadcast_to(location, shape).astype(float)


def split_offsets(
    sites: Mapping[str, dist.Distribution],
) -> tuple[dict[str, dist.Distribution], tuple[float, ...]]:
    """Apply `split_offset` to all sites of a prior.

    Returns:
        Distributions of the values minus their offsets, by name; and the offset of each of the D
        entries of the flat vector, an empty tuple if no site has an offset.
    """
    parts = {name: split_offset(distribution) for name, distribution in sites.items()}
    distributions = {name: distribution for name, (distribution, _) in parts.items()}
    if all(offset is None for _, offset in parts.values()):
        return distributions, ()
    flat: list[float] = []
    for distribution, offset in parts.values():
        shape = (*distribution.batch_shape, *distribution.event_shape)
        flat += np.broadcast_to(0.0 if offset is None else offset, shape).ravel().tolist()
    return distributions, tuple(flat)


def _location_and_width(distribution: dist.Distribution) -> tuple[np.ndarray, np.ndarray] | None:
    """Return location and width in float64; None if the distribution's class is not supported."""
    if isinstance(distribution, dist.Independent | dist.ExpandedDistribution):
        return _location_and_width(distribution.base_dist)
    if type(distribution) is dist.Uniform:
        low, high = (_double(v) for v in (distribution.low, distribution.high))
        return np.asarray(0.5 * (low + high)), np.asarray(high - low)
    if type(distribution) in _LOCATION_SCALE:
        return _double(distribution.loc), _double(distribution.scale)
    if type(distribution) in TRUNCATED and type(distribution.base_dist) in _LOCATION_SCALE:
        base = _location_and_width(distribution.base_dist)
        assert base is not None
        bounds = [_double(getattr(distribution, n)) for n in TRUNCATED[type(distribution)]]
        # the mass may lie in a tail, far from the location of the base distribution
        if len(bounds) < 2:
            return base
        low, high = bounds
        width = np.minimum(base[1], high - low)
        return np.asarray(np.clip(base[0], low, high)), np.asarray(width)
    return None


def _minus_location(distribution: Any, location: np.ndarray) -> dist.Distribution:
    """Return the distribution of the value minus `location`."""
    if isinstance(distribution, dist.Independent):
        inner = _minus_location(distribution.base_dist, location)
        return dist.Independent(inner, distribution.reinterpreted_batch_ndims)
    if isinstance(distribution, dist.ExpandedDistribution):
        return _minus_location(distribution.base_dist, location).expand(distribution.batch_shape)
    if type(distribution) is dist.Uniform:
        return dist.Uniform(*(_minus(v, location) for v in (distribution.low, distribution.high)))
    if type(distribution) in _LOCATION_SCALE:
        arguments = {n: getattr(distribution, n) for n in type(distribution).arg_constraints}
        return type(distribution)(**{**arguments, "loc": _minus(distribution.loc, location)})
    inner = _minus_location(distribution.base_dist, location)
    names = TRUNCATED[type(distribution)]
    bounds = {n: _minus(getattr(distribution, n), location) for n in names}
    return type(distribution)(inner, **bounds)


def _double(value: Any) -> np.ndarray:
    return np.asarray(value, np.float64)


def _minus(value: Any, location: np.ndarray) -> Any:
    difference = _double(value) - location
    return float(difference) if difference.ndim == 0 else difference
