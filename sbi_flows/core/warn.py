"""Warnings that point at the user's own line.

Public name: `warn_user`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parents[1])


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn at the first caller outside this package, however many of its functions lie between.

    Args:
        message: The text of the warning.
        category: Its class.
    """
    level, frame = 2, sys._getframe(1)
    while frame is not None and _is_internal(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_internal(filename: str) -> bool:
    """Return whether a frame is of this package, or of a run-time type checker around it."""
    checkers = ("<@beartype", "<string>")
    packages = ("jaxtyping", "beartype")
    return filename.startswith((_PACKAGE, *checkers)) or any(
        f"site-packages/{name}" in filename for name in packages
    )
