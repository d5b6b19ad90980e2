"""`python -m benchmarks batches`: training time to a given validation loss, by batch size.

Public names: `BATCHES`, `run`, `time_to_loss`, `markdown`.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sbi_flows as sf
from benchmarks.peers.measure import interleaved
from benchmarks.suite.records import provenance, write_json
from simulators.adapters.registry import get

BATCHES = (32, 64, 128, 256, 512)
"""Batch sizes to compare."""

TARGET_MARGIN = 0.01
"""Difference between the target loss and the best loss with the default batch size, in nats."""


def run(folder: Path, tasks: tuple[str, ...] = ("two_moons", "slcp")) -> dict[str, Any]:
    """Measure the training times on each task, print a table, and write a record.

    Args:
        folder: Folder in which the record is written. It must exist and be writable.
        tasks: Names of tasks.

    Returns:
        The record, also written as `batches-<time>.json`.
    """
    results = {name: time_to_loss(name) for name in tasks}
    print("\n".join(markdown(results)), flush=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    record = {**provenance(), "kind": "batches", "batches": results}
    write_json(folder / f"batches-{stamp}.json", record)
    return record


def time_to_loss(
    task: str, batches: tuple[int, ...] = BATCHES, *, budget: int = 10_000, repeats: int = 2
) -> dict[str, Any]:
    """Measure the training time until a target validation loss, by batch size.

    The times exclude compilation. All settings other than batch size and learning rate are the
    defaults. The learning rate is proportional to the square root of the batch size. The target is
    the best validation loss with the default batch size, averaged over the ensemble members, plus
    `TARGET_MARGIN`.

    Args:
        task: Name of a task.
        batches: Batch sizes. The default batch size is added if it is missing.
        budget: Number of simulations.
        repeats: Number of timed fits for each batch size.

    Returns:
        A dict of `default`, the default batch size; `target`, the target loss in nats; and `fits`,
        a list with a dict for each batch size: `batch`, the batch size; `rate`, the learning rate;
        `loss`, the best loss in nats; `epochs` and `seconds` until the target loss, None if the fit
        does not reach it; and `whole_seconds`, the time of the complete fit.
    """
    problem = get(task)
    simulations = sf.simulate(
        jax.random.key(0), problem.prior, problem.simulator, budget, progress=False
    )
    default = sf.Training()
    rows = budget - int(budget * default.validation_fraction)
    default_batch, histories = default.batch(rows), {}

    def fit(batch: int, rate: float) -> None:
        training = sf.Training(batch_size=batch, learning_rate=rate)
        npe = sf.NPE(problem.prior, training=training)
        _, histories[batch] = npe.fit(jax.random.key(1), simulations, progress=False)

    rate = default.learning_rate
    assert isinstance(rate, float)
    rates = {b: rate * math.sqrt(b / default_batch) for b in {*batches, default_batch}}
    calls = {f"{b}": partial(fit, b, rate) for b, rate in sorted(rates.items())}
    timings = interleaved(calls, repeats, f"batches, {task}")
    target = float(histories[default_batch].validation_loss.mean(axis=1).min()) + TARGET_MARGIN
    fits = []
    for batch, rate in sorted(rates.items()):
        losses = np.minimum.accumulate(histories[batch].validation_loss.mean(axis=1))
        fit_seconds, reached = timings[f"{batch}"].median, np.flatnonzero(losses <= target)
        epochs = int(reached[0]) + 1 if len(reached) else None
        seconds = None if epochs is None else fit_seconds * epochs / len(losses)
        fits.append(
            {
                "batch": batch,
                "rate": rate,
                "loss": float(losses[-1]),
                "epochs": epochs,
                "seconds": seconds,
                "whole_seconds": fit_seconds,
            }
        )
    return {"default": default_batch, "target": target, "fits": fits}


def markdown(results: dict[str, dict[str, Any]]) -> list[str]:
    """Format a Markdown table with a row per task and batch size; return its lines.

    Args:
        results: Result of `time_to_loss` for each task, by task name.
    """
    head = ("task", "batch size", "learning rate", "best loss, nats", "epochs to target", "s")
    lines = [list(head), ["---"] * len(head)]
    for task, result in results.items():
        for fit in result["fits"]:
            mark = " (default)" if fit["batch"] == result["default"] else ""
            is_reached = fit["epochs"] is not None
            lines.append(
                [
                    task,
                    f"{fit['batch']:,}{mark}",
                    f"{fit['rate']:.4f}",
                    f"{fit['loss']:.3f}",
                    f"{fit['epochs']}" if is_reached else "not reached",
                    f"{fit['seconds']:.1f}" if is_reached else "-",
                ]
            )
    return [f"| {' | '.join(line)} |" for line in lines]
