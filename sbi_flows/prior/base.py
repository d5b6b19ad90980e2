"""The abstract prior: D named parameters in one flat vector, and standard coordinates.

A prior is a pytree. Its leaves are the parameters of its distributions and the bounds of its box;
its structure is static: names, shapes, kinds of distributions and maps. Two priors of one structure
share every compiled program that takes a prior as an argument.

Each method comes twice. `sample`, `log_prob`, `contains` and so on check their arguments and are
for users. `unchecked_sample`, `unchecked_log_prob`, `unchecked_contains` and so on compute the same
and check nothing; the package calls them on arrays that it has checked before or has made itself.
Under a trace, the checked methods check shapes and dtypes, never values.

Public names: `Prior`, `Layout`, `labels`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from sbi_flows.core.checks import as_random_key, as_real_array, require_count, require_memory
from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static facts about a prior.

    Attributes:
        names: Name of each site.
        shapes: Shape of each site's value.
        standard_shapes: Shape of each site's standard coordinates.
        bounded: Which of the d standard coordinates fill (-sqrt 3, sqrt 3) rather than R.
        is_named: Whether the simulator receives a dict rather than one array.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    standard_shapes: tuple[tuple[int, ...], ...]
    bounded: tuple[bool, ...]
    is_named: bool

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Labels of the D entries."""
        pairs = zip(self.names, self.shapes, strict=True)
        return tuple(label for name, shape in pairs for label in labels(name, shape))

    def split(self, theta: Array) -> dict[str, Array]:
        """Split flat vectors (*, D) into named values `{name: (*, *event)}`."""
        return _split(theta, self.names, self.shapes)

    def split_standard(self, y: Array) -> dict[str, Array]:
        """Split standard coordinates (*, d) into those of each site."""
        return _split(y, self.names, self.standard_shapes)

    def join(self, values: Mapping[str, Array], shapes: tuple[tuple[int, ...], ...]) -> Array:
        """Join named values, each with these axes after the batch axes, into flat vectors."""
        parts = []
        for name, shape in zip(self.names, shapes, strict=True):
            value = values[name]
            batch = value.shape[: value.ndim - len(shape)]
            parts.append(jnp.reshape(value, (*batch, math.prod(shape))))
        return jnp.concatenate(parts, axis=-1)


