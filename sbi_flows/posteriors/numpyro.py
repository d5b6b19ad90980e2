"""Posterior at one observation as a numpyro distribution.

Public names: `PosteriorDistribution`, `PriorSupport`, `PriorTransform`.

The posterior has the same support as the prior. numpyro's samplers move in unconstrained
coordinates: the prior's standard coordinates, where the logit function maps bounded coordinates to
R.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import biject_to
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import Transform

from sbi_flows.core.typing import Key
from sbi_flows.prior.maps import HALF_WIDTH
from sbi_flows.prior.prior import Prior


@runtime_checkable
class Drawable(Protocol):
    """Protocol of a posterior at one observation; `AtObservation` follows it."""

    def sample(self, key: Key, n: int) -> Array | np.ndarray:
        """Draw n parameter vectors, shape (n, D)."""
        ...

    def log_prob(self, theta: Any) -> Array:
        """Compute log densities (*) of theta (*, D)."""
        ...


def event_shape(prior: Prior) -> tuple[int, ...]:
    """Return the shape of one value of the posterior distribution.

    If the prior has named parameters, the shape is (D,); otherwise it is the shape of the prior's
    only parameter.
    """
    return (prior.dim,) if prior.is_named else prior.event_shapes[prior.names[0]]


class PriorSupport(Constraint):
    """Support of a prior as a numpyro constraint on values of shape `event_shape(prior)`."""

    def __init__(self, prior: Prior) -> None:
        """Store the prior."""
        self.prior = prior
        self._event_dim = len(event_shape(prior))

    @property
    def event_dim(self) -> int:
        """Number of axes of a value."""
        return self._event_dim

    def __call__(self, x: Array) -> Array:
        """Return whether values (*, *event) are in the support, shape (*)."""
        return self.prior.contains(_flat(self.prior, x))

    def feasible_like(self, prototype: Array) -> Array:
        """Return values inside the support, with the shape of `prototype`."""
        batch = jnp.shape(prototype)[: jnp.ndim(prototype) - self.event_dim]
        return jnp.reshape(self.prior.center(batch), jnp.shape(prototype))

    def tree_flatten(self) -> tuple[Any, Any]:
        """Return the prior as the only child."""
        return (self.prior,), (("prior",), {"_event_dim": self._event_dim})

    def __eq__(self, other: object) -> bool:
        """Return whether the other object is the support of an equal prior."""
        return isinstance(other, PriorSupport) and (
            self.prior is other.prior or self.prior.matches(other.prior)
        )

    __hash__ = None  # type: ignore[assignment]  # the prior's leaves may be tracers


class PriorTransform(Transform):
    """Bijection from R^d to the support of a prior, through the prior's standard coordinates."""

    domain = dist.constraints.real_vector

    def __init__(self, prior: Prior) -> None:
        """Store the prior."""
        self.prior = prior

    @property
    def codomain(self) -> PriorSupport:  # type: ignore[override]  # numpyro: a class attribute
        """Support of the prior."""
        return PriorSupport(self.prior)

    def __call__(self, x: Array) -> Array:
        """Map unconstrained coordinates (*, d) to values (*, *event)."""
        theta = self.prior.from_standard(self._standard(x))
        return jnp.reshape(theta, (*theta.shape[:-1], *event_shape(self.prior)))

    def _inverse(self, y: Array) -> Array:
        standard = self.prior.to_standard(_flat(self.prior, y))
        share = jnp.clip(0.5 * (standard / HALF_WIDTH + 1.0), *_inside(standard))
        return jnp.where(self._bounded(standard), jax.scipy.special.logit(share), standard)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """Compute log absolute Jacobian determinants (*) at unconstrained coordinates x (*, d)."""
        standard = self._standard(x)
        slope = math.log(2 * HALF_WIDTH) - jax.nn.softplus(x) - jax.nn.softplus(-x)
        opened = jnp.sum(jnp.where(self._bounded(x), slope, 0.0), axis=-1)
        return opened + self.prior.standard_log_det(standard, _flat(self.prior, y))

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the values, given the shape of the unconstrained coordinates."""
        return (*shape[:-1], *event_shape(self.prior))

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the unconstrained coordinates, given the shape of the values."""
        batch = shape[: len(shape) - len(event_shape(self.prior))]
        return (*batch, self.prior.standard_dim)

    def tree_flatten(self) -> tuple[Any, Any]:
        """Return the prior as the only child."""
        return (self.prior,), (("prior",), {})

    def __eq__(self, other: object) -> bool:
        """Return whether the other object is the transform of an equal prior."""
        return isinstance(other, PriorTransform) and self.codomain == other.codomain

    __hash__ = None  # type: ignore[assignment]  # the prior's leaves may be tracers

    def _standard(self, x: Array) -> Array:
        inside = HALF_WIDTH * (2.0 * jnp.clip(jax.nn.sigmoid(x), *_inside(x)) - 1.0)
        return jnp.where(self._bounded(x), inside, x)

    def _bounded(self, like: Array) -> Array:
        return jnp.broadcast_to(jnp.asarray(self.prior.bounded), like.shape)


class PosteriorDistribution(dist.Distribution):
    """Posterior at one observation as a numpyro distribution, for use as a prior.

    Args:
        prior: Prior of the posterior.
        at: Posterior at one observation.
        validate_args: Whether to check that values are in the support; None for numpyro's default.
    """

    pytree_data_fields = ("prior", "at")

    def __init__(self, prior: Prior, at: Drawable, *, validate_args: bool | None = None) -> None:
        """Store the arguments; the shape of a value follows from the prior."""
        self.prior, self.at = prior, at
        super().__init__((), event_shape(prior), validate_args=validate_args)

    @property
    def support(self) -> PriorSupport:  # type: ignore[override]  # numpyro: an attribute
        """Support of the prior."""
        return PriorSupport(self.prior)

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw values (*sample_shape, *event)."""
        draws = self.at.sample(key, max(1, math.prod(sample_shape)))[: math.prod(sample_shape)]
        return jnp.reshape(draws, (*sample_shape, *self.event_shape))

    def log_prob(self, value: Array) -> Array:
        """Compute log densities (*) of values (*, *event), in nats."""
        return self.at.log_prob(_flat(self.prior, value))


def _flat(prior: Prior, value: Array) -> Array:
    """Reshape values (*, *event) to flat vectors (*, D)."""
    value = jnp.asarray(value)
    batch = value.shape[: value.ndim - len(event_shape(prior))]
    return jnp.reshape(value, (*batch, prior.dim))


def _inside(like: Array) -> tuple[float, float]:
    """Return the ends of the interval inside (0, 1) to which probabilities are clipped."""
    eps = float(jnp.finfo(like.dtype).eps)
    return eps, 1.0 - eps


@biject_to.register(PriorSupport)
def _transform_to(support: PriorSupport) -> PriorTransform:
    return PriorTransform(support.prior)
