"""Adapter that turns a posterior of another library into an `AbstractPosterior`.

Public names: `SamplesPosterior`, `PosteriorLike`, `ExternalPosterior`, `as_posterior`,
`single_shape`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.artefact.layers import SavedPosterior
from sbi_flows.core.checks import as_array, as_tree
from sbi_flows.core.doubles import as_data_array
from sbi_flows.core.pytrees import register_pytree
from sbi_flows.core.typing import Key, Obs
from sbi_flows.observations.batches import COMPLETE, Missing, as_batch
from sbi_flows.posteriors.base import AbstractPosterior
from sbi_flows.prior.prior import Prior


@runtime_checkable
class SamplesPosterior(Protocol):
    """Object that can be used as a posterior: it has a prior and can be sampled.

    Coverage tests also need `log_prob(theta, x)`. `sample_and_log_prob(key, x, n)` is optional. All
    methods follow the conventions of `AbstractPosterior`. An object with credible regions other
    than those of highest density has a method `credible_levels(key, theta, x)`. An object whose
    densities are solutions of an ODE has an attribute `needs_ode`, which is True.
    """

    @property
    def prior(self) -> Prior:
        """Prior of the parameters; it defines their names."""
        ...

    def sample(self, key: Key, x: Obs, n: int) -> Array:
        """Draw parameters, shape (n, D) for one observation or (B, n, D) for a batch."""
        ...


PosteriorLike: TypeAlias = AbstractPosterior | SamplesPosterior
"""Posterior of this library, or an object of another library that can be sampled."""


@dataclasses.dataclass(frozen=True)
class _Bound:
    """Checked observations: a batch (B, *event), and whether the user passed one observation."""

    x: Obs
    is_single: bool

    def unbatched(self) -> Obs:
        """Return the observations in the shape in which the user passed them."""
        return jax.tree.map(lambda leaf: leaf[0], self.x) if self.is_single else self.x

    def with_axis(self, values: Array) -> Array:
        """Add a leading axis of length 1 to `values` if there is a single observation."""
        return values[None] if self.is_single else values


register_pytree(_Bound, leaves=("x",), static=("is_single",))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ExternalPosterior(AbstractPosterior):
    """A posterior of another library.

    Attributes:
        posterior: The user's object.
        observation: Shape and dtype of one observation (`jax.ShapeDtypeStruct` leaves).
        record: Facts about the posterior, as plain JSON data.
    """

    posterior: SamplesPosterior
    observation: Obs
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        """Show the user's object."""
        return f"ExternalPosterior({self.posterior!r})"

    @property
    def prior(self) -> Prior:
        """Prior of the parameters; it defines their names."""
        return self.posterior.prior

    @property
    def typicality(self) -> None:
        """None, because the training simulations are not known."""
        return None

    @property
    def space_labels(self) -> tuple[str, ...]:
        """An empty tuple, because features are not known."""
        return ()

    def present_fraction(self, x: Obs) -> None:
        """Return None, because features are not known."""
        del x

    @property
    def missing(self) -> Missing:
        """No entry may be missing, because the training simulations are not known."""
        return COMPLETE

    @property
    def used_rows(self) -> None:
        """None, because the training simulations are not known."""
        return None

    @property
    def origin(self) -> AbstractPosterior:
        """This posterior itself, because it is not derived from another one."""
        return self

    @property
    def needs_ode(self) -> bool:
        """Return True if a density needs an ODE solve, which evaluates a network many times."""
        return self._optional("needs_ode", "solved") or False

    @property
    def has_own_regions(self) -> bool:
        """Whether `credible_levels` uses regions other than those of highest density."""
        return self._optional("credible_levels", "density_ranks") is not None

    def credible_levels(self, key: Key, theta: Any, x: Obs) -> np.ndarray:
        """Return the level of the smallest credible region that contains each theta (B, D).

        Raises:
            ValueError: `has_own_regions` is False.
        """
        function = self._optional("credible_levels", "density_ranks")
        if function is None:
            raise ValueError("posterior: expected one with credible regions of its own")
        return function(key, theta, x)

    def is_single(self, x: Obs) -> bool:
        """Return whether x is one observation, not a batch; raise ValueError if it is neither."""
        return as_batch(x, self.observation)[1]

    def spaces(self, x: Obs) -> tuple[np.ndarray, ...]:
        """Return an empty tuple, because features and embedding are not known."""
        del x
        return ()

    def to_saved(self) -> SavedPosterior:
        """Raise ValueError, because the user's object cannot be written to a file."""
        name = type(self.posterior).__name__
        raise ValueError(f"posterior: expected an sf.Posterior to save, got {name}")

    def _optional(self, *names: str) -> Any:
        """Return the user's attribute with the first of `names` that exists; None if none exists.

        The first name is the current one; the others are names of the same attribute in earlier
        versions.
        """
        found = (getattr(self.posterior, name, None) for name in names)
        return next((value for value in found if value is not None), None)

    def _bind(self, x: Obs) -> tuple[_Bound, bool]:
        batch, is_single = as_batch(x, self.observation)
        return _Bound(batch, is_single), is_single

    def _features_of(self, bound: _Bound) -> Array:
        return jnp.zeros((len(jax.tree.leaves(bound)[0]), 0))

    def _sample(self, key: Key, bound: _Bound, n: int, with_log_prob: bool) -> tuple[Array, Array]:
        x = bound.unbatched()
        both: Callable[..., Any] | None = self._optional("sample_and_log_prob")
        if with_log_prob and both is not None:
            draws, log_prob = both(key, x, n)
            return bound.with_axis(self.prior.subtract_offset(draws)), bound.with_axis(log_prob)
        draws = bound.with_axis(self.prior.subtract_offset(self.posterior.sample(key, x, n)))
        if with_log_prob:
            return draws, self._log_prob(draws, bound)
        return draws, jnp.zeros(draws.shape[:-1], draws.dtype)

    def _log_prob(self, theta: Array, bound: _Bound) -> Array:
        function: Callable[..., Any] | None = self._optional("log_prob")
        if function is None:
            name = type(self.posterior).__name__
            raise ValueError(f"posterior: expected an object with log_prob, got {name} without")
        values = self.prior.add_offset(theta)
        rows = values[0] if bound.is_single else values
        return bound.with_axis(function(rows, bound.unbatched()))

    def _standard_log_prob(self, y: Array, bound: _Bound) -> Array:
        return self._log_prob(self.prior.unchecked_from_standard(y)[:, None], bound)[:, 0]


register_pytree(
    ExternalPosterior, leaves=(), static=("posterior", "observation"), facts={"record": {}}
)


def as_posterior(posterior: PosteriorLike, observation: Obs) -> AbstractPosterior:
    """Return a posterior of this library unchanged, and any other as an `ExternalPosterior`.

    Args:
        posterior: The posterior.
        observation: Shape and dtype of one observation, for posteriors of other libraries.

    Raises:
        ValueError: The object has no prior or cannot be sampled.
    """
    if isinstance(posterior, AbstractPosterior):
        return posterior
    if not isinstance(posterior, SamplesPosterior):
        name = type(posterior).__name__
        raise ValueError(f"posterior: expected an object with prior and sample, got {name}")
    return ExternalPosterior(posterior, observation)


def single_shape(x: Obs) -> Obs:
    """Return the shape and dtype of x, which is one observation.

    Raises:
        ValueError: x has entries that are not real numbers.
    """
    rows = as_tree("x", x, lambda name, value: as_data_array(name, as_array(name, value)[None]))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), rows)
