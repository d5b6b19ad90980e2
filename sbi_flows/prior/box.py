"""Prior restricted to a box in its standard coordinates.

Public names: `BoxPrior`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array
from jax.core import Tracer
from jax.scipy.special import ndtr, ndtri
from jax.scipy.stats import norm

from sbi_flows.core.typing import Key
from sbi_flows.prior.base import Layout, Prior, labels
from sbi_flows.prior.maps import HALF_WIDTH, CdfMap, IntervalMap, NormalMap, positive
from sbi_flows.prior.site_prior import SitePrior

_EDGE = 1e-6
"""Minimum distance of coordinates from each side of the box, as a fraction of its width."""

_SLACK = 1e-4
"""Tolerance of `contains` for rounding errors, as a fraction of the box's width."""

_FURTHEST = 37.0
"""Standard deviations beyond which the probability of a normal tail counts as zero."""


class _Bounds(NamedTuple):
    """Constants computed from the bounds in double precision, each of shape (d,).

    Attributes:
        low: Lower bounds, -inf where the prior is not cut.
        high: Upper bounds, inf where the prior is not cut.
        first: Lower bounds of uniform coordinates, 0 elsewhere.
        width: Widths of uniform coordinates, 1 elsewhere.
        sign: Factor for normal coordinates, 1 or -1. -1 mirrors a box in the upper tail to the
            lower tail, where the CDF has full relative precision.
        near: Lower end of the box in normal coordinates, after multiplication by `sign`.
        far: Upper end of the box in normal coordinates, after multiplication by `sign`.
        log_mass: Log probability of the box in each coordinate, 0 where the prior is not cut.
        outer_low: Lower bounds minus a tolerance for rounding errors.
        outer_high: Upper bounds plus a tolerance for rounding errors.
    """

    low: Any
    high: Any
    first: Any
    width: Any
    sign: Any
    near: Any
    far: Any
    log_mass: Any
    outer_low: Any
    outer_high: Any


class _Static(NamedTuple):
    """Static part of a `BoxPrior`.

    Attributes:
        layout: Names and shapes of the parameters.
        uniform: Whether the base prior is uniform in each standard coordinate.
        normal: Whether the base prior is standard normal in each standard coordinate.
    """

    layout: Layout
    uniform: tuple[bool, ...]
    normal: tuple[bool, ...]

    @property
    def cut(self) -> np.ndarray:
        """Flags of the coordinates that can be truncated (uniform or normal), shape (d,)."""
        return np.array(self.uniform) | np.array(self.normal)


