"""Estimators for tasks whose observations are sets, series, images or lack entries.

Public names: `SETTINGS`, `embedded`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import sbi_flows as sf
from benchmarks.suite.records import BadInput
from simulators import Task

_BRIEF = sf.Training(max_epochs=30, patience=6)
"""Training that ends soon."""

_FAST = sf.Training(max_epochs=16, patience=6, learning_rate=4e-3)
"""Training with a few large steps."""

SETTINGS: dict[str, dict[str, Any]] = {
    "normal_set": {
        "density": sf.MAF(),
        "embedding": sf.DeepSet(),
        "missing": sf.RandomSubset(5, 100),
        "members": 2,
        "training": _BRIEF,
    },
    "drift_diffusion": {
        "density": sf.MAF(),
        "embedding": sf.DeepSet(),
        "missing": sf.RandomSubset(20, 300),
        "members": 1,
        "training": sf.Training(max_epochs=18, learning_rate=6e-3),
    },
    "sensors": {
        "density": sf.MAF(),
        "missing": sf.RandomEntries(0.2),
        "members": 2,
        "training": sf.Training(max_epochs=60, patience=6),
    },
    "two_instruments": {
        "density": sf.MAF(),
        "embedding": sf.Fusion({"spectrum": None, "redshift": None}),
        "missing": sf.RandomParts(0.3),
        "members": 2,
        "training": _BRIEF,
    },
    "random_field": {
        "density": sf.MAF(),
        "embedding": sf.ConvNet(width=8),
        "members": 1,
        "training": dataclasses.replace(_FAST, max_epochs=20),
    },
    "lens": {
        "density": sf.MAF(),
        "embedding": sf.ConvNet(width=8),
        "members": 1,
        "training": _FAST,
    },
    "ornstein_uhlenbeck": {
        "density": sf.MAF(),
        "embedding": sf.SeriesNet(width=16, blocks=0, heads=2),
        "members": 1,
        "training": _FAST,
    },
    "g_and_k": {
        "density": sf.MAF(),
        "embedding": sf.DeepSet(width=8, layers=0, heads=2),
        "members": 1,
        "training": dataclasses.replace(_FAST, max_epochs=40),
    },
    "stochastic_volatility": {
        "density": sf.MAF(),
        "embedding": sf.SeriesNet(width=16),
        "members": 1,
        "training": _FAST,
    },
    "hodgkin_huxley": {
        "density": sf.MAF(),
        "embedding": sf.SeriesNet(width=16),
        "members": 1,
        "training": _FAST,
    },
}
"""Arguments of `sf.NPE` by the name of the task.

They were chosen on observations and simulations that the benchmark does not use.
"""


def embedded(task: Task) -> sf.NPE:
    """Return the estimator of a task, with an embedding and a pattern of missing entries.

    Raises:
        BadInput: There are no settings for the task.
    """
    if task.name not in SETTINGS:
        raise BadInput(
            f"--methods: npe-embedding expects a task out of {', '.join(SETTINGS)}; got {task.name}"
        )
    return sf.NPE(task.prior, **SETTINGS[task.name])
