"""Checks of what the user gives, so that bad input fails before any long work.

Public names: `require_real`, `plain_array`, `real_array`, `real_arrays`, `require_tree`,
`require_room`, `random_key`, `require_count`, `require_positive`, `require_finite`,
`require_fraction`, `require_object`, `writable_folder`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

MOST_LEVELS = 32
"""Dicts, lists and tuples within each other, at the most."""

_HELD = {np.dtype(f"{kind}{8 * n}") for kind in ("int", "uint") for n in (1, 2, 4, 8)} | {
    np.dtype(kind) for kind in (bool, np.float16, jnp.bfloat16, np.float32, np.float64)
}
"""What observations are kept in; numbers of other widths become floats."""


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


def plain_array(name: str, value: Any) -> Array | np.ndarray:
    """The value as an array, whatever it holds; one of JAX as it is.

    Raises:
        ValueError: It makes no array, is masked in places, or claims more room than there is.
    """
    if isinstance(value, Array):
        return value
    if isinstance(value, np.ma.MaskedArray):
        require_real(name, value.dtype)
        if count := np.ma.count_masked(value):
            raise ValueError(
                f"{name}: expected numbers, or NaN for a failure, got {count} masked ones"
            )
    try:
        array = np.asarray(value)
    # lists of unequal lengths, and whatever an object says that is no array
    except Exception as error:
        raise ValueError(
            f"{name}: expected an array, got {type(value).__name__}: {str(error)[:200]}"
        ) from None
    require_room(name, array.shape, array.dtype)
    return array


def real_array(name: str, value: Any) -> Array | np.ndarray:
    """The value as an array of real numbers, in a dtype that JAX holds.

    Returns:
        An array of JAX as it is. Of others, integers beyond the widest integer that JAX holds in
        its present precision become floats, as they would wrap round; floats beyond the widest
        float become infinite, so that they are met as such. The order of bytes is the machine's.

    Raises:
        ValueError: The value holds no real numbers, or more than there is room for.
    """
    array = plain_array(name, value)
    require_real(name, array.dtype)
    native = array.dtype.newbyteorder("=")
    if native not in _HELD:
        return array.astype(jnp.result_type(float))
    if isinstance(array, Array):
        return array
    with np.errstate(over="ignore"):
        held = array.astype(jax.dtypes.canonicalize_dtype(native), copy=False)
    if jnp.issubdtype(held.dtype, jnp.integer) and not np.array_equal(held, array):
        return array.astype(jnp.result_type(float))
    return held


def real_arrays(name: str, tree: Any, *, kept: tuple[type, ...] = ()) -> Any:
    """An array, or a tree of arrays, of real numbers; a list of numbers is an array.

    Args:
        name: What it is called in errors.
        tree: The array or the tree.
        kept: Kinds of leaves that stay as they are.

    Raises:
        ValueError: A leaf holds no real numbers, or there is no tree, as `require_tree` says.
    """
    require_tree(name, tree)

    def leaf(value: Any) -> Any:
        return value if isinstance(value, kept) else real_array(name, value)

    def holds_numbers(node: Any) -> bool:
        arrays = (Array, np.ndarray, dict, *kept)
        return isinstance(node, list | tuple) and not any(isinstance(v, arrays) for v in node)

    # None would be no leaf, and its place in a dict be lost
    return jax.tree.map(leaf, tree, is_leaf=lambda node: node is None or holds_numbers(node))


def require_tree(name: str, tree: Any) -> None:
    """Refuse dicts and lists that nest too deeply, or in themselves, or have keys without order.

    Raises:
        ValueError: They do.
    """
    level = [tree]
    for _ in range(MOST_LEVELS):
        containers = {id(node): node for node in level if isinstance(node, dict | list | tuple)}
        level = []
        for node in containers.values():
            level += node.values() if isinstance(node, dict) else node
            if isinstance(node, dict):
                _require_ordered(name, node)
        if not level:
            return
    raise ValueError(f"{name}: expected at most {MOST_LEVELS} levels of dicts and lists, got more")


def _require_ordered(name: str, node: dict) -> None:
    try:
        sorted(node)
    except TypeError:
        kinds = sorted({type(key).__name__ for key in node})
        raise ValueError(f"{name}: expected names as keys, got {', '.join(kinds)}") from None


def require_room(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    """Refuse arrays larger than the memory of this machine: views that repeat a number, say.

    Raises:
        ValueError: They are.
    """
    # in Python's numbers, which do not wrap round
    size = np.dtype(dtype).itemsize
    for n in shape:
        size *= int(n)
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise ValueError(f"{name}: expected what fits in memory, got {size:,} bytes of {shape}")


def random_key(name: str, key: Any) -> Array:
    """The single random key of JAX that is given.

    Raises:
        ValueError: It is none.
    """
    # the older keys, arrays of numbers, may be of NumPy: read from a file, or sent by a process
    held = isinstance(key, Array | np.ndarray)
    if held:
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.ndim == 0 if typed else (key.dtype == jnp.uint32 and key.ndim == 1):
            return jnp.asarray(key)
    got = f"{key.dtype}{list(key.shape)}" if held else type(key).__name__
    raise ValueError(f"{name}: expected a random key, as jax.random.key(0) makes it, got {got}")


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
