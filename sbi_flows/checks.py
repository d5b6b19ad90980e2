"""Checks of what the user gives, so that bad input fails before any long work.

Public names: `require_real`, `real_array`, `real_arrays`, `require_count`, `require_positive`,
`require_finite`, `require_fraction`, `require_object`, `writable_folder`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def require_real(name: str, dtype: Any) -> None:
    """Refuse what is no real number: text, objects, dates, keys, complex numbers.

    Complex numbers would lose their imaginary part when they become features; which real numbers
    stand for them (parts, modulus and phase) is the user's choice.

    Raises:
        ValueError: The dtype is not boolean, integer or real floating-point.
    """
    real = any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating))
    # NumPy counts spans of time among the integers
    if not real or jnp.issubdtype(dtype, np.timedelta64):
        raise ValueError(f"{name}: expected real numbers, got dtype {dtype}")


def real_array(name: str, value: Any) -> Array | np.ndarray:
    """The value as an array of real numbers, in a dtype that JAX holds.

    Returns:
        An array of JAX as it is. Of others, integers beyond the widest integer that JAX holds in
        its present precision become floats, as they would wrap round; floats beyond the widest
        float become infinite, so that they are met as such.

    Raises:
        ValueError: The value holds no real numbers.
    """
    if isinstance(value, Array):
        require_real(name, value.dtype)
        return value
    array = np.asarray(value)
    require_real(name, array.dtype)
    with np.errstate(over="ignore"):
        held = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    if jnp.issubdtype(held.dtype, jnp.integer) and not np.array_equal(held, array):
        return array.astype(jnp.result_type(float))
    return held


def real_arrays(name: str, tree: Any) -> Any:
    """An array, or a tree of arrays, of real numbers; a list of numbers is an array.

    Raises:
        ValueError: A leaf holds no real numbers.
    """

    def leaf(value: Any) -> Array | np.ndarray:
        return real_array(name, value)

    def holds_numbers(node: Any) -> bool:
        arrays = (Array, np.ndarray, dict)
        return isinstance(node, list | tuple) and not any(isinstance(v, arrays) for v in node)

    return jax.tree.map(leaf, tree, is_leaf=holds_numbers)


def require_count(least: int, **settings: Any) -> None:
    """Refuse settings that are not whole numbers of at least `least`."""
    for name, value in settings.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def require_positive(**settings: Any) -> None:
    """Refuse settings that are not above zero."""
    for name, value in settings.items():
        if not _is_number(value) or not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")


def require_finite(**settings: Any) -> None:
    """Refuse settings that are not finite numbers."""
    for name, value in settings.items():
        if not _is_number(value) or not np.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")


def require_fraction(**settings: Any) -> None:
    """Refuse settings outside [0, 1)."""
    for name, value in settings.items():
        if not _is_number(value) or not 0.0 <= value < 1.0:
            raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")


def require_object(name: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> None:
    """Refuse what is not of a kind, and a class where an object was meant.

    Raises:
        ValueError: The message says what is wanted, and what came.
    """
    if isinstance(value, type) or not isinstance(value, kind):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise ValueError(f"{name}: expected {wanted}, got {got}")


def writable_folder(name: str, path: Path) -> Path:
    """Make the folder where it is missing, and make sure that files can be written there.

    Raises:
        ValueError: It cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ValueError(f"{name}: cannot write to {path}: {error.strerror or error}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
