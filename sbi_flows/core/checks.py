"""Checks of arguments that report a mistake before any long computation starts.

Functions named `require_...` raise ValueError if an argument is invalid, and return nothing.
Functions named `as_...` convert a value, and raise ValueError if the conversion is impossible.

Public names: `require_real`, `as_array`, `as_real_array`, `as_tree`, `require_tree`,
`require_memory`, `as_random_key`, `require_count`, `require_positive`, `require_finite`,
`require_fraction`, `require_object`, `writable_folder`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.frames import is_table, table_array

MAX_TREE_DEPTH = 32
"""Maximum nesting of dicts, lists and tuples in an observation."""

_KEPT_DTYPES = {np.dtype(f"{kind}{8 * n}") for kind in ("int", "uint") for n in (1, 2, 4, 8)} | {
    np.dtype(kind) for kind in (bool, np.float16, jnp.bfloat16, np.float32, np.float64)
}
"""Dtypes that observations keep. All other real dtypes are converted to JAX's default float."""


def require_real(name: str, dtype: Any) -> None:
    """Raise ValueError unless a dtype is boolean, integer or real floating-point.

    Complex numbers are refused, because their imaginary part would be lost when they are converted
    to features. Users convert them to real numbers first, for example to real and imaginary parts,
    or to modulus and phase.

    Args:
        name: Name of the argument, for the error message.
        dtype: Dtype of the argument.
    """
    is_real = any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating))
    # NumPy's dtype of time differences is a subtype of its integers
    if not is_real or jnp.issubdtype(dtype, np.timedelta64):
        raise ValueError(f"{name}: expected real numbers, got dtype {dtype}")


def as_array(name: str, value: Any) -> Array | np.ndarray:
    """Convert a value to an array of any dtype; return a JAX array unchanged.

    Args:
        name: Name of the argument, for error messages.
        value: The value.

    Raises:
        ValueError: The value cannot be converted, is a masked array with masked entries, or needs
            more memory than the machine has.
    """
    if isinstance(value, Array):
        return value
    if isinstance(value, np.ma.MaskedArray):
        require_real(name, value.dtype)
        if count := np.ma.count_masked(value):
            raise ValueError(
                f"{name}: expected numbers, or NaN for a failure, got {count} masked entries"
            )
    if is_table(value):
        return table_array(name, value)
    if isinstance(value, list) and any(isinstance(row, Array | np.ndarray) for row in value):
        value = _require_equal_shapes(name, value)
    try:
        array = np.asarray(value)
    # for example a list of rows of different lengths, or an object whose `__array__` fails
    except Exception as error:
        raise ValueError(
            f"{name}: expected an array, got {type(value).__name__}: {str(error)[:200]}"
        ) from None
    require_memory(name, array.shape, array.dtype)
    return array


def _require_equal_shapes(name: str, rows: list[Any]) -> list[np.ndarray]:
    """Return a list of arrays on the host. Raise ValueError unless they have one shape."""
    try:
        arrays = [np.asarray(row) for row in rows]
    except Exception as error:  # a row may be any object
        raise ValueError(f"{name}: expected arrays in a list, got {str(error)[:200]}") from None
    shapes = {a.shape for a in arrays}
    if len(shapes) > 1:
        raise ValueError(
            f"{name}: expected rows of one shape in a list, got shapes "
            f"{', '.join(map(str, sorted(shapes)[:5]))}; use a tuple or a dict for several arrays"
        )
    return arrays


def as_real_array(name: str, value: Any) -> Array | np.ndarray:
    """Convert a value to an array of real numbers, in a dtype that JAX supports.

    Args:
        name: Name of the argument, for error messages.
        value: The value.

    Returns:
        A JAX array is returned unchanged. Any other value becomes a NumPy array in native byte
        order. In 32-bit mode, integers that would overflow become floats, and floats that would
        overflow become infinite.

    Raises:
        ValueError: The value holds anything but real numbers, or needs more memory than the machine
            has.
    """
    array = as_array(name, value)
    require_real(name, array.dtype)
    native_dtype = array.dtype.newbyteorder("=")
    if native_dtype not in _KEPT_DTYPES:
        with np.errstate(over="ignore"):
            return array.astype(jnp.result_type(float))
    if isinstance(array, Array):
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(jax.dtypes.canonicalize_dtype(native_dtype), copy=False)
    if jnp.issubdtype(converted.dtype, jnp.integer) and not np.array_equal(converted, array):
        return array.astype(jnp.result_type(float))
    return converted


def as_tree(
    name: str,
    tree: Any,
    convert: Callable[[str, Any], Any],
    like: Any = None,
    *,
    kept: tuple[type, ...] = (),
) -> Any:
    """Convert the leaves of an array, or of a dict or tuple of arrays.

    A list of arrays is one array; its entries are the rows. A list of dicts is converted to one
    dict of arrays; its entries are the rows of each array. A list or tuple of numbers is one array.
    If the tree `like` contains lists, a list of arrays is a container, like a tuple.

    Args:
        name: Name of the argument, for error messages.
        tree: The array or the tree.
        convert: Function that converts a leaf, such as `as_real_array`.
        like: A tree with the expected structure; None if it is not known.
        kept: Types of leaves that are returned unchanged.

    Returns:
        The converted tree.

    Raises:
        ValueError: A leaf cannot be converted, or the tree is invalid (`require_tree`).
    """
    require_tree(name, tree)
    has_lists = _has_lists(like)

    def leaf(value: Any) -> Any:
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            return _stacked_dicts(name, value, convert)
        return value if isinstance(value, kept) else convert(name, value)

    def is_array(node: Any) -> bool:
        if node is None:  # `leaf` refuses None; JAX would silently drop it
            return True
        if isinstance(node, list) and not has_lists:
            return True
        return isinstance(node, list | tuple) and not any(map(is_part, node))

    def is_part(value: Any) -> bool:
        """Return whether an entry of a list or a tuple is an array or a dict, not a number."""
        is_array = hasattr(value, "__array__") and np.ndim(value) > 0
        return is_array or isinstance(value, (dict, *kept))

    return jax.tree.map(leaf, tree, is_leaf=is_array)


