"""Sets of posterior draws for a figure, with labels of their columns.

Public names: `DrawSets`, `as_draw_sets`, `as_truth`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sbi_flows.core.labels import labels as entry_labels
from sbi_flows.plots.style import as_columns, checked_labels


class DrawSets(NamedTuple):
    """Draws of the same D parameters, by the name of the set.

    Attributes:
        sets: Draws (n, D) by the name of the set; a single set has the name "".
        labels: Names of the D parameters; empty strings if there are none.
        is_labelled: Whether the parameters have names.
    """

    sets: dict[str, np.ndarray]
    labels: list[str]
    is_labelled: bool

    @property
    def dim(self) -> int:
        """Number of parameters D."""
        return len(self.labels)


def as_draw_sets(samples: Any, labels: Sequence[str] | None) -> DrawSets:
    """Convert draws in any accepted form to sets of draws (n, D).

    Args:
        samples: An array (n, D); a dict of such arrays by the name of the set; a dict of arrays
            (n, *event) by the name of the parameter; or a dict of such dicts by the name of the
            set. See `corner`.
        labels: Names of the D parameters in the order of the figure. Required order of named
            parameters; the order of the first set by default.

    Raises:
        ValueError: Draws are not finite, sizes do not agree, or names of parameters differ.
    """
    if not isinstance(samples, Mapping):
        return _plain_sets({"": samples}, labels)
    if not samples:
        raise ValueError("samples: expected draws, got an empty dict")
    is_set = [isinstance(value, Mapping) for value in samples.values()]
    if any(is_set) and not all(is_set):
        kinds = {name: "dict" if isinstance(v, Mapping) else "array" for name, v in samples.items()}
        raise ValueError(
            "samples: expected either arrays (n, D) or dicts of named parameters for all sets, "
            f"got {kinds}; use posterior.prior.unflatten(draws)"
        )
    if all(is_set):
        return _named_sets(samples, labels)
    shapes = {name: np.shape(value) for name, value in samples.items()}
    if _are_sets(list(shapes.values()), labels):
        return _plain_sets(samples, labels)
    if len({shape[:1] for shape in shapes.values()}) > 1:
        raise ValueError(
            "samples: expected arrays (n, D) with one D by the name of the set, or arrays "
            f"(n, *event) with one n by the name of the parameter, got the shapes {shapes}"
        )
    return _named_sets({"": samples}, labels)


def as_truth(truth: Any, draws: DrawSets) -> np.ndarray | None:
    """Return the true parameters (D,) in the order of the labels; None if there are none.

    Args:
        truth: An array (D,), a dict of numbers or arrays by the name of the parameter, or None.
        draws: The draws, which define the labels.

    Raises:
        ValueError: The shape is not (D,), or the names are not those of the labels.
    """
    if truth is None:
        return None
    if isinstance(truth, Mapping):
        if not draws.is_labelled:
            raise ValueError(
                "labels: expected names of the parameters, because truth is a dict, got none"
            )
        arrays = {name: np.asarray(value, float) for name, value in truth.items()}
        named = {
            label: value
            for name, array in arrays.items()
            for label, value in zip(entry_labels(name, array.shape), array.ravel(), strict=True)
        }
        _require_names("truth", named, draws.labels)
        return np.array([named[label] for label in draws.labels])
    array = np.asarray(truth, float)
    if array.shape != (draws.dim,):
        raise ValueError(f"truth: expected shape ({draws.dim},), got {array.shape}")
    return array


def _are_sets(shapes: list[tuple[int, ...]], labels: Sequence[str] | None) -> bool:
    """Return whether arrays of these shapes can be draws (n, D) of sets with one D."""
    if any(len(shape) != 2 for shape in shapes) or len({shape[1] for shape in shapes}) > 1:
        return False
    # with labels, the arrays are named parameters if only their entries together fit the labels
    dim, total = shapes[0][1], sum(shape[1] for shape in shapes)
    return labels is None or len(labels) == dim or len(labels) != total


def _plain_sets(samples: Mapping[str, Any], labels: Sequence[str] | None) -> DrawSets:
    """Return sets of arrays (n, D), whose columns are in the order of the labels."""
    sets = {name: as_columns(f"samples {name}".strip(), draws) for name, draws in samples.items()}
    dims = {draws.shape[1] for draws in sets.values()}
    if len(dims) != 1:
        raise ValueError(f"samples: expected draws of one dimension D, got {sorted(dims)}")
    return DrawSets(sets, checked_labels(labels, dims.pop()), labels is not None)


def _named_sets(samples: Mapping[str, Any], labels: Sequence[str] | None) -> DrawSets:
    """Return sets of named parameters, with columns matched by name."""
    columns = {name: _columns_by_label(name, draws) for name, draws in samples.items()}
    order = list(next(iter(columns.values()))) if labels is None else list(labels)
    for name, named in columns.items():
        _require_names(f"samples {name}".strip(), named, order)
    sets = {
        name: as_columns(f"samples {name}".strip(), np.stack([named[o] for o in order], axis=1))
        for name, named in columns.items()
    }
    return DrawSets(sets, order, True)


def _columns_by_label(set_name: str, draws: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return one column (n,) for each entry of the named arrays (n, *event)."""
    title = f"samples {set_name}".strip()
    arrays = {name: np.asarray(value, float) for name, value in draws.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len({shape[:1] for shape in shapes.values()} - {()}) != 1 or () in shapes.values():
        raise ValueError(
            f"{title}: expected arrays (n, *event) with one n by the name of the parameter, got "
            f"the shapes {shapes}"
        )
    columns: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        event = array.shape[1:]
        flat = array.reshape(len(array), math.prod(event))
        columns |= dict(zip(entry_labels(name, event), flat.T, strict=True))
    return columns


def _require_names(title: str, names: Mapping[str, Any], expected: Sequence[str]) -> None:
    """Raise ValueError unless the names are those expected, in any order."""
    if sorted(names) == sorted(expected):
        return
    missing = [name for name in expected if name not in names]
    unknown = [name for name in names if name not in expected]
    parts = [
        f"{what} {', '.join(each)}"
        for what, each in (("missing", missing), ("unknown", unknown))
        if each
    ]
    raise ValueError(
        f"{title}: expected the parameters {', '.join(expected)}, got {', '.join(names)} "
        f"({'; '.join(parts) or 'a name occurs twice'})"
    )
