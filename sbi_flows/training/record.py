"""Record of a fit: JSON data that are saved with the posterior.

Public names: `of_fit`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from sbi_flows.core.record import ReadOnlyDict, to_json_data
from sbi_flows.core.versions import versions
from sbi_flows.simulations.simulations import Simulations

_PER_ROW = {"held_out", "held_out_loss", "solver_steps", "solver_evaluations"}
"""Fields of a history with one number for each validation row. The record omits these
numbers, but may contain their mean."""


def of_fit(estimator: Any, simulations: Simulations, history: Any) -> Mapping[str, Any]:
    """Return a read-only record of a fit: its settings, simulations, history and versions.

    Args:
        estimator: The estimator, a frozen dataclass of settings.
        simulations: The simulations that were used in the fit.
        history: The history of the fit. For a stack of densities, the histories of its densities.
    """
    record = {
        "estimator": to_json_data(estimator),
        "simulations": _provenance(simulations),
        "history": _summary(history),
        "versions": versions(),
    }
    return ReadOnlyDict(record)


def _provenance(simulations: Simulations) -> dict[str, Any]:
    """Describe simulations by the numbers of rows, failed rows and rounds, and a hash of theta."""
    theta = np.ascontiguousarray(simulations.theta)
    columns = {} if simulations.names.x is None else {"columns": list(simulations.names.x)}
    return {
        **columns,
        "rows": len(simulations),
        "failed": len(simulations) - simulations.num_valid,
        "rounds": len(np.unique(simulations.round)),
        "on_disk": simulations.on_disk,
        "theta_sha256": hashlib.sha256(theta.tobytes()).hexdigest(),
    }


def _summary(history: Any) -> Any:
    """Convert a history, or the histories of a stack, to JSON data without `_PER_ROW` fields."""
    if not dataclasses.is_dataclass(history):
        return to_json_data(history)
    summary: dict[str, Any] = {"type": type(history).__name__}
    for field in dataclasses.fields(history):
        value = getattr(history, field.name)
        if field.name == "histories":
            summary[field.name] = [_summary(each) for each in value]
        elif field.name == "held_out_log_prob":
            continue
        elif field.name == "emulator":
            summary[field.name] = _summary(value)
        elif field.name not in _PER_ROW:
            summary[field.name] = to_json_data(value)
        elif value is not None and field.name != "held_out":
            summary[f"mean_{field.name}"] = to_json_data(np.mean(value))
    return summary
