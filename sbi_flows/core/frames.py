"""Conversion of tables, such as pandas or polars data frames, to arrays with named columns.

Tables are recognised by their attributes, so that no library of tables is imported. The columns of
a table, and the entries of a dict, are matched by name.

Public names: `is_table`, `column_names`, `frame_columns`, `reorder_columns`, `table_array`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.core.pytrees import is_traced


def is_table(value: Any) -> bool:
    """Return whether a value is a data frame or a series (one column or one row of a frame)."""
    return callable(getattr(value, "to_numpy", None)) and not isinstance(
        value, np.ndarray | jax.Array
    )


def column_names(value: Any) -> tuple[str, ...] | None:
    """Return the names of a data frame's columns, or of the entries of one of its rows.

    Returns:
        The names; None if the value is not a table, or if its columns have numbers for names.
    """
    if not is_table(value):
        return None
    names = getattr(value, "columns", None)
    if names is None:  # a row of a data frame, as a series with the columns as its index
        names = getattr(value, "index", ())
    names = list(names) if not callable(names) else []
    return tuple(names) if names and all(isinstance(name, str) for name in names) else None


def frame_columns(value: Any) -> tuple[str, ...] | None:
    """Return the names of a data frame's columns; None for a series and for numbered columns."""
    return column_names(value) if hasattr(value, "columns") else None


def reorder_columns(name: str, value: Any, names: Sequence[str] | None) -> Any:
    """Reorder the columns of a table or dict to the order of `names`.

    Args:
        name: Name of the argument, for the error message.
        value: A table with named columns, or a dict of columns. Other values are returned
            unchanged.
        names: Names of the columns; None if they are not known. Then `value` is returned unchanged.

    Returns:
        A table; for a dict, an array with the columns on its last axis.

    Raises:
        ValueError: The columns of the table or dict have other names.
    """
    columns = tuple(value) if isinstance(value, Mapping) else column_names(value)
    if names is None or columns is None:
        return value
    if sorted(columns) != sorted(names):
        raise ValueError(
            f"{name}: expected the columns {', '.join(names)}, got {', '.join(map(str, columns))}; "
            "rename or select the columns"
        )
    if isinstance(value, Mapping):
        stack = jnp.stack if is_traced(dict(value)) else np.stack
        return stack([value[n] for n in names], axis=-1)
    return value if columns == tuple(names) else value[list(names)]


def table_array(name: str, value: Any) -> np.ndarray:
    """Convert a table to an array of numbers; missing values become NaN, truth values 0 and 1.

    Args:
        name: Name of the argument, for the error message.
        value: A data frame, shape (N, C), or a series, shape (N,).

    Raises:
        ValueError: A column contains anything but real numbers; the message names the column.
    """
    if not hasattr(value, "columns"):
        return _column(name, value)
    labels = list(value.columns)
    columns = [_column(f"{name}: column {label!r}", value[label]) for label in labels]
    if not columns:
        raise ValueError(f"{name}: expected a table with at least one column, got none")
    return np.stack(columns, axis=-1)


def _column(name: str, column: Any) -> np.ndarray:
    array = np.asarray(column.to_numpy())
    if array.dtype != object:
        return array
    # nullable dtypes of pandas give objects: numbers, truth values and pandas.NA
    try:
        return np.asarray(column.to_numpy(dtype="float64", na_value=np.nan))
    except (TypeError, ValueError):
        kinds = sorted({type(entry).__name__ for entry in array.ravel()[:1000]})
        raise ValueError(
            f"{name}: expected real numbers, got {', '.join(kinds)}; convert or drop the column"
        ) from None
