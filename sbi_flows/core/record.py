"""The record that is saved with a posterior: a read-only dict of JSON data.

Public names: `ReadOnlyDict`, `to_json_data`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, final

import jax
import numpy as np


@final
class ReadOnlyDict(Mapping[str, Any]):
    """Read-only mapping that can be pickled, unlike `types.MappingProxyType`.

    Args:
        values: The entries, which are copied.

    Example:
        >>> record = ReadOnlyDict({"rows": 100})
        >>> record["rows"], record
        (100, {'rows': 100})
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Any:
        """Return the value of an entry."""
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the entries."""
        return iter(self._values)

    def __len__(self) -> int:
        """Number of entries."""
        return len(self._values)

    def __repr__(self) -> str:
        """Show the entries as a dict."""
        return repr(self._values)


def to_json_data(value: Any) -> Any:
    """Convert a value to data that JSON can hold.

    Arrays become lists, and settings objects become dicts with their class name as "type". Fields
    of a dataclass with the metadata `local=True` are left out, because they are valid on one
    machine only. NaN and infinity become None. Any other object, such as a function, becomes its
    name.

    Example:
        >>> import sbi_flows as sf
        >>> to_json_data(sf.Heun(steps=8))
        {'type': 'Heun', 'steps': 8}
        >>> to_json_data((1.5, float("nan"), len))
        [1.5, None, 'len']
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.ndarray | jax.Array):
        return to_json_data(np.asarray(value).tolist())
    if isinstance(value, Mapping):
        return {str(name): to_json_data(part) for name, part in value.items()}
    # a named tuple is an optax optimiser (a pair of functions); the last line returns its name
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return [to_json_data(part) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if not f.metadata.get("local")]
        parts = {name: to_json_data(getattr(value, name)) for name in names}
        return {"type": type(value).__name__, **parts}
    return getattr(value, "__name__", type(value).__name__)
