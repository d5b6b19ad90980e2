"""Circular parameters: the two ends of their interval are the same point.

The standard coordinate of a circular entry is the position on the interval, scaled linearly to
(-sqrt 3, sqrt 3). Densities and posteriors treat the ends of this coordinate as one point.

Public names: `Circular`, `CircularMap`, `HALF_WIDTH`, `is_circular`, `wrap`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from sbi_flows.core.typing import Key
from sbi_flows.prior.sites import Site
from sbi_flows.prior.supports import base_constraint

HALF_WIDTH = math.sqrt(3.0)
"""Half-width of a bounded standard coordinate, with which a uniform variable has variance 1."""


class Circular(dist.Distribution):
    """Distribution of a circular parameter: the two ends of its interval are the same point.

    Use it for an angle, a phase or a time of day. A posterior of a circular parameter can have a
    mode across the ends of the interval. numpyro's `VonMises` is circular without this wrapper.

    Args:
        low: Lower end of the interval, for a uniform distribution; or any distribution on an
            interval with event shape ().
        high: Upper end of the interval; not allowed if `low` is a distribution.
        validate_args: Whether numpyro validates the arguments.

    Attributes:
        base_dist: The distribution on the interval.

    Raises:
        ValueError: The support of the distribution is not an interval with two ends, or `low` is a
            distribution and `high` is not None.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> hour, phase = sf.Circular(0.0, 24.0), sf.Circular(dist.Beta(2.0, 2.0))
        >>> prior = sf.as_prior({"angle": sf.Circular(), "hour": hour, "phase": phase})
        >>> prior.sample(jax.random.key(0), 5).shape
        (5, 3)
    """

    arg_constraints: ClassVar[Any] = {}
    reparametrized_params: ClassVar[Any] = []
    pytree_data_fields: ClassVar[Any] = ("base_dist",)

    def __init__(
        self,
        low: ArrayLike | dist.Distribution = -math.pi,
        high: ArrayLike | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        """Store the distribution on the interval."""
        if isinstance(low, dist.Distribution):
            if high is not None:
                raise ValueError(
                    f"high: expected None if `low` is a distribution, got {high!r:.80}; the "
                    "distribution defines both ends, so leave out `high`"
                )
            base: dist.Distribution = low
        else:
            base = dist.Uniform(low, math.pi if high is None else high)
        if base.event_shape or not _has_two_ends(base.support):
            raise ValueError(
                "Circular: expected two numbers, or a distribution on an interval with event "
                f"shape (), got {type(base).__name__} of event shape {base.event_shape} on "
                f"{base.support}; for vectors write Circular(distribution).to_event(1)"
            )
        self.base_dist: dist.Distribution = base
        super().__init__(base.batch_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        """The closed interval."""
        return self.base_dist.support

    def sample(self, key: Key | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw values (*sample_shape, *batch_shape)."""
        return jnp.asarray(self.base_dist.sample(key, sample_shape))

    def log_prob(self, value: ArrayLike) -> Array:
        """Compute the log density of the distribution on the interval."""
        return jnp.asarray(self.base_dist.log_prob(value))


class CircularMap:
    """Linear map between (-sqrt 3, sqrt 3) and the interval of a circular parameter."""

    def __init__(self, site: Site) -> None:
        """Store the ends of the interval."""
        support = base_constraint(site.support)
        self._low, self._high = support.lower_bound, support.upper_bound

    def forward(self, y: Array) -> Array:
        """Map (-sqrt 3, sqrt 3) to the closed interval; values outside are wrapped."""
        low, high = self._ends(y)
        return jnp.clip(low + (high - low) * (0.5 * (wrap(y) / HALF_WIDTH + 1.0)), low, high)

    def inverse(self, theta: Array) -> Array:
        """Map the interval to (-sqrt 3, sqrt 3)."""
        low, high = self._ends(theta)
        return HALF_WIDTH * (2.0 * (theta - low) / (high - low) - 1.0)

    def log_det(self, y: Array, theta: Array) -> Array:
        """Return the log width of the interval relative to that of the standard coordinate."""
        low, high = self._ends(y)
        return jnp.log((high - low) / (2 * HALF_WIDTH))

    def _ends(self, like: Array) -> tuple[Array, Array]:
        """Return both ends in the shape of `like`."""
        ends = (jnp.asarray(end, like.dtype) for end in (self._low, self._high))
        low, high = (e.reshape((1,) * (like.ndim - e.ndim) + e.shape) for e in ends)
        return jnp.broadcast_to(low, like.shape), jnp.broadcast_to(high, like.shape)


def is_circular(distribution: dist.Distribution) -> bool:
    """Return whether the distribution of a single entry makes its parameter circular."""
    return isinstance(distribution, Circular | dist.VonMises)


def wrap(y: Array, half_width: float = HALF_WIDTH) -> Array:
    """Add a multiple of the period to y, so that the result is in [-half_width, half_width].

    Values in [-half_width, half_width] do not change.
    """
    turns = jax.lax.stop_gradient(jnp.round(y / (2 * half_width)))
    turns = jnp.where(jnp.abs(y) <= half_width, 0.0, turns)
    return jnp.clip(y - 2 * half_width * turns, -half_width, half_width)


def _has_two_ends(support: Any) -> bool:
    support = base_constraint(support)
    return hasattr(support, "lower_bound") and hasattr(support, "upper_bound")
