"""The rows that an estimator trains on: standard coordinates, features and log determinants.

Public names: `Rows`, `contains`, `standard`, `prepared`, `joined`, `sample_of`, `stream_of`.

One program each: operation by operation, a new process would compile some thirty.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key, Obs
from sbi_flows.densities.conditional import Blueprint
from sbi_flows.estimators.emulator import Emulated
from sbi_flows.observations.standardise import Standardiser, fit_standardiser
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.simulations import Simulations
from sbi_flows.training import Stream

SAMPLE = 2**16
"""Rows in memory of simulations that are not."""


class Rows(NamedTuple):
    """Standard coordinates (N, d), features (N, C) and the log det of each row (N,)."""

    y: Array
    features: Array
    offset: Array


@jax.jit
def contains(prior: Prior, theta: Array) -> Array:
    """Whether each row of theta lies in the prior's support."""
    return prior.contains(theta)


@jax.jit
@full_precision
def standard(prior: Prior, theta: Array) -> Array:
    """Standard coordinates of theta."""
    return prior.to_standard(theta)


@jax.jit
@full_precision
def prepared(prior: Prior, theta: Array, x: Obs) -> tuple[Rows, Standardiser]:
    """Rows to train on, and what standardises x."""
    y, standardiser = prior.to_standard(theta), fit_standardiser(x)
    return Rows(y, standardiser(x), prior.standard_log_det(y, theta)), standardiser


@jax.jit
@full_precision
def joined(prior: Prior, rows: Rows, more: Emulated) -> Rows:
    """The rows, and after them those of an emulator."""
    offset = prior.standard_log_det(more.y, prior.from_standard(more.y))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rows, Rows(*more, offset))


def sample_of(key: Key, simulations: Simulations) -> np.ndarray:
    """Places among the valid rows of those that are kept in memory, in their order."""
    count = simulations.num_valid
    chosen = jax.random.choice(key, count, (min(SAMPLE, count),), replace=False)
    return np.sort(np.asarray(chosen))


def stream_of(
    prior: Prior,
    blueprint: Blueprint,
    standardiser: Standardiser,
    simulations: Simulations,
    sample: np.ndarray,
) -> Stream:
    """The valid rows of simulations whose observations stay on disk, by their places."""
    numbers = np.flatnonzero(simulations.valid)

    def read(places: np.ndarray) -> tuple[Array, Array]:
        chunk = simulations[numbers[places]]
        return _read(prior, blueprint, standardiser, chunk.theta, chunk.x)

    return Stream(np.arange(len(numbers)), sample, read)


@partial(jax.jit, static_argnums=1)
@full_precision
def _read(
    prior: Prior, blueprint: Blueprint, standardiser: Standardiser, theta: Array, x: Obs
) -> tuple[Array, Array]:
    return prior.to_standard(theta), blueprint.select_features(standardiser(x))
