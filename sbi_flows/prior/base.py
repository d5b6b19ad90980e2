"""The abstract prior: D named parameters in one flat vector, and standard coordinates.

A prior is a pytree. Its leaves are the parameters of its distributions and the bounds of its box.
Its structure is static: the names, the shapes, the classes of the distributions and of their maps.
Two priors with the same structure share every compiled program that takes a prior as an argument.

Most methods exist in two versions. `sample`, `log_prob`, `contains` and so on are for users: they
check their arguments. `unchecked_sample`, `unchecked_log_prob`, `unchecked_contains` and so on
return the same results without checks. The package calls them with arrays that it checked earlier
or computed itself. Inside a JAX transformation such as `jit`, the checked methods check shapes and
dtypes, but not values.

Public names: `Prior`; also `Layout` and `labels`, which are defined in `layout`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from sbi_flows.core.checks import (
    as_array,
    as_random_key,
    as_real_array,
    require_count,
    require_memory,
    require_real,
)
from sbi_flows.core.frames import column_names, reorder_columns
from sbi_flows.core.labels import labels as labels
from sbi_flows.core.precision import full_precision
from sbi_flows.core.pytrees import is_traced
from sbi_flows.core.typing import Key
from sbi_flows.prior.layout import Layout


class Prior(abc.ABC):
    """A prior over D named parameters, held as one flat vector.

    `as_prior` builds a prior. A prior is a pytree: pass it to functions under `jax.jit`, `jax.grad`
    and `jax.vmap` as an argument.

    Attributes:
        names: Name of each site, in the order in which they fill the flat vector.
        event_shapes: Shape of each site's value.
        labels: One label for each of the D entries: `alpha`, `beta[0]`, `beta[1]`.
        dim: D, the length of the flat vector.
        standard_dim: d, the number of standard coordinates. It equals D, unless a support has fewer
            degrees of freedom than entries (a simplex, for example).
        bounded: For each of the d standard coordinates, True if its range is (-sqrt 3, sqrt 3),
            False if its range is R.
        circular: For each of the d standard coordinates, True if its two ends are the same point.
            Empty if the prior has no circular parameter.
        is_named: True if the simulator receives a dict of parameters, False if one array.
        mass: Probability of the box or condition to which the prior is restricted, under the
            original prior; 1 if the prior is not restricted.
        offset: Location that is subtracted from the parameters in double precision, because single
            precision cannot represent them (a Julian date, for example), shape (D,); None if it is
            not needed. With an offset, parameters are NumPy arrays of float64.

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
        """Probability of the box or condition under the original prior; 1 without either."""

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
        """One label for each of the D entries: `alpha`, `beta[0]`, `beta[1]`."""
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
        """Range of each of the d standard coordinates: True for (-sqrt 3, sqrt 3), False for R."""
        return self.layout.bounded

    @property
    def offset(self) -> np.ndarray | None:
        """Location that is subtracted in double precision, shape (D,); None if it is not needed."""
        return np.array(self.layout.offset) if self.layout.offset else None

    @property
    def circular(self) -> tuple[bool, ...]:
        """Flags of the circular coordinates among the d standard ones; empty if there are none."""
        return self.layout.circular

    @property
    def is_named(self) -> bool:
        """True if the simulator receives a dict of parameters, False if one array."""
        return self.layout.is_named

    @abc.abstractmethod
    def matches(self, other: Prior) -> bool:
        """Return whether another prior has the same parameters and distributions."""

    # methods for users: these check their arguments

    def sample(self, key: Key, n: int) -> Array | np.ndarray:
        """Draw n parameter vectors, all inside the support.

        Returns:
            Array of shape (n, D). It is a NumPy array of float64 if single precision cannot
            represent the values (see `offset`).

        Raises:
            ValueError: `key` is not a random key, n is not a non-negative integer, or an array of
                shape (n, D) does not fit in memory.
        """
        key = as_random_key("key", key)
        require_count(0, n=n)
        require_memory("n", (n, self.dim), jnp.result_type(float))
        return self.add_offset(_sample(self, key, n))

    def log_prob(self, theta: Any) -> Array:
        """Compute log densities (*) at theta (*, D); they are -inf outside the support."""
        return self.unchecked_log_prob(self._checked(theta))

    def site_log_probs(self, theta: Any) -> dict[str, Array]:
        """Compute the log density (*) of each site's value at theta (*, D), by name.

        If the prior was cut to a box, these are the densities of the original prior. The dict is
        empty if the distribution of any site depends on the value of another site.
        """
        return self.unchecked_site_log_probs(self._checked(theta))

    def contains(self, theta: Any) -> Array:
        """Return whether theta (*, D) is finite and in the support; bool of shape (*)."""
        return self.unchecked_contains(self._checked(theta))

    def flatten(self, values: Mapping[str, Any]) -> Array | np.ndarray:
        """Join named values `{name: (*, *event)}` into flat vectors (*, D)."""
        if not isinstance(values, Mapping) or set(self.names) ^ set(values):
            got = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"values: expected parameters {sorted(self.names)}, got {got}")
        arrays = {}
        for name, shape in self.event_shapes.items():
            value = self._exact(name, values[name])
            if value.shape[max(value.ndim - len(shape), 0) :] != shape:
                raise ValueError(f"{name}: expected shape (*, *{shape}), got {value.shape}")
            arrays[name] = value
        return self.unchecked_flatten(arrays)

    def unflatten(self, theta: Any) -> dict[str, Any]:
        """Split flat vectors (*, D) into named values `{name: (*, *event)}`."""
        return self.unchecked_unflatten(self._columns_of(theta))

    def structured(self, theta: Any) -> Any:
        """Convert theta (*, D) to the simulator's input: a dict of named values, or one array."""
        return self.unchecked_structured(self._columns_of(theta))

    def from_standard(self, y: ArrayLike) -> Array | np.ndarray:
        """Map standard coordinates (*, d) to parameters (*, D) inside the support."""
        return self.add_offset(self.unchecked_from_standard(self._checked_standard(y)))

    def to_standard(self, theta: Any) -> Array:
        """Map parameters (*, D) inside the support to standard coordinates (*, d).

        In standard coordinates, every parameter whose prior has a CDF has mean 0 and variance 1:
        it is uniform on (-sqrt 3, sqrt 3) where `bounded` is True, and standard normal otherwise.
        """
        return self.unchecked_to_standard(self._checked(theta))

    def standard_log_det(self, y: ArrayLike, theta: Any) -> Array:
        """Compute the log absolute determinant of the Jacobian of `from_standard`.

        Args:
            y: Standard coordinates, shape (*, d).
            theta: The parameters `from_standard(y)`, shape (*, D).

        Returns:
            Log determinants, shape (*).
        """
        return self.unchecked_log_det(self._checked_standard(y), self._checked(theta))

    def center(self, batch: tuple[int, ...] = ()) -> Array | np.ndarray:
        """Return one point inside the support, repeated to the shape (*batch, D)."""
        return self.add_offset(self.unchecked_center(batch))

    # methods for this package: these assume arrays of the right shapes

    @abc.abstractmethod
    def unchecked_center(self, batch: tuple[int, ...]) -> Array:
        """Return one point inside the support, repeated to the shape (*batch, D)."""

    @abc.abstractmethod
    def unchecked_sample(self, key: Key, n: int) -> Array:
        """Draw n parameter vectors (n, D)."""

    @abc.abstractmethod
    def unchecked_contains(self, theta: Array) -> Array:
        """Return whether theta (*, D) is in the support."""

    @abc.abstractmethod
    def unchecked_log_prob_inside(self, theta: Array) -> Array:
        """Compute the log density at theta (*, D), which must be inside the support."""

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
        """Compute the log Jacobian determinant at y (*, d), where theta = from_standard(y)."""

    def unchecked_log_prob(self, theta: Array) -> Array:
        """Compute log densities (*) at theta (*, D); they are -inf outside the support."""
        if not theta.size:  # numpyro reshapes with -1, which fails without rows
            return jnp.zeros(theta.shape[:-1])
        inside = self.unchecked_contains(theta)
        safe = jnp.where(inside[..., None], theta, self.unchecked_center(theta.shape[:-1]))
        return jnp.where(inside, self.unchecked_log_prob_inside(safe), -jnp.inf)

    def subtract_offset(self, theta: Any) -> Array:
        """Return theta (*, D) minus the offset, in JAX's precision.

        The difference is computed in double precision on the host. Inside a JAX transformation,
        theta was already rounded to single precision.
        """
        values = self._exact("theta", self.by_name(theta))
        offset = np.array(self.layout.offset)
        if not len(offset):
            return jnp.asarray(values)
        if is_traced(values):
            return jnp.subtract(values, jnp.broadcast_to(jnp.asarray(offset), values.shape))
        return jnp.asarray(values - offset, jnp.result_type(float))

    def by_name(self, theta: Any) -> Any:
        """Match parameters by name: flatten a dict, or reorder the columns of a table.

        Args:
            theta: A dict `{name: (*, *event)}`, which becomes an array (*, D); or a table, whose
                columns are put in the order of the labels if the prior has names. Arrays are
                returned unchanged.

        Raises:
            ValueError: The names differ from those of the parameters.
        """
        if isinstance(theta, Mapping):
            return self.flatten(theta)
        columns = column_names(theta)
        is_known = columns is not None and sorted(columns) == sorted(self.labels)
        return reorder_columns("theta", theta, self.labels if self.is_named or is_known else None)

    def add_offset(self, theta: Array) -> Array | np.ndarray:
        """Return theta (*, D) plus the offset.

        With an offset, the result is a NumPy array of float64; inside a JAX transformation it is an
        array in single precision.
        """
        if not self.layout.offset:
            return theta
        if is_traced(theta):
            return theta + jnp.broadcast_to(
                jnp.asarray(self.layout.offset, theta.dtype), theta.shape
            )
        return np.asarray(theta, np.float64) + np.asarray(self.layout.offset)

    def unchecked_flatten(self, values: Mapping[str, Any]) -> Any:
        """Join named values into flat vectors (*, D)."""
        return self.layout.join(values, self.layout.shapes)

    def unchecked_unflatten(self, theta: Any) -> dict[str, Any]:
        """Split flat vectors (*, D) into named values."""
        return self.layout.split(theta)

    def unchecked_structured(self, theta: Any) -> Any:
        """Convert theta (*, D) to the simulator's input."""
        values = self.layout.split(theta)
        return values if self.is_named else values[self.names[0]]

    def _exact(self, name: str, values: Any) -> Array | np.ndarray:
        """Convert parameters to an array; with an offset, to float64 on the host."""
        if not self.layout.offset or is_traced(values):
            return jnp.asarray(as_real_array(name, values))
        array = as_array(name, values)
        require_real(name, array.dtype)
        return np.asarray(array, np.float64)

    def _checked(self, theta: Any) -> Array:
        """Return theta minus the offset."""
        return self.subtract_offset(self._columns_of(theta))

    def _columns_of(self, theta: Any) -> Array | np.ndarray:
        """Convert theta to an array (*, D). Raise ValueError if it does not have D columns."""
        array = self._exact("theta", self.by_name(theta))
        if array.ndim == 0 or array.shape[-1] != self.dim:
            raise ValueError(
                f"theta: expected shape (*, {self.dim}) for {self.labels}, got {array.shape}"
            )
        return array

    def _checked_standard(self, y: ArrayLike) -> Array:
        y = jnp.asarray(as_real_array("y", y))
        y = y if jnp.issubdtype(y.dtype, jnp.floating) else y.astype(float)
        if y.ndim == 0 or y.shape[-1] != self.standard_dim:
            raise ValueError(f"y: expected shape (*, {self.standard_dim}), got {y.shape}")
        return y


@partial(jax.jit, static_argnums=2)
@full_precision
def _sample(prior: Prior, key: Key, n: int) -> Array:
    # compile the draw as one program: a truncated distribution takes seconds to compile if each
    # operation is compiled separately
    return prior.unchecked_sample(key, n)
