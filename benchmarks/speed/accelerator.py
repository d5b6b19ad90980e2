"""`python -m benchmarks accelerator`: training steps on a GPU, and the limits of the GPU.

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
"""Batch sizes."""
MEMBERS = (1, 8, 32)
"""Numbers of ensemble members."""
PRECISIONS = ("highest", "tensorfloat32", "bfloat16")
WIDE, WIDE_BATCH = sf.NSF(hidden=(512, 512), context_width=512), 4_096
"""A flow and a batch size whose matrix products are large enough to occupy a GPU."""

LAUNCHES = 256
"""Number of small kernels in the measurement of the launch time."""


def run(folder: Path, rows: int = ROWS) -> dict[str, Any]:
    """Measure each part, print it, and write the record after each part.

    Args:
        folder: Folder of the record, which exists and is writable.
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
    """Measure and yield each part of the record with its name.

    Args:
        rows: Number of simulations of the timed fits.
        repeats: Number of timings of each fit.

    Yields:
        `limits`: the result of `limits`. `batches` and `members`: times and rates of a step by
        batch size and by number of members. `step`: the result of `profile.step_profile`.
        `precision`: times and rates of a step of a wide flow by precision of the matrix products,
        with its validation loss after the timed epochs.
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
        part: The part `batches` or `members` of the record.
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
    """Measure two lower bounds of the time of a step: kernel launches and arithmetic.

    Args:
        size: Size of the square matrices.
        repeats: Number of timings.

    Returns:
        A dict of `launch_us`, the time of each of many small kernels in a row, in microseconds, and
        `rate`, the operations per second of a product of two square matrices, by precision.
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
    """Measure an epoch of each fit in turn, and return times and rates per step."""
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
