"""Tasks of external simulators, and the arrays in which their results are stored.

Public names: `external_tasks`, `empty_outputs`, `put_row`.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from sbi_flows.core.typing import Key
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.executors import External, Row, Task, row_seeds


def external_tasks(prior: Prior, theta: Any, keys: Key, first_row: int) -> list[Task]:
    """Return one task for each row of theta (N, D): row number, seed and named parameters."""
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
    """Store the result of a simulation: its observation in `x`, or its failure in `reasons`.

    Args:
        x: Arrays of observations, by name. This function writes one row of each array.
        reasons: Dict from the row number of a failed row to the reason of the failure. If the
            simulation failed, this function adds an entry.
        number: Row number.
        position: Index of the row in the arrays.
        row: Result of the simulation.
    """
    if row.x is None:
        reasons[number] = row.reason
        return
    for name, value in row.x.items():
        x[name][position] = value
