"""Conversion of estimators and training histories to JSON data, for the records.

Public names: `describe`, `history_record`.
"""

from __future__ import annotations

from typing import Any

import sbi_flows as sf
from benchmarks.suite import methods
from sbi_flows.estimators.base import Estimator, FitHistory
from sbi_flows.estimators.stacking import StackHistory


def describe(estimator: Estimator | methods.Distilling) -> dict[str, Any]:
    """Return the settings of an estimator as JSON data."""
    if isinstance(estimator, methods.Distilling):
        return {"method": "distil", "steps": estimator.steps, "of": describe(estimator.npe)}
    if isinstance(estimator, sf.Stack):
        return {"method": "Stack", "estimators": [describe(e) for e in estimator.estimators]}
    if not isinstance(estimator, sf.NPE):
        return {"method": type(estimator).__name__}
    return {
        "method": type(estimator).__name__,
        "density": repr(estimator.density),
        "training": repr(estimator.training),
        "members": estimator.members,
        "emulator": estimator.emulator and repr(estimator.emulator),
        "screening": estimator.screening,
    }


def history_record(history: FitHistory) -> dict[str, Any]:
    """Return a training history as JSON data."""
    if isinstance(history, StackHistory):
        return {
            "shares": history.shares,
            "held_out_loss": history.held_out_loss,
            "mixture_loss": history.mixture_loss,
            "parts": [h and history_record(h) for h in history.histories],
        }
    assert isinstance(history, sf.History)
    return {
        "epochs": history.epochs,
        "stop_reason": history.stop_reason,
        "best_epoch": history.best_epoch,
        "best_loss": history.best_loss,
        "held_out_loss": history.held_out_loss.mean(),
        "seconds": history.seconds,
        "emulator": history.emulator and history_record(history.emulator),
        "kept": history.kept,
    }
