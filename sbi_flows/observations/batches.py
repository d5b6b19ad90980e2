"""Checks of a single observation or of a batch.

Public names: `as_batch`, `require_single`, `Missing`, `COMPLETE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.checks import as_array, as_real_array, as_tree, require_real
from sbi_flows.core.doubles import is_single_precision
from sbi_flows.core.labels import first_names
from sbi_flows.core.pytrees import is_traced
from sbi_flows.core.typing import Obs
from sbi_flows.observations.missing import MissingPattern, leaf_name
from sbi_flows.observations.shared import SharedAxes
from sbi_flows.observations.standardise import entry_labels


class Missing(NamedTuple):
    """Which entries of an observation may be missing.

    Attributes:
        can_miss: Whether each entry of the flattened observation can be missing (NaN), shape (C,);
            None if all entries must be present.
        growing: For each array, the axes along which an observation may be shorter than in the
            training rows, such as the axis of the trials. Empty if there are none.
        pattern: Random pattern by which the fit hid entries; None if it hid none.
        simulates_gaps: Whether simulations of the fit lacked entries before any were hidden.
    """

    can_miss: Any = None
    growing: SharedAxes = ()
    pattern: MissingPattern | None = None
    simulates_gaps: bool = False


COMPLETE = Missing()
"""No entry may be missing."""


def as_batch(x: Obs, like: Obs, missing: Missing = COMPLETE) -> tuple[Obs, bool]:
    """Return observations as a batch (B, *event); B = 1 for a single observation.

    If x is traced (inside `jit`, for example), its shape is checked, but not its values.

    Args:
        x: One observation (*event), a batch (B, *event), or a tree of such arrays. An array that is
            shorter along an axis of `missing.growing` is padded with NaN at the end of the axis. In
            one observation of several arrays, a single NaN stands for an array that is missing.
        like: Shape and dtype of one observation (`jax.ShapeDtypeStruct` leaves).
        missing: Entries that may be missing.

    Returns:
        The batch, and whether x was a single observation. An array whose dtype in `like` is float64
        is a NumPy array if JAX is in single precision.

    Raises:
        ValueError: The shape or structure of x differs from `like`, or x has entries that are not
            real numbers, or contains infinity, or NaN where no entry may be missing.
    """
    expected = [tuple(leaf.shape) for leaf in jax.tree.leaves(like)]
    x = as_tree("x", x, _as_exact_array, like)
    if jax.tree.structure(x) != jax.tree.structure(like):
        raise ValueError(f"x: expected {_described(like)}, got {_described(x)}")
    x = jax.tree.map(_as_dtype_of, x, like)
    if not is_traced(x):
        x = jax.tree.map(np.asarray, x)
        _require_finite(x, allows_nan=missing.can_miss is not None)
    leaves = jax.tree.leaves(x)
    given = [leaf.shape for leaf in leaves]
    if missing.can_miss is not None and len(leaves) > 1:
        leaves = list(map(_absent, leaves, expected))
    if missing.growing:
        for leaf, shape, axes in zip(leaves, expected, missing.growing, strict=True):
            _require_no_column(leaf, shape, axes)
        leaves = list(map(_padded, leaves, expected, missing.growing))
    shapes = [leaf.shape for leaf in leaves]
    single = shapes == expected
    lengths = {s[:1] for s in shapes}
    if not single and ([s[1:] for s in shapes] != expected or len(lengths) != 1):
        wanted, got = _shapes_text(like, expected), _shapes_text(like, given)
        shorter = " (or shorter)" * any(missing.growing)
        raise ValueError(f"x: expected shape {wanted}{shorter}, or a batch of it, got {got}")
    if not single and () not in lengths and lengths == {(0,)}:
        raise ValueError("x: expected at least one observation, got an empty batch")
    batch = [leaf[None] if single else leaf for leaf in leaves]
    if missing.can_miss is not None and not is_traced((batch, missing.can_miss)):
        _require_present(batch, like, missing)
    tree = jax.tree.unflatten(jax.tree.structure(like), batch)
    return jax.tree.map(lambda a, b: a if _stays_on_host(b) else jnp.asarray(a), tree, like), single


def _require_finite(x: Obs, *, allows_nan: bool) -> None:
    """Raise ValueError if x contains infinity, or NaN that is not allowed."""
    leaves = [leaf for leaf in jax.tree.leaves(x) if leaf.dtype.kind not in "iub"]
    if any(np.any(np.isinf(leaf)) for leaf in leaves):
        raise ValueError("x: expected finite values, got infinity")
    if not allows_nan and any(np.any(np.isnan(leaf)) for leaf in leaves):
        raise ValueError(
            "x: expected finite values, got NaN; if NaN marks a missing entry, fit to "
            "sf.Simulations(theta, x, missing=True), or with a pattern such as "
            "missing=sf.RandomEntries(0.2) or sf.RandomSubset(5, 100)"
        )


def _require_present(batch: list[Any], like: Obs, missing: Missing) -> None:
    """Raise ValueError if the missing entries differ from those of all training simulations."""
    rows = [np.asarray(leaf, float).reshape(len(leaf), -1) for leaf in batch]
    lacks = np.isnan(np.concatenate(rows, axis=1))
    strange = lacks.any(axis=0) & ~np.asarray(missing.can_miss)
    if strange.any():
        names = entry_labels(like)
        lacking = [names[int(i)] for i in np.flatnonzero(strange)]
        raise ValueError(
            f"x: expected entries that are missing in some training simulations, got NaN in "
            f"{first_names(lacking)}, never missing there; fit with missing=sf.RandomEntries(...)"
        )
    if missing.simulates_gaps:
        # a simulation without any entry is a failed one
        if missing.pattern is None and lacks.all(axis=1).any():
            raise ValueError("x: expected at least one entry that is not missing, got NaN alone")
    elif missing.pattern is not None:
        sentence = missing.pattern.unseen(~lacks, like)
        if sentence:
            raise ValueError(f"x: {sentence}; the fit has not seen such observations")


def _require_no_column(leaf: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    """Raise ValueError if an array may be one observation, or a batch of shorter ones.

    Raises:
        ValueError: The array is a column (n, 1), and observations are vectors of any length.
    """
    if axes and len(shape) == 1 and shape != (1,) and leaf.ndim == 2:
        n, width = leaf.shape
        if width == 1 and n > 1:
            raise ValueError(
                f"x: expected shape {shape} (or shorter), or a batch of it, got a column "
                f"{leaf.shape}; for one observation of {n} elements, give x[:, 0]; for {n} "
                f"observations of one element, pad each with NaN, to shape {(n, *shape)}"
            )


def _absent(leaf: Any, shape: tuple[int, ...]) -> Any:
    """Return an array of NaN in place of a single NaN; any other array is returned unchanged."""
    is_nan = np.ndim(leaf) == 0 and shape and not is_traced(leaf) and np.isnan(leaf)
    return np.full(shape, np.nan, leaf.dtype) if is_nan else leaf


def _padded(leaf: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> Any:
    """Pad one array with NaN at the end of axes along which it is shorter than `shape`.

    An array that does not fit is returned unchanged.
    """
    first = leaf.ndim - len(shape)
    if not axes or first not in (0, 1):
        return leaf
    lengths = leaf.shape[first:]
    pairs = enumerate(zip(lengths, shape, strict=True))
    differing = [i for i, (a, b) in pairs if a != b]
    if not differing or not all(i in axes and lengths[i] < shape[i] for i in differing):
        return leaf
    widths = [(0, 0)] * first + [(0, b - a) for a, b in zip(lengths, shape, strict=True)]
    array = jnp if isinstance(leaf, jax.Array) else np
    kind = leaf.dtype if leaf.dtype.kind == "f" else jnp.result_type(float)
    return array.pad(leaf.astype(kind), widths, constant_values=np.nan)


def require_single(x: Obs, like: Obs, *, instead: str = "") -> None:
    """Raise ValueError unless x is one observation.

    Args:
        x: The observation.
        like: Shape and dtype of one observation.
        instead: Text appended to the error message, such as what to do instead.
    """
    if not as_batch(x, like)[1]:
        raise ValueError(f"x: expected one observation, got a batch{instead}")


_ROUNDED = (np.dtype(np.float16), np.dtype(jnp.bfloat16), np.dtype(np.float32))
"""Dtypes in which a value has been rounded already."""


def _as_exact_array(name: str, value: Any) -> Array | np.ndarray:
    """Convert a value to an array of real numbers in its own dtype."""
    array = as_array(name, value)
    require_real(name, array.dtype)
    return array


def _stays_on_host(like: Any) -> bool:
    """Return whether an array stays on the host, in double precision."""
    return like.dtype == np.float64 and is_single_precision()


def _as_dtype_of(value: Any, like: Any) -> Any:
    """Convert an array to float64 if it stays on the host, otherwise to a dtype of JAX."""
    if _stays_on_host(like):
        if is_traced(value) or value.dtype.kind not in "iufb" or value.dtype in _ROUNDED:
            raise ValueError(
                "x: expected NumPy numbers of float64, because single precision cannot hold the "
                f"training data, got {value.dtype}; inside jit, grad or vmap, bind x before: "
                "at = posterior.at(x)"
            )
        return np.asarray(value, np.float64)
    return as_real_array("x", value)


def _shapes_text(like: Obs, shapes: list[tuple[int, ...]]) -> str:
    """Return the shape of an array, or the names and shapes of several arrays."""
    if len(shapes) == 1:
        return str(shapes[0])
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(like)]
    pairs = zip(map(leaf_name, paths), shapes, strict=True)
    return ", ".join(f"{name} {shape}" for name, shape in pairs)


def _described(x: Obs) -> str:
    if isinstance(x, Mapping):
        return f"a dict of arrays with the keys {sorted(map(str, x))}"
    return f"an array of shape {x.shape}" if hasattr(x, "shape") else type(x).__name__
