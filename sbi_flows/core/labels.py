"""Labels of the entries of named arrays.

Public names: `labels`, `first_names`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def labels(name: str, shape: tuple[int, ...]) -> list[str]:
    """Return the labels of a parameter's entries: `alpha`, or `beta[0]`, `beta[1]`."""
    if not shape:
        return [name]
    return [f"{name}[{','.join(map(str, i))}]" for i in np.ndindex(*shape)]


def first_names(names: Sequence[str]) -> str:
    """Join the first five names for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
