"""Installed versions of Python and of packages.

This module does not import JAX, so that scripts can record versions before they choose a device.

Public names: `PACKAGES`, `versions`.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

PACKAGES = ("sbi-flows", "jax", "flax", "numpyro")
"""Packages whose version can change a result."""


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the version of Python and of each package; "unknown" if a package is not installed.

    Example:
        >>> versions(["no-such-package"])["no-such-package"]
        'unknown'
    """
    installed = {"python": platform.python_version()}
    for name in packages:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "unknown"
    return installed
