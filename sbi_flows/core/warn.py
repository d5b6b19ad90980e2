"""Warnings that show the line of the user's code.

Public name: `warn_user`.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"


def warn_user(message: str, category: type[Warning]) -> None:
    """Give a warning that shows the line of user code that called this library.

    Args:
        message: The text of the warning.
        category: The class of the warning.
    """
    level, frame = 2, sys._getframe(1)
    while frame is not None and _is_internal(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_internal(filename: str) -> bool:
    """Return whether a file belongs to this library or to a run-time type checker."""
    packages = ("jaxtyping", "beartype")
    return filename.startswith((_PACKAGE, "<@beartype")) or any(
        f"site-packages/{name}" in filename for name in packages
    )
