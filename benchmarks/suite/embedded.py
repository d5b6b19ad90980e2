"""Estimators for tasks whose observations are sets, series, images or lack entries.

Public names: `SETTINGS`, `embedded`.
"""

from __future__ import annotations

from typing import Any

import sbi_flows as sf
from benchmarks.suite.records import BadInput
from sbi_flows.networks.embeddings import EmbeddingSettings
from simulators import Task

_BRIEF = sf.Training(max_epochs=30, patience=6)
"""Training that ends soon."""


def _fast(embedding: EmbeddingSettings, epochs: int = 16) -> dict[str, Any]:
    """Return settings of one member that trains with large steps."""
    training = sf.Training(max_epochs=epochs, patience=6, learning_rate=4e-3)
    return {"density": sf.MAF(), "embedding": embedding, "members": 1, "training": training}


def _fixed(embedding: EmbeddingSettings, draws: int | None = None) -> dict[str, Any]:
    """Return settings of two members conditioned on fixed summaries.

    Args:
        embedding: The embedding whose summaries are used.
        draws: Number of emulated simulations for each member; None for no emulator.
    """
    emulator = None if draws is None else sf.Emulator(simulations=draws)
    settings = {"density": sf.MAF(), "embedding": sf.Summaries(embedding), "members": 2}
    return {**settings, "emulator": emulator}


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
        "training": sf.Training(max_epochs=44, learning_rate=6e-3),
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
    "random_field": _fixed(sf.ConvNet(), 150_000),
    "lens": _fast(sf.ConvNet(width=8)),
    "ornstein_uhlenbeck": _fixed(sf.SeriesNet()),
    "g_and_k": _fixed(sf.DeepSet()),
    "stochastic_volatility": _fixed(sf.SeriesNet()),
    "hodgkin_huxley": _fast(sf.SeriesNet(width=16)),
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
