"""Labels of the entries of named arrays.

Public names: `labels`.
"""

from __future__ import annotations

import numpy as np


def labels(name: str, shape: tuple[int, ...]) -> list[str]:
    """Return the labels of a parameter's entries: `alpha`, or `beta[0]`, `beta[1]`."""
    if not shape:
        return [name]
    return [f"{name}[{','.join(map(str, i))}]" for i in np.ndindex(*shape)]
