"""`python -m benchmarks accelerator`: time of a training step on a GPU, and its lower bounds.

Public names: `run`, `measured`, `limits`, `markdown`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import sbi_flows as sf
from benchmarks.peers.measure import interleaved
from benchmarks.speed import profile
from benchmarks.speed.growth import BASE, training
from benchmarks.suite.records import now, provenance, write_json
from sbi_flows.core.tables import table

ROWS = 100_000
"""Number of simulations of the timed fits."""
BATCHES = (256, 1_024, 4_096, 16_384)
"""Batch sizes of the timed fits."""
MEMBERS = (1, 8, 32)
"""Numbers of ensemble members of the timed fits."""
PRECISIONS = ("highest", "tensorfloat32", "bfloat16")
WIDE, WIDE_BATCH = sf.NSF(hidden=(512, 512), context_width=512), 4_096
"""Flow and batch size with matrix products that are large enough to use a GPU fully."""

LAUNCHES = 256
"""Number of small kernels that are launched to measure the launch time."""


def run(folder: Path, rows: int = ROWS) -> dict[str, Any]:
    """Carry out all measurements; print each result and write the record after each of them.

    Args:
        folder: Folder in which the record is written. It must exist and be writable.
        rows: Number of simulations of the timed fits.

    Returns:
        The record, also written as `accelerator-<time>.json`.
    """
    record = {**provenance(), "kind": "accelerator"}
    stamp = now().replace("-", "").replace(":", "")[:15]
    path = folder / f"accelerator-{stamp}.json"
    for name, part in measured(rows=rows):
        print(f"\n{name}\n{_text(name, part)}", flush=True)
        record[name] = part
        write_json(path, record)
    print(f"written: {path}")
    return record


def measured(*, rows: int = ROWS, repeats: int = 3) -> Iterator[tuple[str, dict[str, Any]]]:
    """Carry out the measurements; yield the name and the result of each measurement.

    Args:
        rows: Number of simulations of the timed fits.
        repeats: Number of times that each fit is timed.

    Yields:
        Pairs of a name and a result. `limits`: the result of the function `limits`. `batches` and
        `members`: times and rates of a training step by batch size and by number of members.
        `step`: the result of `profile.step_profile`. `precision`: times and rates of a step of a
        wide flow by precision of the matrix products, with the validation loss after the timed
        epochs.
    """
    sizes = {**BASE, "rows": rows, "batch": BATCHES[0]}
    yield "limits", limits()
    yield "batches", _steps({f"{b}": {**sizes, "batch": b} for b in BATCHES}, repeats)
    yield "members", _steps({f"{m}": {**sizes, "members": m} for m in MEMBERS}, repeats)
    yield "step", profile.step_profile(sizes=sizes)
    wide = {**sizes, "batch": WIDE_BATCH}
    fits = {p: _steps({p: wide}, 10 * repeats, WIDE, p)[p] for p in PRECISIONS}
    yield "precision", fits


def markdown(part: dict[str, dict[str, float]], first: str) -> list[str]:
    """Format the timed fits as a Markdown table; return its lines.

    Args:
        part: The result `batches` or `members` of `measured`.
        first: Heading of the first column.
    """
    (base, *_) = (value["step_us"] for value in part.values())
    head = ["microseconds per step", "million rows per second", "time over that of the first"]
    lines = [[first, *head], ["---"] * 4]
    lines += [
        [
            f"{int(name):,}",
            f"{value['step_us']:.0f}",
            f"{value['rows_per_second'] / 1e6:.2f}",
            f"{value['step_us'] / base:.2f}",
        ]
        for name, value in part.items()
    ]
    return [f"| {' | '.join(line)} |" for line in lines]


def limits(*, size: int = 4_096, repeats: int = 5) -> dict[str, Any]:
    """Measure the launch time of kernels and the arithmetic rate, which limit a training step.

    Args:
        size: Size of the square matrices.
        repeats: Number of timed calls.

    Returns:
        A dict of `launch_us`, the mean time of a small kernel in a sequence of many, in
        microseconds; and `rate`, the operations per second of a product of two square matrices, by
        precision.
    """

    def chain(x: jax.Array) -> jax.Array:
        for _ in range(LAUNCHES):
            x = jnp.cos(x) / jnp.sum(x)  # the sum ends a kernel
        return x

    small = jax.jit(chain)
    x = jnp.ones(32)
    seconds = profile.seconds(lambda: jax.block_until_ready(small(x)), repeats)
    matrix = jax.random.normal(jax.random.key(0), (size, size))
    rates = {}
    for precision in PRECISIONS:
        rates[precision] = profile.rate(matrix, precision, repeats)
    return {"launch_us": 1e6 * seconds / LAUNCHES, "rate": rates}


def _steps(
    fits: dict[str, dict[str, int]],
    repeats: int,
    density: sf.NSF | None = None,
    precision: str | None = None,
) -> dict[str, dict[str, float]]:
    """Time an epoch of each fit in alternating order; return the times and rates of a step."""
    with contextlib.ExitStack() as stack:
        calls, steps, ensembles = {}, {}, {}
        for name, sizes in fits.items():
            ensemble = stack.enter_context(training(sizes, density, precision))
            ensembles[name] = ensemble
            calls[name] = partial(ensemble.epoch, jax.random.key(0))
            steps[name] = (sizes["rows"] - ensemble.held_out.shape[1]) // sizes["batch"]
        timings = interleaved(calls, repeats, "epochs")
    return {
        name: {
            "step_us": 1e6 * timings[name].median / steps[name],
            "steps_per_second": steps[name] / timings[name].median,
            "rows_per_second": sizes["members"]
            * sizes["batch"]
            * steps[name]
            / timings[name].median,
            "first_seconds": timings[name].first,
            "loss": float(ensembles[name].best_loss.mean()),
        }
        for name, sizes in fits.items()
    }


def _text(name: str, part: dict[str, Any]) -> str:
    if name == "step":
        return profile.text(part)
    if name == "limits":
        rates = ", ".join(f"{rate / 1e12:.1f} TFLOP/s {p}" for p, rate in part["rate"].items())
        return f"{part['launch_us']:.2f} us per kernel; {rates}"
    columns = next(iter(part.values()))
    return table(
        list(part), {key: [f"{value[key]:.5g}" for value in part.values()] for key in columns}
    )
