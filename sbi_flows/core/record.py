"""What a fit knows beyond what draws need, as plain JSON data that travels with the posterior.

Public names: `plain`, `versions`, `of_fit`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import math
import platform
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from sbi_flows.simulations.simulations import Simulations

PACKAGES = ("sbi-flows", "jax", "flax", "numpyro")

_BY_ROW = {"held_out", "held_out_loss", "solver_steps", "solver_evaluations"}
"""Fields of a history with a number for each row; of these the mean is kept, or nothing."""


def plain(value: Any) -> Any:
    """The value as JSON holds it; what JSON cannot hold by its name, no number by null.

    Example:
        >>> import sbi_flows as sf
        >>> plain(sf.Heun(steps=8))
        {'type': 'Heun', 'steps': 8}
        >>> plain((1.5, float("nan"), len))
        [1.5, None, 'len']
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.ndarray | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    # a named tuple here is an optimiser of optax, made of functions
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return [plain(part) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        told = [f.name for f in dataclasses.fields(value) if not f.metadata.get("local")]
        parts = {name: plain(getattr(value, name)) for name in told}
        return {"type": type(value).__name__, **parts}
    return getattr(value, "__name__", type(value).__name__)


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of packages, by default of those that results depend on."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def of_fit(estimator: Any, simulations: Simulations, history: Any) -> Mapping[str, Any]:
    """The settings of a fit, what it was fitted to and what happened, read-only."""
    made = {
        "estimator": plain(estimator),
        "simulations": _provenance(simulations),
        "history": _summary(history),
        "versions": versions(),
    }
    return MappingProxyType(made)


def _provenance(simulations: Simulations) -> dict[str, Any]:
    theta = np.ascontiguousarray(simulations.theta)
    return {
        "rows": len(simulations),
        "failed": len(simulations) - simulations.num_valid,
        "rounds": len(np.unique(simulations.round)),
        "on_disk": simulations.on_disk,
        "theta_sha256": hashlib.sha256(theta.tobytes()).hexdigest(),
    }


def _summary(history: Any) -> Any:
    """A history, or those of a stack, without the numbers of single rows."""
    if not dataclasses.is_dataclass(history):
        return plain(history)
    found: dict[str, Any] = {"type": type(history).__name__}
    for field in dataclasses.fields(history):
        value = getattr(history, field.name)
        if field.name == "histories":
            found[field.name] = [_summary(each) for each in value]
        elif field.name == "emulator":
            found[field.name] = _summary(value)
        elif field.name not in _BY_ROW:
            found[field.name] = plain(value)
        elif value is not None and field.name != "held_out":
            found[f"mean_{field.name}"] = plain(np.mean(value))
    return found
