"""The class of a simulation-based inference task.

Public names: `Task`, `ReferenceFailed`, `SampleReference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.errors import SbiFlowsError
from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key, Obs, Simulator
from sbi_flows.prior import Prior, PriorLike, as_prior
from simulators.adapters import stored

SampleReference: TypeAlias = Callable[[Key, Any, int], Array]
"""Function `(key, x, n)` that returns draws of the exact posterior given x, shape (n, D)."""

OBSERVATION_SEED = 2101_04653
REFERENCE_SEED = 4653_2101


class ReferenceFailed(SbiFlowsError):
    """Error of a reference sampler: the observation is impossible, or the MCMC chains disagree."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Task:
    """Simulation-based inference problem: a prior, a simulator, observations and a reference.

    Observation i is a simulation at a draw from the prior; the draw and the simulation use fixed
    random keys. In a task with real data, the observations are the data.

    Attributes:
        name: Name in the registry.
        prior: Any argument of `sf.as_prior`: a numpyro distribution over a vector, a dict of named
            distributions, or a model.
        simulator: Function `(key, theta) -> x` of one parameter vector, or of a dict if the prior
            is a dict. JAX can trace it, or it is an `ExternalSimulator`.
        citation: Source of the task.
        sample_reference: Function `(key, x, n)` that returns draws of the exact posterior given x,
            shape (n, D). Failed draws are NaN. None if there is no exact sampler.
        num_observations: Number of observations.
        observed: Real observations, shape (num_observations, *event), or a tuple of dicts of
            arrays. None if the observations are simulated.
        stored_as: Name of the files with reference draws; None if draws are not stored.
        missing: Whether NaN in a simulation marks a missing entry, not a failed simulation.

    Example:
        >>> from simulators import two_moons
        >>> task = two_moons()
        >>> task
        Task('two_moons', D=2, observations=10)
        >>> task.observation(1).shape, task.reference(1, n=100).shape
        ((2,), (100, 2))
    """

    name: str
    prior: PriorLike
    simulator: Simulator
    citation: str
    sample_reference: SampleReference | None = None
    num_observations: int = 10
    observed: np.ndarray | tuple[Obs, ...] | None = None
    stored_as: str | None = None
    missing: bool = False

    def __post_init__(self) -> None:
        if self.num_observations < 1:
            raise ValueError(
                f"num_observations: expected at least one, got {self.num_observations}"
            )
        if self.observed is not None and len(self.observed) != self.num_observations:
            raise ValueError(
                f"observed: expected {self.num_observations} rows, got {len(self.observed)}"
            )

    def __repr__(self) -> str:
        return f"Task({self.name!r}, D={self.dim}, observations={self.num_observations})"

    @property
    def labels(self) -> tuple[str, ...]:
        """Label of each of the D parameters."""
        return self._flat_prior.labels

    @property
    def dim(self) -> int:
        """Number D of parameters."""
        return self._flat_prior.dim

    def observation(self, i: int) -> Obs:
        """Return observation i, shape (*event).

        The observation is the same in every process and in every floating-point precision.

        Args:
            i: Number of the observation, from 1 to `num_observations`.

        Raises:
            ValueError: i is not between 1 and `num_observations`.
        """
        self._check_index(i)
        if self.observed is not None:
            return jax.tree.map(jnp.asarray, self.observed[i - 1])
        # random bits differ between float32 and float64: always use the same precision
        with jax.enable_x64(False):
            theta, noise_key = self._draw(i)
            return _simulate(self._flat_prior, self.simulator, noise_key, theta)

    def true_parameters(self, i: int) -> Array:
        """Return the parameters at which observation i was simulated, shape (D,).

        Raises:
            ValueError: i is out of range, or the observation is real data.
        """
        self._check_index(i)
        if self.observed is not None:
            raise ValueError(f"{self.name}: observation {i} is real data, its parameters unknown")
        with jax.enable_x64(False):
            return self._draw(i)[0]

    def reference(self, i: int, n: int = 10_000) -> Array:
        """Draw from the exact posterior given observation i, shape (n, D).

        Raises:
            ValueError: i is out of range, n is not positive, or the task has no exact sampler.
            ReferenceFailed: The sampler failed.
        """
        x = self.observation(i)
        if self.sample_reference is None:
            raise ValueError(f"{self.name}: expected a task with an exact sampler, got none")
        if n < 1:
            raise ValueError(f"n: expected at least one draw, got {n}")
        stored_draws = self._stored_draws(i, n)
        if stored_draws is not None:
            return stored_draws
        draws = self.sample_reference(self.reference_key(i), x, n)
        num_failed = int(jnp.sum(~jnp.all(jnp.isfinite(draws), axis=-1)))
        if num_failed:
            raise ReferenceFailed(
                f"{self.name}: {num_failed} of {n} reference draws could not be made for "
                f"observation {i}"
            )
        return draws

    def stored_observation(self, i: int) -> np.ndarray:
        """Return observation i in the form that the reference sampler takes.

        A file of reference draws also contains the observation, so that draws that were made for
        another observation can be recognised.
        """
        prepare = getattr(self.sample_reference, "prepare", jnp.asarray)
        return np.asarray(prepare(self.observation(i)))

    def reference_key(self, i: int) -> Key:
        """Return the random key of the reference draws for observation i."""
        return jax.random.fold_in(jax.random.key(REFERENCE_SEED), i)

    def _stored_draws(self, i: int, n: int) -> Array | None:
        """Read n stored reference draws, evenly spread over the file; None if it holds fewer."""
        if self.stored_as is None:
            return None
        folders = (stored.cache_folder(), stored.FOLDER)
        rows = stored.load(self.stored_as, i, self.stored_observation(i), folders)
        if rows is None or len(rows) < n:
            return None
        return jnp.asarray(rows[np.linspace(0, len(rows) - 1, n).astype(int)])

    @cached_property
    def _flat_prior(self) -> Prior:
        return as_prior(self.prior)

    def _draw(self, i: int) -> tuple[Array, Key]:
        key = jax.random.fold_in(jax.random.key(OBSERVATION_SEED), i)
        prior_key, noise_key = jax.random.split(key)
        with jax.numpy_rank_promotion("allow"):  # some numpyro distributions do so
            return self._flat_prior.sample(prior_key, 1)[0], noise_key

    def _check_index(self, i: Any) -> None:
        if isinstance(i, bool) or not isinstance(i, int | np.integer):
            raise ValueError(f"observation: expected an integer, got {i!r}")
        if not 1 <= i <= self.num_observations:
            raise ValueError(
                f"observation: expected 1 to {self.num_observations} for {self.name}, got {i}"
            )


@partial(jax.jit, static_argnums=1)
@full_precision
def _simulate(prior: Prior, simulator: Simulator, key: Key, theta: Array) -> Obs:
    return simulator(key, prior.structured(theta))
