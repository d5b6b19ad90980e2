"""Conversion of simulations to training rows: standard coordinates and features.

Public names: `contains`, `standard_coordinates`, `prepare`, `with_emulated`, `rows_in_memory`,
`stream_of`, `summarised`, `checked_simulations`,
`screened_entries`, `Problem`.

Each function is compiled as one program. Without this, a new process would compile about thirty
programs, one for each operation.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.compilation import compiled_per_size, drop_old_programs
from sbi_flows.core.errors import SbiFlowsWarning, SimulationFailed
from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key, Obs
from sbi_flows.core.warn import warn_user
from sbi_flows.densities.conditional import Blueprint, Weights
from sbi_flows.densities.embedded import present_fraction, spaces_of, training_inputs
from sbi_flows.estimators.emulator import Emulated
from sbi_flows.observations.origin import fit_origin
from sbi_flows.observations.screening import dependent_features
from sbi_flows.observations.shared import SharedAxes
from sbi_flows.observations.standardise import (
    Standardiser,
    entry_count,
    fit_standardiser,
    flatten_rows,
)
from sbi_flows.observations.typicality import fit_typicality
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.fingerprints import UsedRows
from sbi_flows.simulations.simulations import Simulations, observation_shape
from sbi_flows.training import Stream, Training, TrainingData

SAMPLE_ROWS, MIN_SAMPLE_ROWS = 2**16, 2**10
"""Maximum and minimum number of rows that are in memory if the simulations are on disk."""

SAMPLE_ENTRIES, CHUNK_ENTRIES = 2**27, 2**25
"""Number of entries, above the minimum number of rows, of the rows in memory and of the rows that
are read at once. They limit the memory for long rows, such as images."""

MIN_CHUNK_ROWS = 2**8
"""Minimum number of rows that are read at once."""


@compiled_per_size
@jax.jit
def contains(prior: Prior, theta: Array) -> Array:
    """Return whether each row of theta lies in the support of the prior."""
    return prior.unchecked_contains(theta)


@compiled_per_size
@jax.jit
@full_precision
def standard_coordinates(prior: Prior, theta: Array) -> Array:
    """Return standard coordinates (N, d) of theta (N, D)."""
    return prior.unchecked_to_standard(theta)


def prepare(
    prior: Prior,
    theta: Any,
    x: Obs,
    shared: SharedAxes | None = None,
    *,
    has_missing: bool = False,
) -> tuple[TrainingData, Standardiser, Obs]:
    """Return the training rows, the standardiser fitted to x, and x relative to its origin.

    Args:
        prior: The prior.
        theta: Parameters, shape (N, D).
        x: Observations, shape (N, *event).
        shared: For each array of x, the axes whose entries have one location and one scale.
        has_missing: Whether entries can be missing.
    """
    origin = fit_origin(x, shared)
    relative = x if origin is None else origin.subtract(x)
    data, standardiser = _prepared(prior, theta, relative, shared, has_missing)
    return data, standardiser._replace(origin=origin), relative


@compiled_per_size
@partial(jax.jit, static_argnums=(3, 4))
@full_precision
def _prepared(
    prior: Prior, theta: Array, x: Obs, shared: SharedAxes | None, has_missing: bool
) -> tuple[TrainingData, Standardiser]:
    y = prior.unchecked_to_standard(theta)
    standardiser = fit_standardiser(x, shared, has_missing=has_missing)
    return TrainingData(y, standardiser(x), prior.unchecked_log_det(y, theta)), standardiser


def with_emulated(
    prior: Prior, data: TrainingData, emulated: Emulated, member_rows: int
) -> TrainingData:
    """Append emulated rows to the training rows; each member gets `member_rows` of them."""
    return dataclasses.replace(_appended(prior, data, emulated), member_rows=member_rows)


@compiled_per_size
@jax.jit
@full_precision
def _appended(prior: Prior, data: TrainingData, emulated: Emulated) -> TrainingData:
    y, features = emulated
    log_det = prior.unchecked_log_det(y, prior.unchecked_from_standard(y))
    more = TrainingData(y, features, log_det)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), data, more)


def rows_in_memory(key: Key, simulations: Simulations) -> tuple[Simulations, np.ndarray | None]:
    """Return the valid rows; for simulations on disk, return a random sample of them.

    Args:
        key: Random key of the sample.
        simulations: The simulations.

    Returns:
        The rows, and their indices among the valid rows; None in place of the indices if all valid
        rows are returned.
    """
    if not simulations.on_disk:
        return simulations.only_valid(), None
    count = simulations.num_valid
    entries = entry_count(observation_shape(simulations.x))
    size = min(SAMPLE_ROWS, max(MIN_SAMPLE_ROWS, SAMPLE_ENTRIES // entries), count)
    places = jax.random.choice(key, count, (size,), replace=False)
    sample = np.sort(np.asarray(places))
    return simulations[np.flatnonzero(simulations.valid)[sample]], sample


def stream_of(
    prior: Prior,
    blueprint: Blueprint,
    standardiser: Standardiser,
    simulations: Simulations,
    sample: np.ndarray,
    training: Training,
) -> Stream:
    """Return a stream that reads valid rows of simulations on disk during training.

    Args:
        prior: Prior of the fit.
        blueprint: Description of the model.
        standardiser: Standardiser that maps observations to features.
        simulations: Simulations on disk.
        sample: Indices, among the valid rows, of the rows that are in memory.
        training: Settings of the fit.
    """
    numbers = np.flatnonzero(simulations.valid)

    def read(places: np.ndarray) -> tuple[Array, Array]:
        chunk = simulations[numbers[places]]
        relative = standardiser.subtract_origin(chunk.x)
        return _read(prior, blueprint, standardiser._replace(origin=None), chunk.theta, relative)

    entries = entry_count(observation_shape(simulations.x))
    max_rows = max(MIN_CHUNK_ROWS, CHUNK_ENTRIES // entries)
    batch = training.batch(len(numbers))
    return Stream(np.arange(len(numbers)), sample, read, max_rows, batch)


@compiled_per_size
@partial(jax.jit, static_argnums=1)
@full_precision
def _read(
    prior: Prior, blueprint: Blueprint, standardiser: Standardiser, theta: Array, x: Obs
) -> tuple[Array, Array]:
    return prior.unchecked_to_standard(theta), training_inputs(blueprint, standardiser(x))


def summarised(key: Key, posterior: Posterior, features: Array) -> Posterior:
    """Return the posterior with a description of its training simulations in `typicality`.

    Args:
        key: Random key that the user gave to the fit.
        posterior: Fitted posterior.
        features: All features of the training rows, shape (N, C).
    """
    blueprint, weights = posterior.blueprints[0], posterior.weights[0]
    spaces = partial(spaces_of, blueprint, weights)
    standardiser = None if blueprint.sizes.summaries else posterior.standardiser
    present = present_fraction(blueprint, features)
    typicality = fit_typicality(key, spaces, standardiser, features, present)
    return dataclasses.replace(posterior, typicality=typicality)


def checked_simulations(prior: Prior, simulations: Simulations) -> Simulations:
    """Return the simulations relative to the prior.

    Raises:
        ValueError: theta has the wrong shape or lies outside the prior's support.
        SimulationFailed: Fewer than 10 rows are valid.
    """
    # before the first program of this size is compiled
    drop_old_programs((len(simulations), simulations.num_valid))
    simulations = simulations.relative_to(prior)
    dim = simulations.theta.shape[1]
    if dim != prior.dim:
        raise ValueError(f"theta: expected {prior.dim} columns for {prior.labels}, got {dim}")
    outside = int(np.sum(~np.asarray(contains(prior, simulations.theta))))
    if outside:
        raise ValueError(
            f"theta: expected values inside the prior's support, got {outside} rows outside"
        )
    if simulations.num_valid < 10:
        raise SimulationFailed(
            "expected at least 10 finite simulations to train on, got "
            f"{simulations.num_valid} of {len(simulations)}"
        )
    return simulations


def screened_entries(data: TrainingData, level: float | None) -> tuple[int, ...] | None:
    """Return the indices of the entries that the screening selects; None means all entries."""
    if level is None:
        return None
    places = np.flatnonzero(dependent_features(data.y, data.features, level))
    if not len(places):
        warn_user(
            f"no entry of the observation passes screening={level}; all are kept", SbiFlowsWarning
        )
        return None
    return tuple(places.tolist())


class Problem(NamedTuple):
    """Data and model of a fit, prepared from the simulations.

    Attributes:
        blueprint: Description of the model.
        standardiser: Standardiser of all entries of the observation.
        observation: Shape and dtype of one observation.
        data: Training rows, with the features that the model uses.
        x: Observations of the training rows, relative to the origin of the standardiser.
        features: All features of the training rows, shape (N, C).
        screened: Indices of the entries that the screening selected; None without screening.
    """

    blueprint: Blueprint
    standardiser: Standardiser
    observation: Obs
    data: TrainingData
    x: Obs
    features: Array
    screened: tuple[int, ...] | None

    @property
    def emulator_data(self) -> tuple[Array, Standardiser | None]:
        """Data (N, C) for an emulator, and their standardiser.

        With `Summaries`, they are the fixed summaries, and None, because the model does not
        standardise them. Otherwise they are the selected entries of the observation.
        """
        if self.blueprint.sizes.summaries_only:
            return self.data.features, None
        places = self.blueprint.feature_indices
        standardiser = self.standardiser.of(places)._replace(origin=None)
        return self.blueprint.select(flatten_rows(self.x)), standardiser

    def posterior(
        self, prior: Prior, key: Key | None, rows: UsedRows, weights: Weights
    ) -> Posterior:
        """Return the posterior with these weights; a key adds a summary of the training rows."""
        posterior = Posterior(
            prior,
            (self.blueprint,),
            (weights,),
            (1.0,),
            self.standardiser,
            self.observation,
            used_rows=rows,
        )
        return posterior if key is None else summarised(key, posterior, self.features)
