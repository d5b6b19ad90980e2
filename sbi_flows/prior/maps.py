"""Bijections between the values of a prior's sites and standard coordinates.

If the entries of a site are independent and have a CDF, they have mean 0 and variance 1 in standard
coordinates. A normal, an elementwise transform of a normal, and a distribution on R or on a half
line become standard normal. A distribution on an interval becomes uniform on (-sqrt 3, sqrt 3). The
interval of a circular parameter is mapped linearly to (-sqrt 3, sqrt 3). All other sites are mapped
by a transform of their support, and then whitened (see `whitening`).

Public names: `HALF_WIDTH`, `SiteMap`, `NormalMap`, `CdfMap`, `IntervalMap`, `SupportMap`,
`MapKind`, `map_kind`, `standard_shape`, `elementwise`, `positive`.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import ndtr, ndtri
from jax.scipy.stats import norm
from numpyro.distributions.transforms import AbsTransform

from sbi_flows.prior.circular import HALF_WIDTH, CircularMap, is_circular
from sbi_flows.prior.sites import Site
from sbi_flows.prior.supports import clip_to_bounds, transform_of
from sbi_flows.prior.tails import tails_of

_PROBABILITIES = (1e-3, 0.02, 0.3, 0.7, 0.98, 0.999)
"""Probabilities p at which `map_kind` tests that cdf(icdf(p)) equals p."""


@runtime_checkable
class SiteMap(Protocol):
    """Map between standard coordinates `(*, *standard_shape)` and a site's values `(*, *event)`."""

    def forward(self, y: Array) -> Array:
        """Map standard coordinates to the support."""
        ...

    def inverse(self, theta: Array) -> Array:
        """Map the support to standard coordinates."""
        ...

    def log_det(self, y: Array, theta: Array) -> Array:
        """Compute the log absolute Jacobian determinant of `forward` at y; theta is forward(y).

        The result has the batch axes (*) and may have further axes, over which the caller sums.
        """
        ...


class NormalMap:
    """Map for a normal distribution or an elementwise bijection of one; exact in the tails."""

    def __init__(self, site: Site) -> None:
        """Store the normal distribution, and the transforms from R to the support."""
        base = elementwise(site.distribution)
        assert base is not None
        normal, self._transforms = _split_transforms(base)
        assert isinstance(normal, dist.Normal)
        self._normal, self._support = normal, site.support

    def forward(self, y: Array) -> Array:
        """Map R to the support."""
        return clip_to_bounds(self._chain(y)[-1], self._support)

    def inverse(self, theta: Array) -> Array:
        """Map the support to R."""
        for transform in reversed(self._transforms):
            theta = transform._inverse(theta)
        return (theta - self._normal.loc) / self._normal.scale

    def log_det(self, y: Array, theta: Array) -> Array:
        """Sum the log derivatives of the transforms."""
        points = self._chain(y)
        total = jnp.broadcast_to(jnp.log(self._normal.scale), y.shape)
        for transform, a, b in zip(self._transforms, points[:-1], points[1:], strict=True):
            total = total + transform.log_abs_det_jacobian(a, b)
        return total

    def _chain(self, y: Array) -> list[Array]:
        points = [self._normal.loc + self._normal.scale * y]
        for transform in self._transforms:
            points.append(transform(points[-1]))
        return points


class CdfMap:
    """Map between a standard normal coordinate and an elementwise distribution, through the CDF.

    The support is R or a half line. If `tails_of` knows the distribution, both tails have full
    relative precision. Otherwise the CDF is rounded near 0 and 1, so that in single precision the
    standard coordinate is limited to about 5.2 in absolute value. Beyond this limit
    the density is still right, because `log_det` evaluates the prior's density at theta.
    """

    def __init__(self, site: Site) -> None:
        """Store the distribution of a single entry, and the support."""
        base = elementwise(site.distribution)
        assert base is not None
        self._base, self._tails, self._support = base, tails_of(base), site.support

    def forward(self, y: Array) -> Array:
        """Map R to the support."""
        if self._tails is None:
            theta = self._base.icdf(_inside(ndtr(y)))
        else:
            lower = self._tails.icdf(positive(ndtr(jnp.minimum(y, 0.0))))
            upper = self._tails.isf(positive(ndtr(-jnp.maximum(y, 0.0))))
            theta = jnp.where(y < 0, lower, upper)
        return clip_to_bounds(theta, self._support)

    def inverse(self, theta: Array) -> Array:
        """Map the support to R."""
        if self._tails is None:
            return ndtri(_inside(self._base.cdf(theta)))
        below, above = self._tails.cdf(theta), self._tails.sf(theta)
        near = ndtri(positive(jnp.minimum(jnp.minimum(below, above), 0.5)))
        return jnp.where(below < above, near, -near)

    def log_det(self, y: Array, theta: Array) -> Array:
        """Compute the standard normal log density at y minus the log prior density at theta."""
        return norm.logpdf(y) - self._base.log_prob(theta)


