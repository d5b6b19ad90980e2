"""Rows of external simulators: the tasks that are sent to workers, and the arrays they fill.

Public names: `external_tasks`, `empty_outputs`, `put_row`.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import Array

from sbi_flows.core.typing import Key
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.executors import External, Row, Task, row_seeds


def external_tasks(prior: Prior, theta: Array, keys: Key, first_row: int) -> list[Task]:
    """Return row number, seed and named parameters of each row of theta (N, D)."""
    values = jax.tree.map(np.asarray, prior.unchecked_structured(theta))
    return [
        (first_row + i, seed, jax.tree.map(lambda a, i=i: a[i], values))
        for i, seed in enumerate(row_seeds(keys))
    ]


def empty_outputs(simulator: External, n: int) -> dict[str, np.ndarray]:
    """Return arrays for n observations, filled with NaN, or with 0 where the dtype has no NaN."""
    return {
        name: np.full((n, *shape), np.nan if np.dtype(dtype).kind == "f" else 0, dtype)
        for name, (shape, dtype) in simulator.job.outputs.items()
    }


def put_row(
    x: dict[str, np.ndarray], reasons: dict[int, str], number: int, position: int, row: Row
) -> None:
    """Store the result of a row.

    Args:
        x: Arrays that receive the observation.
        reasons: Reasons of failed rows, by row number, which receive the reason of a failure.
        number: Row number.
        position: Position of the row in the arrays.
        row: Its result.
    """
    if row.x is None:
        reasons[number] = row.reason
        return
    for name, value in row.x.items():
        x[name][position] = value
