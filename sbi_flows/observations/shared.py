"""Axes of an observation whose entries are standardised together.

Public names: `SharedAxes`, `pool`, `unpool`.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

SharedAxes: TypeAlias = tuple[tuple[int, ...], ...]
"""For each array of an observation, the axes whose entries have one location and one scale."""


def pool(leaf: Any, shared: tuple[int, ...]) -> Any:
    """Turn one array (N, *event) into rows (N * S, G) of G columns that pool S entries each.

    Args:
        leaf: NumPy or JAX array.
        shared: Axes of one observation whose entries are pooled; without any, S is 1.
    """
    axes = [1 + axis for axis in shared]
    others = [axis for axis in range(1, leaf.ndim) if axis not in axes]
    columns = math.prod(leaf.shape[axis] for axis in others)
    return leaf.transpose(0, *axes, *others).reshape(-1, columns)


def unpool(columns: Any, event: tuple[int, ...], shared: tuple[int, ...]) -> Any:
    """Give each entry of a flattened observation the value of its column, shape (C,).

    Args:
        columns: NumPy or JAX array of shape (G,), one value for each column of `pool`.
        event: Shape of one observation.
        shared: Axes that were pooled.
    """
    array = np if isinstance(columns, np.ndarray) else jnp
    like = [1 if axis in shared else n for axis, n in enumerate(event)]
    return array.broadcast_to(columns.reshape(like), event).reshape(-1)