class IntervalMap:
    """Map between a uniform coordinate and a distribution on an interval, through the CDF."""

    def __init__(self, site: Site) -> None:
        """Store the distribution of a single entry, and the support."""
        base = elementwise(site.distribution)
        assert base is not None
        self._base, self._support = base, site.support

    def forward(self, y: Array) -> Array:
        """Map (-sqrt 3, sqrt 3) to the support."""
        theta = self._base.icdf(_inside(0.5 * (y / HALF_WIDTH + 1.0)))
        return clip_to_bounds(theta, self._support)

    def inverse(self, theta: Array) -> Array:
        """Map the support to (-sqrt 3, sqrt 3)."""
        return HALF_WIDTH * (2.0 * _inside(self._base.cdf(theta)) - 1.0)

    def log_det(self, y: Array, theta: Array) -> Array:
        """Compute the log density of y, which is uniform, minus the log prior density at theta."""
        return -math.log(2 * HALF_WIDTH) - self._base.log_prob(theta)


class SupportMap:
    """Map from unconstrained coordinates to the support by `transform_of(support)`."""

    def __init__(self, site: Site) -> None:
        """Build the transform of the support."""
        self._support, self._transform = site.support, transform_of(site.support)

    def forward(self, y: Array) -> Array:
        """Map R^d to the support."""
        return clip_to_bounds(self._transform(y), self._support)

    def inverse(self, theta: Array) -> Array:
        """Map the support to R^d."""
        return self._transform._inverse(theta)

    def log_det(self, y: Array, theta: Array) -> Array:
        """Compute the transform's log absolute Jacobian determinant."""
        return self._transform.log_abs_det_jacobian(y, theta)


MapKind: TypeAlias = (
    type[NormalMap] | type[CdfMap] | type[IntervalMap] | type[CircularMap] | type[SupportMap]
)
"""Class of a site's map. `map_kind` chooses it once from concrete values; then it is static."""


def map_kind(site: Site, *, is_dependent: bool, has_circular_maps: bool = True) -> MapKind:
    """Choose the class of map for a site.

    Args:
        site: The site; its parameters must be concrete numbers, not traced.
        is_dependent: Whether the site's distribution depends on other sites. Then only its support
            is known.
        has_circular_maps: Whether circular parameters get a `CircularMap`; False for priors of
            files that were saved before this map existed.
    """
    base = elementwise(site.distribution)
    if has_circular_maps and base is not None and is_circular(base):
        return CircularMap
    if base is None or is_dependent:
        return SupportMap
    if isinstance(_split_transforms(base)[0], dist.Normal):
        return NormalMap
    if tails_of(base) is None and not _has_cdf(site):
        return SupportMap
    return IntervalMap if _is_interval(base.support) else CdfMap


def standard_shape(kind: MapKind, site: Site) -> tuple[int, ...]:
    """Return the shape of a site's standard coordinates."""
    if kind is SupportMap:
        return tuple(transform_of(site.support).inverse_shape(site.shape))
    return site.shape


def elementwise(distribution: dist.Distribution) -> dist.Distribution | None:
    """Return the distribution of a single entry; None if the entries are not independent."""
    while isinstance(distribution, dist.Independent | dist.ExpandedDistribution):
        distribution = distribution.base_dist
    return None if distribution.event_shape else distribution


def _split_transforms(base: dist.Distribution) -> tuple[dist.Distribution, tuple[Any, ...]]:
    """Split a distribution into its base distribution and the elementwise bijections on it."""
    if isinstance(base, dist.TransformedDistribution):
        if all(_is_elementwise_bijection(t) for t in base.transforms):
            return base.base_dist, tuple(base.transforms)
    return base, ()


def _is_elementwise_bijection(transform: Any) -> bool:
    return transform.domain.event_dim == 0 and not isinstance(transform, AbsTransform)


def _has_cdf(site: Site) -> bool:
    """Return whether a site has a CDF and a quantile function that invert each other."""
    try:
        with jax.ensure_compile_time_eval():
            return bool(_cdf_inverts(site))
    except (NotImplementedError, AttributeError, TypeError):
        return False


@jax.jit
def _cdf_inverts(site: Site) -> Array:
    base = elementwise(site.distribution)
    assert base is not None
    p = jnp.reshape(jnp.asarray(_PROBABILITIES), (-1,) + (1,) * len(base.batch_shape))
    p = jnp.broadcast_to(p, (len(_PROBABILITIES), *base.batch_shape))
    error = jnp.abs(base.cdf(base.icdf(p)) - p)
    return jnp.all(error < 0.02 * jnp.minimum(p, 1.0 - p))


def _is_interval(support: Any) -> bool:
    return hasattr(support, "lower_bound") and hasattr(support, "upper_bound")


def positive(u: Array) -> Array:
    """Replace tiny probabilities by a positive number that compiled programs do not round to 0."""
    return jnp.maximum(u, 8 * jnp.finfo(u.dtype).tiny)


def _inside(u: Array) -> Array:
    """Clip a probability to stay above 0 and below 1, where quantiles would be infinite."""
    tiny = jnp.finfo(u.dtype).eps
    return jnp.clip(u, tiny, 1.0 - tiny)
