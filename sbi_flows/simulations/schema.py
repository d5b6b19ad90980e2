"""Schema of a store: its prior, simulator and key, as JSON data.

Public names: `FORMAT`, `checked_schema`, `prior_identity`, `require_same_origin`, `versions`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sbi_flows.prior.prior import Prior

FORMAT = 1


def checked_schema(schema: Any) -> Mapping[str, Any] | None:
    """Return the schema of a store; None for a new store.

    Raises:
        ValueError: The schema is invalid, or the store has another format version.
    """
    if schema is None:
        return None
    keys = {"format", "key", "prior", "simulator"}
    if not isinstance(schema, Mapping) or schema.get("format", FORMAT) != FORMAT:
        got = schema.get("format") if isinstance(schema, Mapping) else type(schema).__name__
        raise ValueError(f"expected a store of format {FORMAT}, got {got!r:.80}")
    prior = schema.get("prior")
    labels = prior.get("labels") if isinstance(prior, Mapping) else None
    if not keys <= schema.keys() or not isinstance(labels, list):
        raise ValueError(f"expected a schema of {sorted(keys)}, got {sorted(schema)!r:.200}")
    if not labels or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"expected labels of parameters, got {labels!r:.200}")
    return schema


def require_same_origin(path: str, stored: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """Raise ValueError unless a store was made with the prior, simulator and key of a schema."""
    for name in ("prior", "simulator", "key"):
        if not _is_same(stored[name], schema[name]):
            raise ValueError(
                f"{name}: expected that of the store {path}, {_shorten(stored[name])}, "
                f"got {_shorten(schema[name])}"
            )


def prior_identity(prior: Prior) -> dict[str, Any]:
    """Describe a prior by its parameter names and a few draws with a fixed key."""
    draws = np.asarray(prior.sample(jax.random.key(0), 4), float)
    return {"labels": list(prior.labels), "draws": draws.tolist()}


def _is_same(stored: Any, present: Any) -> bool:
    """Return whether two descriptions are equal, except for rounding errors of draws.

    What is not known of a store that `extend` began is None.
    """
    if stored is None:
        return True
    if isinstance(stored, Mapping) and isinstance(present, Mapping):
        known = {name: value for name, value in stored.items() if value is not None}
        if len(known) < len(stored):
            return known == {name: present.get(name) for name in known}
    if not isinstance(present, Mapping) or "draws" not in present:
        return stored == present
    try:
        first, second = (np.asarray(each["draws"], float) for each in (stored, present))
    except (TypeError, ValueError, KeyError, OverflowError):
        return False
    if stored["labels"] != present["labels"] or first.shape != second.shape:
        return False
    return bool(np.all(np.abs(first - second) <= 1e-3 * first.std(axis=0)))


def _shorten(description: Any) -> str:
    """Convert a description to a short text for an error message."""
    if isinstance(description, Mapping) and "labels" in description:
        return f"of {', '.join(description['labels'])}"
    return f"{json.dumps(description):.200}"


def versions() -> dict[str, str]:
    """Return the versions of the packages that made a store, by name."""
    from importlib.metadata import version

    return {name: version(name) for name in ("sbi-flows", "jax", "numpy", "numpyro", "zarr")}
