"""Names and shapes of a prior's parameters, and the flat vector that holds them.

Public names: `Layout`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.labels import labels


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names and shapes of a prior's parameters, which are static under `jit`.

    Attributes:
        names: Name of each site.
        shapes: Shape of each site's value.
        standard_shapes: Shape of each site's standard coordinates.
        bounded: For each of the d standard coordinates, True if its range is (-sqrt 3, sqrt 3),
            False if its range is R.
        is_named: True if the simulator receives a dict of parameters, False if one array.
        offset: Offset of each of the D entries, in double precision; empty if there is none. Values
            in the user's units are the values of the distributions plus the offset.
        circular: For each of the d standard coordinates, True if its two ends are the same point.
            Empty if the prior has no circular parameter.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    standard_shapes: tuple[tuple[int, ...], ...]
    bounded: tuple[bool, ...]
    is_named: bool
    offset: tuple[float, ...] = ()
    circular: tuple[bool, ...] = ()

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """One label for each of the D entries: `alpha`, `beta[0]`, `beta[1]`."""
        pairs = zip(self.names, self.shapes, strict=True)
        return tuple(label for name, shape in pairs for label in labels(name, shape))

    def split(self, theta: Any) -> dict[str, Any]:
        """Split flat vectors (*, D) into named values `{name: (*, *event)}`."""
        return _split(theta, self.names, self.shapes)

    def split_standard(self, y: Array) -> dict[str, Array]:
        """Split standard coordinates (*, d) by site: `{name: (*, *standard_shape)}`."""
        return _split(y, self.names, self.standard_shapes)

    def join(self, values: Mapping[str, Any], shapes: tuple[tuple[int, ...], ...]) -> Any:
        """Join values `{name: (*, *shape)}` into flat vectors, in the order of the sites."""
        parts = []
        for name, shape in zip(self.names, shapes, strict=True):
            value = values[name]
            batch = value.shape[: value.ndim - len(shape)]
            parts.append(value.reshape(*batch, math.prod(shape)))
        on_host = all(isinstance(part, np.ndarray) for part in parts)
        return (np if on_host else jnp).concatenate(parts, axis=-1)


def _split(
    flat: Any, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]
) -> dict[str, Any]:
    """Split the last axis of `flat` into named parts: `{name: (*, *shape)}`."""
    batch, parts, start = flat.shape[:-1], {}, 0
    for name, shape in zip(names, shapes, strict=True):
        size = math.prod(shape)
        parts[name] = flat[..., start : start + size].reshape(*batch, *shape)
        start += size
    return parts