@final
@jax.tree_util.register_pytree_node_class
class BoxPrior(Prior):
    """A prior restricted to a box in its standard coordinates, and normalised in the box.

    Coordinates that are circular or have no CDF are not cut. A `BoxPrior` defines new standard
    coordinates: they are uniform in each coordinate that is cut, so that a posterior cannot leave
    the box. The bounds are leaves of the pytree. Another box of the same base prior can
    therefore use the same compiled programs.

    Args:
        base: The base prior, which is cut.
        low: Lower bounds in the base prior's standard coordinates, shape (d,).
        high: Upper bounds in the base prior's standard coordinates, shape (d,).

    Attributes:
        base: The base prior.
        low: Lower bounds, -inf where the base prior is not cut.
        high: Upper bounds, inf where the base prior is not cut.
        mass: Probability of the box under the base prior.

    Raises:
        ValueError: The bounds do not have shape (d,); a lower bound is not below its upper bound;
            the base prior is itself a box; or parameters of the base prior depend on each other.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> half = BoxPrior(sf.as_prior(dist.Normal(0, 1)), [0.0], [9.0])
        >>> bool(half.sample(jax.random.key(0), 100).min() > 0), round(half.mass, 3)
        (True, 0.5)
    """

    def __init__(self, base: Prior, low: npt.ArrayLike, high: npt.ArrayLike) -> None:
        if not isinstance(base, SitePrior):
            raise ValueError(
                f"base: expected a prior without a box and without a condition, got {base}"
            )
        if base.dependent:
            raise ValueError(
                "base: expected parameters that do not depend on each other, got "
                f"{base}, of which {', '.join(sorted(base.dependent))} do"
            )
        low, high = (np.array(bound, float) for bound in (low, high))
        if low.shape != (base.standard_dim,) or high.shape != low.shape or np.any(low >= high):
            raise ValueError(
                f"low, high: expected {base.standard_dim} bounds with low < high, got {low}, {high}"
            )
        kinds = base.map_kinds
        uniform = tuple(kind is IntervalMap for kind in kinds)
        normal = tuple(kind in (NormalMap, CdfMap) for kind in kinds)
        bounded = tuple(u or n or b for u, n, b in zip(uniform, normal, base.bounded, strict=True))
        layout = dataclasses.replace(base.layout, bounded=bounded)
        self.base, self._static = base, _Static(layout, uniform, normal)
        self._bounds = _bounds(self._static, low, high)
        self._mass: Any = float(np.exp(np.sum(self._bounds.log_mass)))

    def __repr__(self) -> str:
        """Show the base prior, and the fraction of its probability in the box."""
        mass = "part" if isinstance(self._mass, Tracer) else f"{float(self._mass):.2g}"
        return f"{self.base} cut to {mass} of its mass"

    def tree_flatten(self) -> tuple[tuple[SitePrior, _Bounds, Any], _Static]:
        """Return base prior, bounds and mass as children, and the static part."""
        return (self.base, self._bounds, self._mass), self._static

    @classmethod
    def tree_unflatten(cls, static: _Static, children: Any) -> BoxPrior:
        """Rebuild a prior from its children, without validating them."""
        prior = object.__new__(cls)
        prior._static = static
        prior.base, prior._bounds, prior._mass = children
        return prior

    @property
    def layout(self) -> Layout:
        """Names and shapes of the parameters."""
        return self._static.layout

    @property
    def low(self) -> Any:
        """Lower bounds (d,), -inf where the base prior is not cut."""
        return self._bounds.low

    @property
    def high(self) -> Any:
        """Upper bounds (d,), inf where the base prior is not cut."""
        return self._bounds.high

    @property
    def mass(self) -> Any:
        """Probability of the box under the base prior."""
        return self._mass

    def matches(self, other: Prior) -> bool:
        """Return whether another prior is a box with the same bounds and the same base prior."""
        return (
            isinstance(other, BoxPrior)
            and self.base.matches(other.base)
            and np.array_equal(self.low, other.low)
            and np.array_equal(self.high, other.high)
        )

    def near_sides(self, y: np.ndarray, share: float) -> dict[str, float]:
        """Compute the fraction of points that lie close to each side of the box.

        Sides that do not cut the base prior are left out.

        Args:
            y: Points in the base prior's standard coordinates, shape (n, d).
            share: Maximum distance of a close point from the side, as a fraction of the box's
                width.

        Returns:
            Fraction of close points for each side, by name. `rate low`, for example, is the lower
            side in the parameter `rate`.
        """
        fractions: dict[str, float] = {}
        layout = self.base.layout
        pairs = zip(layout.names, layout.standard_shapes, strict=True)
        names = [label for name, shape in pairs for label in labels(name, shape)]
        low, high = np.asarray(self.low), np.asarray(self.high)
        width, limits = high - low, _limits(self._static)
        for i in np.flatnonzero(self._static.cut & np.isfinite(width)):
            near = share * width[i]
            if low[i] > -limits[i]:
                fractions[f"{names[i]} low"] = float(np.mean(y[:, i] < low[i] + near))
            if high[i] < limits[i]:
                fractions[f"{names[i]} high"] = float(np.mean(y[:, i] > high[i] - near))
        return fractions

    def unchecked_center(self, batch: tuple[int, ...]) -> Array:
        """Return the point with standard coordinates 0, repeated to the shape (*batch, D)."""
        return self.unchecked_from_standard(jnp.zeros((*batch, self.standard_dim)))

    def unchecked_sample(self, key: Key, n: int) -> Array:
        """Draw n parameter vectors (n, D)."""
        base_key, key = jax.random.split(key)
        y = self.base.unchecked_to_standard(self.base.unchecked_sample(base_key, n))
        v = jax.random.uniform(key, y.shape, y.dtype, -HALF_WIDTH, HALF_WIDTH)
        (cut,) = _rows(y, self._static.cut)
        return self.unchecked_from_standard(jnp.where(cut, v, y))

    def unchecked_contains(self, theta: Array) -> Array:
        """Return whether theta (*, D) is in the support and in the box."""
        inside = self.base.unchecked_contains(theta)
        safe = jnp.where(inside[..., None], theta, self.unchecked_center(inside.shape))
        y = self.base.unchecked_to_standard(safe)
        low, high = _rows(y, self._bounds.outer_low, self._bounds.outer_high)
        return inside & jnp.all((y >= low) & (y <= high), axis=-1)

    def unchecked_log_prob_inside(self, theta: Array) -> Array:
        """Compute the log density at theta (*, D), which must be in the box."""
        log_mass = jnp.sum(jnp.asarray(self._bounds.log_mass))
        return self.base.unchecked_log_prob_inside(theta) - log_mass

    def unchecked_site_log_probs(self, theta: Array) -> dict[str, Array]:
        """Compute the log density of each site of the base prior at theta (*, D)."""
        return self.base.unchecked_site_log_probs(theta)

    def unchecked_from_standard(self, y: Array) -> Array:
        """Map the box's standard coordinates (*, d) to parameters (*, D)."""
        return self.base.unchecked_from_standard(self._to_base(y))

    def unchecked_to_standard(self, theta: Array) -> Array:
        """Map parameters (*, D) in the box to the box's standard coordinates (*, d)."""
        y = self.base.unchecked_to_standard(theta)
        uniform, cut = _rows(y, np.array(self._static.uniform), self._static.cut)
        first, width = _rows(y, self._bounds.first, self._bounds.width)
        below, mass, sign = self._tails(y)
        curved = (ndtr(sign * y) - below) / mass
        curved = jnp.where(sign > 0, curved, 1.0 - curved)
        share = jnp.where(uniform, (y - first) / width, curved)
        v = HALF_WIDTH * (2.0 * jnp.clip(share, _EDGE, 1.0 - _EDGE) - 1.0)
        return jnp.where(cut, v, y)

    def unchecked_log_det(self, y: Array, theta: Array) -> Array:
        """Compute the log Jacobian determinant at y (*, d), where theta = from_standard(y)."""
        inner = self._to_base(y)
        (log_mass,) = _rows(inner, self._bounds.log_mass)
        normal, cut = _rows(inner, np.array(self._static.normal), self._static.cut)
        density = jnp.where(normal, norm.logpdf(inner), -math.log(2 * HALF_WIDTH))
        slope = jnp.where(cut, log_mass - math.log(2 * HALF_WIDTH) - density, 0.0)
        return jnp.sum(slope, axis=-1) + self.base.unchecked_log_det(inner, theta)

    def _to_base(self, v: Array) -> Array:
        """Map the box's standard coordinates to the base prior's standard coordinates."""
        share = jnp.clip(0.5 * (v / HALF_WIDTH + 1.0), 0.0, 1.0)
        uniform, cut = _rows(v, np.array(self._static.uniform), self._static.cut)
        first, width, low, high = _rows(
            v, self._bounds.first, self._bounds.width, self._bounds.low, self._bounds.high
        )
        below, mass, sign = self._tails(v)
        turned = jnp.where(sign > 0, share, 1.0 - share)
        curved = sign * ndtri(positive(below + mass * turned))
        curved = jnp.clip(curved, low, high)
        return jnp.where(cut, jnp.where(uniform, first + width * share, curved), v)

    def _tails(self, like: Array) -> tuple[Array, Array, Array]:
        """Return the normal probability below `near`, that between `near` and `far`, and `sign`."""
        near, far, sign = _rows(like, self._bounds.near, self._bounds.far, self._bounds.sign)
        return ndtr(near), ndtr(far) - ndtr(near), sign