def _has_lists(tree: Any) -> bool:
    """Return whether a tree has a list among its containers."""
    if isinstance(tree, dict | tuple):
        return any(map(_has_lists, tree.values() if isinstance(tree, dict) else tree))
    return isinstance(tree, list)


def _stacked_dicts(name: str, rows: list[dict], convert: Callable[[str, Any], Any]) -> Any:
    """Convert a list of dicts to one dict of arrays."""
    for row in rows:
        if row.keys() != rows[0].keys():
            first, other = (", ".join(map(str, r)) for r in (rows[0], row))
            raise ValueError(
                f"{name}: expected rows with the same names, got {first:.200} in the first row and "
                f"{other:.200} in another; give all rows the same names"
            )
    return {key: convert(f"{name}[{key!r}]", [row[key] for row in rows]) for key in rows[0]}


def require_tree(name: str, tree: Any) -> None:
    """Raise ValueError if a tree is nested too deeply, or a dict has keys that cannot be sorted.

    A container that contains itself counts as nested too deeply.

    Args:
        name: Name of the argument, for error messages.
        tree: The tree.
    """
    level = [tree]
    for _ in range(MAX_TREE_DEPTH):
        containers = {id(node): node for node in level if isinstance(node, dict | list | tuple)}
        level = []
        for node in containers.values():
            level += node.values() if isinstance(node, dict) else node
            if isinstance(node, dict):
                _require_sortable(name, node)
        if not level:
            return
    raise ValueError(
        f"{name}: expected at most {MAX_TREE_DEPTH} levels of dicts and lists, got more"
    )


def _require_sortable(name: str, node: dict) -> None:
    try:
        sorted(node)
    except TypeError:
        kinds = sorted({type(key).__name__ for key in node})
        raise ValueError(f"{name}: expected names as keys, got {', '.join(kinds)}") from None


def require_memory(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    """Raise ValueError if an array needs more memory than the machine has.

    A NumPy view of any shape may store a single number (`np.broadcast_to`), but a copy of the view
    needs memory for every entry.

    Args:
        name: Name of the argument, for the error message.
        shape: Shape of the array.
        dtype: Dtype of the array.
    """
    # Python's integers do not overflow
    size = np.dtype(dtype).itemsize
    for n in shape:
        size *= int(n)
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise ValueError(
            f"{name}: expected an array that fits in memory, got shape {shape}, {size:,} bytes"
        )


def as_random_key(name: str, key: Any) -> Array:
    """Return a value as a single JAX random key.

    Both typed keys and keys of the old form (arrays of uint32) are accepted.

    Args:
        name: Name of the argument, for the error message.
        key: The key. A key of the old form may be a NumPy array, for example read from a file.

    Raises:
        ValueError: The value is not a random key, or is an array of several keys.
    """
    is_array = isinstance(key, Array | np.ndarray)
    if is_array:
        is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.ndim == 0 if is_typed else (key.dtype == jnp.uint32 and key.ndim == 1):
            return jnp.asarray(key)
    got = f"{key.dtype}{list(key.shape)}" if is_array else type(key).__name__
    raise ValueError(f"{name}: expected a random key, as jax.random.key(0) makes it, got {got}")


def require_count(least: int, **settings: Any) -> None:
    """Raise ValueError unless all settings are integers that are at least `least`."""
    for name, value in settings.items():
        is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not is_integer or value < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def require_positive(**settings: Any) -> None:
    """Raise ValueError unless all settings are positive numbers."""
    for name, value in settings.items():
        if not _is_number(value) or not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")


def require_finite(**settings: Any) -> None:
    """Raise ValueError unless all settings are finite numbers."""
    for name, value in settings.items():
        if not _is_number(value) or not np.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")


def require_fraction(**settings: Any) -> None:
    """Raise ValueError unless all settings are numbers in [0, 1)."""
    for name, value in settings.items():
        if not _is_number(value) or not 0.0 <= value < 1.0:
            raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")


def require_heads(width: int, heads: int) -> None:
    """Raise ValueError unless both are positive and the number of heads divides the width."""
    require_count(1, width=width, heads=heads)
    if width % heads:
        raise ValueError(f"heads: expected a divisor of width={width}, got {heads}")


def require_flag(**settings: Any) -> None:
    """Raise ValueError unless all settings are True or False."""
    for name, value in settings.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name}: expected True or False, got {value!r:.80}")


def require_object(name: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> None:
    """Raise ValueError unless a value is an instance of a class.

    If the value is itself a class (`sf.NSF` instead of `sf.NSF()`), the message names that class.

    Args:
        name: Name of the argument.
        value: The value.
        kind: The class, or a tuple of allowed classes.
        wanted: Description of the expected value, for the error message.
    """
    if isinstance(value, type) or not isinstance(value, kind):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise ValueError(f"{name}: expected {wanted}, got {got}")


def writable_folder(name: str, path: Path) -> Path:
    """Create a folder if it is missing, and check that files can be written to it.

    Args:
        name: Name of the argument, for the error message.
        path: The folder.

    Raises:
        ValueError: The folder cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ValueError(f"{name}: cannot write to {path}: {error.strerror or error}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
