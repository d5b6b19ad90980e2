"""Rows a step: the time of fits until they reach the same held-out loss.

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
"""Rows a step."""

SLACK = 0.01
"""How far above the best loss of the default a fit may stop, in nats."""


def run(folder: Path, tasks: tuple[str, ...] = ("two_moons", "slcp")) -> dict[str, Any]:
    """Measure on each task, print the table, and write a record into the folder.

    Args:
        folder: Where the record goes; it exists and is writable.
        tasks: Names of tasks.

    Returns:
        The record.
    """
    found = {name: time_to_loss(name) for name in tasks}
    print("\n".join(markdown(found)), flush=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    record = {**provenance(), "kind": "batches", "batches": found}
    write_json(folder / f"batches-{stamp}.json", record)
    return record


def time_to_loss(
    task: str, batches: tuple[int, ...] = BATCHES, *, budget: int = 10_000, repeats: int = 2
) -> dict[str, Any]:
    """Seconds of default fits, compiled before, until a held-out loss that all should reach.

    The learning rate grows with the square root of the rows a step.

    Args:
        task: Name of a task.
        batches: Rows a step.
        budget: Number of simulations.
        repeats: Fits timed at each.

    Returns:
        `default`, the default's rows a step; `target`, its members' best mean loss and `SLACK`, in
        nats; and a list `fits` with, of each, `batch`, `rate`, `loss`, the best, in nats, `epochs`
        and `seconds` until the target, both None where it is not reached, and `whole_seconds`.
    """
    problem = get(task)
    simulations = sf.simulate(
        jax.random.key(0), problem.prior, problem.simulator, budget, progress=False
    )
    default = sf.Training()
    rows = budget - int(budget * default.validation_fraction)
    own, histories = default.batch(rows), {}

    def fit(batch: int, rate: float) -> None:
        training = sf.Training(batch_size=batch, learning_rate=rate)
        npe = sf.NPE(problem.prior, training=training)
        _, histories[batch] = npe.fit(jax.random.key(1), simulations, progress=False)

    rate = default.learning_rate
    assert isinstance(rate, float)
    rates = {b: rate * math.sqrt(b / own) for b in {*batches, own}}
    calls = {f"{b}": partial(fit, b, rate) for b, rate in sorted(rates.items())}
    timings = interleaved(calls, repeats, f"batches, {task}")
    target = float(histories[own].validation_loss.mean(axis=1).min()) + SLACK
    fits = []
    for batch, rate in sorted(rates.items()):
        losses = np.minimum.accumulate(histories[batch].validation_loss.mean(axis=1))
        whole, reached = timings[f"{batch}"].median, np.flatnonzero(losses <= target)
        epochs = int(reached[0]) + 1 if len(reached) else None
        seconds = None if epochs is None else whole * epochs / len(losses)
        fits.append(
            {
                "batch": batch,
                "rate": rate,
                "loss": float(losses[-1]),
                "epochs": epochs,
                "seconds": seconds,
                "whole_seconds": whole,
            }
        )
    return {"default": own, "target": target, "fits": fits}


def markdown(found: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of a table: a row for each task and number of rows a step."""
    head = ("task", "rows a step", "learning rate", "best loss, nats", "epochs to target", "s")
    lines = [list(head), ["---"] * len(head)]
    for task, result in found.items():
        for fit in result["fits"]:
            mark = " (default)" if fit["batch"] == result["default"] else ""
            reached = fit["epochs"] is not None
            lines.append(
                [
                    task,
                    f"{fit['batch']:,}{mark}",
                    f"{fit['rate']:.4f}",
                    f"{fit['loss']:.3f}",
                    f"{fit['epochs']}" if reached else "not reached",
                    f"{fit['seconds']:.1f}" if reached else "-",
                ]
            )
    return [f"| {' | '.join(line)} |" for line in lines]
