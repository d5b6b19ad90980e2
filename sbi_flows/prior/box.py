"""A prior that is cut to a box of its standard coordinates.

Public names: `BoxPrior`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array
from jax.scipy.special import ndtr, ndtri
from jax.scipy.stats import norm
from jax.typing import ArrayLike

from sbi_flows.core.typing import Key
from sbi_flows.prior.maps import HALF_WIDTH, CdfMap, IntervalMap, NormalMap, positive
from sbi_flows.prior.prior import Prior, labels

_EDGE = 1e-6
"""Share of the box next to a face in which coordinates are those of its inner end."""

_SLACK = 1e-4
"""Share of the box's width by which rounding may put its own draws outside."""


class BoxPrior(Prior):
    """A prior within bounds of its standard coordinates, in proportion to what it was.

    Coordinates in which the prior has no CDF are not cut. Within a box the prior has standard
    coordinates of its own, which are uniform where they are cut: a posterior never leaves the box.

    Args:
        base: The prior that is cut.
        low: Lower bounds in its standard coordinates, shape (d,).
        high: Upper bounds, shape (d,).

    Attributes:
        base: The prior that is cut.
        low: Lower bounds, -inf where it is not cut.
        high: Upper bounds, inf where it is not cut.
        mass: Probability of the box under the prior.

    Raises:
        ValueError: The bounds have another shape or are in no order, or the prior is a box, or has
            parameters that depend on each other.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> half = BoxPrior(sf.as_prior(dist.Normal(0, 1)), [0.0], [9.0])
        >>> bool(half.sample(jax.random.key(0), 100).min() > 0), round(half.mass, 3)
        (True, 0.5)
    """

    def __init__(self, base: Prior, low: npt.ArrayLike, high: npt.ArrayLike) -> None:
        """Take over what the prior has, and cut it."""
        if isinstance(base, BoxPrior) or base._dependent:
            raise ValueError(
                "base: expected a prior that is not cut, of parameters that do not depend on each "
                f"other, got {base}, of which {', '.join(sorted(base._dependent)) or 'none'} do"
            )
        low, high = (np.array(bound, float) for bound in (low, high))
        if low.shape != (base.standard_dim,) or high.shape != low.shape or np.any(low >= high):
            raise ValueError(
                f"low, high: expected {base.standard_dim} bounds with low < high, got {low}, {high}"
            )
        self.__dict__.update(base.__dict__)
        kinds = [m for m in base._maps.values() for _ in range(math.prod(m.standard_shape))]
        self.base = base
        self._uniform = np.array([isinstance(m, IntervalMap) for m in kinds])
        self._normal = np.array([isinstance(m, NormalMap | CdfMap) for m in kinds])
        whole = np.where(self._uniform, HALF_WIDTH, np.inf)
        cut = self._cut
        self.low = np.where(cut, np.maximum(low, -whole), -np.inf)
        self.high = np.where(cut, np.minimum(high, whole), np.inf)
        self.bounded = tuple(bool(c) or b for c, b in zip(cut, base.bounded, strict=True))
        self.mass = float(np.exp(np.sum(self._log_masses())))

    def __repr__(self) -> str:
        """The prior, and how much of it is left."""
        return f"{self.base} cut to {self.mass:.2g} of its mass"

    def matches(self, other: Prior) -> bool:
        """Whether the other has the same parameters with the same distributions."""
        return (
            isinstance(other, BoxPrior)
            and self.base.matches(other.base)
            and np.array_equal(self.low, other.low)
            and np.array_equal(self.high, other.high)
        )

    def contains(self, theta: ArrayLike) -> Array:
        """Whether theta of shape (*, D) is in the support and in the box; bool of shape (*)."""
        inside = self.base.contains(theta)
        safe = jnp.where(inside[..., None], jnp.asarray(theta), self.center(inside.shape))
        y = self.base.to_standard(safe)
        width = np.where(np.isfinite(self.high - self.low), self.high - self.low, 1.0)
        low, high = _rows(y, self.low - _SLACK * width, self.high + _SLACK * width)
        return inside & jnp.all((y >= low) & (y <= high), axis=-1)

    def near_sides(self, y: np.ndarray, share: float) -> dict[str, float]:
        """How many rows lie next to each side of the box that cuts the prior.

        Args:
            y: Rows in the standard coordinates of the prior that was cut, shape (n, d).
            share: What is next to a side, as a share of the width.

        Returns:
            Shares of the rows by side, such as `rate low`.
        """
        found: dict[str, float] = {}
        maps = self.base._maps
        names = [label for n, m in maps.items() for label in labels(n, m.standard_shape)]
        width = self.high - self.low
        whole = np.where(self._uniform, HALF_WIDTH, np.inf)
        for i in np.flatnonzero(self._cut & np.isfinite(width)):
            near = share * width[i]
            if self.low[i] > -whole[i]:
                found[f"{names[i]} low"] = float(np.mean(y[:, i] < self.low[i] + near))
            if self.high[i] < whole[i]:
                found[f"{names[i]} high"] = float(np.mean(y[:, i] > self.high[i] - near))
        return found

    def from_standard(self, y: ArrayLike) -> Array:
        """Map standard coordinates (*, d) of the box to parameters (*, D)."""
        return self.base.from_standard(self._to_base(jnp.asarray(y)))

    def to_standard(self, theta: ArrayLike) -> Array:
        """Map parameters (*, D) in the box to its standard coordinates (*, d)."""
        y = self.base.to_standard(theta)
        uniform, cut, first, width = self._straight(y)
        below, mass, sign = self._tails(y)
        curved = (ndtr(sign * y) - below) / mass
        curved = jnp.where(sign > 0, curved, 1.0 - curved)
        share = jnp.where(uniform, (y - first) / width, curved)
        v = HALF_WIDTH * (2.0 * jnp.clip(share, _EDGE, 1.0 - _EDGE) - 1.0)
        return jnp.where(cut, v, y)

    def standard_log_det(self, y: ArrayLike, theta: ArrayLike) -> Array:
        """Log absolute determinant of the Jacobian of `from_standard`; shape (*)."""
        inner = self._to_base(jnp.asarray(y))
        masses, normal, cut = _rows(inner, self._log_masses(), self._normal, self._cut)
        density = jnp.where(normal, norm.logpdf(inner), -math.log(2 * HALF_WIDTH))
        slope = jnp.where(cut, masses - math.log(2 * HALF_WIDTH) - density, 0.0)
        return jnp.sum(slope, axis=-1) + self.base.standard_log_det(inner, theta)

    def _to_base(self, v: Array) -> Array:
        """Standard coordinates of the box to those of the prior."""
        share = jnp.clip(0.5 * (v / HALF_WIDTH + 1.0), 0.0, 1.0)
        uniform, cut, first, width = self._straight(v)
        below, mass, sign = self._tails(v)
        turned = jnp.where(sign > 0, share, 1.0 - share)
        curved = sign * ndtri(positive(below + mass * turned))
        low, high = _rows(v, self.low, self.high)
        curved = jnp.clip(curved, low, high)
        return jnp.where(cut, jnp.where(uniform, first + width * share, curved), v)

    @property
    def _cut(self) -> np.ndarray:
        return self._uniform | self._normal

    def _straight(self, like: Array) -> tuple[Array, ...]:
        """Which coordinates are uniform and which are cut; first and width of the uniform ones."""
        first = np.where(self._uniform, self.low, 0.0)
        width = np.where(self._uniform, self.high, 1.0) - first
        return tuple(_rows(like, self._uniform, self._cut, first, width))

    def _tails(self, like: Array) -> tuple[Array, Array, Array]:
        """Normal probability below the box and in it, and the side on which they keep digits."""
        low, high = self._finite()
        sign = np.where(low + high > 0, -1.0, 1.0)
        ends = np.sort(np.stack([sign * low, sign * high]), axis=0)
        first, last, sign = _rows(like, ends[0], ends[1], sign)
        return ndtr(first), ndtr(last) - ndtr(first), sign

    def _finite(self) -> tuple[np.ndarray, np.ndarray]:
        """The bounds of normal coordinates, as far out as their normal has mass."""
        far = 37.0
        low = np.where(self._normal, np.maximum(self.low, -far), -1.0)
        return low, np.where(self._normal, np.minimum(self.high, far), 1.0)

    def _log_masses(self) -> np.ndarray:
        """Log probability of the box in each coordinate, 0 where it is not cut."""
        from scipy.special import log_ndtr, logsumexp

        low, high = self._finite()
        low, high = np.where(low + high > 0, -high, low), np.where(low + high > 0, -low, high)
        both = np.stack([log_ndtr(high), log_ndtr(low)])
        signs = np.broadcast_to(np.array([[1.0], [-1.0]]), both.shape)
        normal = logsumexp(both, axis=0, b=signs)
        with np.errstate(divide="ignore", invalid="ignore"):
            uniform = np.log((self.high - self.low) / (2 * HALF_WIDTH))
        return np.where(self._normal, normal, np.where(self._uniform, uniform, 0.0))

    def _log_prob_inside(self, theta: Array) -> Array:
        return self.base._log_prob_inside(theta) - jnp.sum(jnp.asarray(self._log_masses()))

    def _sample_rows(self, key: Key, n: int) -> Array:
        base_key, key = jax.random.split(key)
        y = self.base.to_standard(self.base._sample_rows(base_key, n))
        v = jax.random.uniform(key, y.shape, y.dtype, -HALF_WIDTH, HALF_WIDTH)
        (cut,) = _rows(y, self._cut)
        return self.from_standard(jnp.where(cut, v, y))


def _rows(like: Array, *values: np.ndarray) -> list[Array]:
    """Values (d,) as arrays with as many axes as `like` (*, d) has."""
    kinds = [jnp.asarray(v, None if v.dtype == bool else like.dtype) for v in values]
    return [kind.reshape((1,) * (like.ndim - 1) + (-1,)) for kind in kinds]