def _limits(static: _Static) -> np.ndarray:
    """Return the upper limit of each of the base prior's standard coordinates, shape (d,)."""
    return np.where(np.array(static.uniform), HALF_WIDTH, np.inf)


def _bounds(static: _Static, low: np.ndarray, high: np.ndarray) -> _Bounds:
    """Compute the constants in `_Bounds` with numpy, in double precision."""
    uniform, normal = np.array(static.uniform), np.array(static.normal)
    limits, cut = _limits(static), static.cut
    low = np.where(cut, np.maximum(low, -limits), -np.inf)
    high = np.where(cut, np.minimum(high, limits), np.inf)
    first = np.where(uniform, low, 0.0)
    near = np.where(normal, np.maximum(low, -_FURTHEST), -1.0)
    far = np.where(normal, np.minimum(high, _FURTHEST), 1.0)
    sign = np.where(near + far > 0, -1.0, 1.0)
    near, far = np.sort(np.stack([sign * near, sign * far]), axis=0)
    width = np.where(np.isfinite(high - low), high - low, 1.0)
    return _Bounds(
        low=low,
        high=high,
        first=first,
        width=np.where(uniform, high, 1.0) - first,
        sign=sign,
        near=near,
        far=far,
        log_mass=_log_masses(static, low, high, near, far),
        outer_low=low - _SLACK * width,
        outer_high=high + _SLACK * width,
    )


def _log_masses(
    static: _Static, low: np.ndarray, high: np.ndarray, near: np.ndarray, far: np.ndarray
) -> np.ndarray:
    """Compute the log probability of the box in each coordinate, 0 where it is not cut."""
    from scipy.special import log_ndtr, logsumexp

    both = np.stack([log_ndtr(far), log_ndtr(near)])
    signs = np.broadcast_to(np.array([[1.0], [-1.0]]), both.shape)
    normal = logsumexp(both, axis=0, b=signs)
    with np.errstate(divide="ignore", invalid="ignore"):
        uniform = np.log((high - low) / (2 * HALF_WIDTH))
    return np.where(static.normal, normal, np.where(static.uniform, uniform, 0.0))


def _rows(like: Array, *values: Any) -> list[Array]:
    """Reshape arrays `values` of shape (d,) so that they broadcast with `like` (*, d)."""
    kinds = [jnp.asarray(v, None if v.dtype == bool else like.dtype) for v in values]
    return [kind.reshape((1,) * (like.ndim - 1) + (-1,)) for kind in kinds]