class Prior(abc.ABC):
    """A prior over D named parameters, held as one flat vector.

    `as_prior` makes one. It is a pytree, and may be an argument of a function under `jax.jit`,
    `jax.grad` and `jax.vmap`.

    Attributes:
        names: Name of each site, in the order in which they fill the flat vector.
        event_shapes: Shape of each site's value.
        labels: One label for each of the D entries: `alpha`, `beta[0]`, `beta[1]`.
        dim: D, the length of the flat vector.
        standard_dim: d, the length of the vector of standard coordinates (D, except where a
            support has fewer degrees of freedom, as a simplex has).
        bounded: Which of the d standard coordinates fill the interval (-sqrt 3, sqrt 3) rather
            than R.
        is_named: Whether the simulator receives a dict rather than one array.
        mass: Probability of the support under the prior before it was cut to a box; 1 without one.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = sf.as_prior({"rate": dist.LogNormal(0, 1), "p": dist.Uniform(0, 1).expand([2])})
        >>> prior.labels
        ('rate', 'p[0]', 'p[1]')
        >>> prior.sample(jax.random.key(0), 5).shape
        (5, 3)
        >>> log_prob = jax.jit(lambda prior, theta: prior.log_prob(theta))
        >>> log_prob(prior, prior.center()).shape
        ()
    """

    layout: Layout

    @property
    @abc.abstractmethod
    def mass(self) -> Any:
        """Probability of the support under the prior before it was cut to a box."""

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each site, in the order in which they fill the flat vector."""
        return self.layout.names

    @property
    def event_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each site's value."""
        return dict(zip(self.layout.names, self.layout.shapes, strict=True))

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the D entries."""
        return self.layout.labels

    @property
    def dim(self) -> int:
        """Length D of the flat vector."""
        return sum(map(math.prod, self.layout.shapes))

    @property
    def standard_dim(self) -> int:
        """Length d of the vector of standard coordinates."""
        return len(self.layout.bounded)

    @property
    def bounded(self) -> tuple[bool, ...]:
        """Flags of the d standard coordinates: True for (-sqrt 3, sqrt 3), False for R."""
        return self.layout.bounded

    @property
    def is_named(self) -> bool:
        """True if the simulator receives a dict rather than one array."""
        return self.layout.is_named

    @abc.abstractmethod
    def matches(self, other: Prior) -> bool:
        """Return whether another prior has the same parameters and distributions."""

    # for users: arguments are checked

    def sample(self, key: Key, n: int) -> Array:
        """Draw n parameter vectors, none outside the support.

        Returns:
            Array of shape (n, D).

        Raises:
            ValueError: `key` is no random key, n is no count, or (n, D) does not fit in memory.
        """
        key = as_random_key("key", key)
        require_count(0, n=n)
        require_memory("n", (n, self.dim), jnp.result_type(float))
        return _sample(self, key, n)

    def log_prob(self, theta: ArrayLike) -> Array:
        """Compute the log density at theta (*, D); shape (*), -inf outside the support."""
        return self.unchecked_log_prob(self._checked(theta))

    def site_log_probs(self, theta: ArrayLike) -> dict[str, Array]:
        """Compute the log density (*) of each site's value at theta (*, D), by name.

        The densities are those of the prior before it was cut to a box. The dict is empty where
        the distribution of one site depends on the value of another.
        """
        return self.unchecked_site_log_probs(self._checked(theta))

    def contains(self, theta: ArrayLike) -> Array:
        """Return whether theta (*, D) is finite and in the support; bool of shape (*)."""
        return self.unchecked_contains(self._checked(theta))

    def flatten(self, values: Mapping[str, Any]) -> Array:
        """Join named values `{name: (*, *event)}` into flat vectors (*, D)."""
        if not isinstance(values, Mapping) or set(self.names) ^ set(values):
            got = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"values: expected parameters {sorted(self.names)}, got {got}")
        arrays = {}
        for name, shape in self.event_shapes.items():
            value = jnp.asarray(as_real_array(name, values[name]))
            if value.shape[max(value.ndim - len(shape), 0) :] != shape:
                raise ValueError(f"{name}: expected shape (*, *{shape}), got {value.shape}")
            arrays[name] = value
        return self.unchecked_flatten(arrays)

    def unflatten(self, theta: ArrayLike) -> dict[str, Array]:
        """Split flat vectors (*, D) into named values `{name: (*, *event)}`."""
        return self.unchecked_unflatten(self._checked(theta))

    def structured(self, theta: ArrayLike) -> Array | dict[str, Array]:
        """Return theta (*, D) as the simulator receives it: a named dict, or one array."""
        return self.unchecked_structured(self._checked(theta))

    def from_standard(self, y: ArrayLike) -> Array:
        """Map standard coordinates (*, d) to parameters (*, D), never outside the support."""
        return self.unchecked_from_standard(self._checked_standard(y))

    def to_standard(self, theta: ArrayLike) -> Array:
        """Map parameters (*, D) inside the support to standard coordinates (*, d).

        There the prior has mean 0 and variance 1 wherever it has a CDF: standard normal on an
        unbounded support, uniform on (-sqrt 3, sqrt 3) on an interval.
        """
        return self.unchecked_to_standard(self._checked(theta))

    def standard_log_det(self, y: ArrayLike, theta: ArrayLike) -> Array:
        """Compute the log absolute determinant of the Jacobian of `from_standard`.

        Args:
            y: Standard coordinates, shape (*, d).
            theta: The parameters `from_standard(y)`, shape (*, D).

        Returns:
            Shape (*).
        """
        return self.unchecked_log_det(self._checked_standard(y), self._checked(theta))

    def center(self, batch: tuple[int, ...] = ()) -> Array:
        """Return a point inside the support, repeated to (*batch, D)."""
        return self.unchecked_from_standard(jnp.zeros((*batch, self.standard_dim)))

    # for this package: arguments are arrays of the right shapes

    @abc.abstractmethod
    def unchecked_sample(self, key: Key, n: int) -> Array:
        """Draw n parameter vectors (n, D)."""

    @abc.abstractmethod
    def unchecked_contains(self, theta: Array) -> Array:
        """Return whether theta (*, D) is in the support."""

    @abc.abstractmethod
    def unchecked_log_prob_inside(self, theta: Array) -> Array:
        """Compute the log density at theta (*, D) inside the support."""

    @abc.abstractmethod
    def unchecked_site_log_probs(self, theta: Array) -> dict[str, Array]:
        """Compute the log density of each site at theta (*, D)."""

    @abc.abstractmethod
    def unchecked_from_standard(self, y: Array) -> Array:
        """Map standard coordinates (*, d) to parameters (*, D)."""

    @abc.abstractmethod
    def unchecked_to_standard(self, theta: Array) -> Array:
        """Map parameters (*, D) to standard coordinates (*, d)."""

    @abc.abstractmethod
    def unchecked_log_det(self, y: Array, theta: Array) -> Array:
        """Compute the log determinant of `from_standard` at y (*, d)."""

    def unchecked_log_prob(self, theta: Array) -> Array:
        """Compute the log density at theta (*, D)."""
        if not theta.size:  # numpyro reshapes with -1, which fails without rows
            return jnp.zeros(theta.shape[:-1])
        inside = self.unchecked_contains(theta)
        safe = jnp.where(inside[..., None], theta, self.center(theta.shape[:-1]))
        return jnp.where(inside, self.unchecked_log_prob_inside(safe), -jnp.inf)

    def unchecked_flatten(self, values: Mapping[str, Array]) -> Array:
        """Join named values into flat vectors (*, D)."""
        return self.layout.join(values, self.layout.shapes)

    def unchecked_unflatten(self, theta: Array) -> dict[str, Array]:
        """Split flat vectors (*, D) into named values."""
        return self.layout.split(theta)

    def unchecked_structured(self, theta: Array) -> Array | dict[str, Array]:
        """Return theta (*, D) as the simulator receives it."""
        values = self.layout.split(theta)
        return values if self.is_named else values[self.names[0]]

    def _checked(self, theta: ArrayLike) -> Array:
        theta = jnp.asarray(as_real_array("theta", theta))
        if theta.ndim == 0 or theta.shape[-1] != self.dim:
            raise ValueError(
                f"theta: expected shape (*, {self.dim}) for {self.labels}, got {theta.shape}"
            )
        return theta

    def _checked_standard(self, y: ArrayLike) -> Array:
        y = jnp.asarray(as_real_array("y", y))
        y = y if jnp.issubdtype(y.dtype, jnp.floating) else y.astype(float)
        if y.ndim == 0 or y.shape[-1] != self.standard_dim:
            raise ValueError(f"y: expected shape (*, {self.standard_dim}), got {y.shape}")
        return y


@partial(jax.jit, static_argnums=2)
@full_precision
def _sample(prior: Prior, key: Key, n: int) -> Array:
    # one program: operation by operation, a truncated distribution compiles for seconds
    return prior.unchecked_sample(key, n)


def labels(name: str, shape: tuple[int, ...]) -> list[str]:
    """Return the labels of a parameter's entries: `alpha`, or `beta[0]`, `beta[1]`."""
    if not shape:
        return [name]
    return [f"{name}[{','.join(map(str, i))}]" for i in np.ndindex(*shape)]


def _split(
    flat: Array, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]
) -> dict[str, Array]:
    """Split the last axis of flat (*, sum of sizes) into parts of these names and shapes."""
    batch, parts, start = flat.shape[:-1], {}, 0
    for name, shape in zip(names, shapes, strict=True):
        size = math.prod(shape)
        parts[name] = jnp.reshape(flat[..., start : start + size], (*batch, *shape))
        start += size
    return parts
