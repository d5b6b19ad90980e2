"""Types that all packages of the library use.

Shapes: theta is `(*, D)`, x is `(*, *event)` or a dict of such arrays. The order of arguments is
always `(theta, x)`.

Public names: `Key`, `Obs`, `Simulator`, `CheckReport`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
from jaxtyping import PyTree

Key: TypeAlias = jax.Array
"""A typed JAX random key, such as `jax.random.key(0)`."""

Obs: TypeAlias = PyTree
"""One observation `(*event)` or a batch of them `(B, *event)`, or a dict of such arrays."""

Simulator: TypeAlias = Callable[[Key, Any], Obs]
"""Function `(key, theta) -> x`; theta is one parameter vector, or a dict of named parameters."""


@runtime_checkable
class CheckReport(Protocol):
    """Report of a check that can be saved with a posterior, for example `sf.Report`."""

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers of the report as plain data."""
        ...
