"""What a GPU or TPU does with a fit: batches, ensembles, precisions, and the limits beside them.

Public names: `run`, `measured`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import sbi_flows as sf
from benchmarks import profile
from benchmarks.growth import BASE, training
from benchmarks.peers.measure import interleaved
from benchmarks.records import now, provenance, write_json
from sbi_flows.diagnostics.tables import table
from simulators import slcp

ROWS = 100_000
BATCHES = (256, 1_024, 4_096, 16_384)
MEMBERS = (1, 8, 32)
PRECISIONS = ("highest", "tensorfloat32", "bfloat16")
WIDE = sf.NSF(hidden=(1_024, 1_024), context_width=1_024)
"""A flow whose products are large enough for an accelerator's units."""

LAUNCHES = 256


def run(folder: Path, rows: int = ROWS) -> dict[str, Any]:
    """Measure, print and write a record into the folder.

    Args:
        folder: Where the record goes; it exists and is writable.
        rows: Simulations that the timed fits have.

    Returns:
        The record.
    """
    record = {**provenance(), "kind": "accelerator", **measured(rows=rows)}
    stamp = now().replace("-", "").replace(":", "")[:15]
    print(f"written: {write_json(folder / f'accelerator-{stamp}.json', record)}")
    return record


def measured(*, rows: int = ROWS, repeats: int = 3) -> dict[str, Any]:
    """Every part in turn, each printed as soon as it is there.

    Args:
        rows: Simulations that the timed fits have.
        repeats: Timings of each.

    Returns:
        `limits`: microseconds of the smallest kernel and operations a second by precision.
        `step`: as `profile.step_profile`. `batches`, `members`, `wide`: microseconds a step, and
        steps and rows a second, by batch size, by number of members, and by precision and batch
        size of a wide flow. `accuracy`: held-out loss of this flow on slcp by precision.
    """
    sizes = {**BASE, "rows": rows, "batch": BATCHES[0]}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "limits": limits,
        "step": partial(profile.step_profile, sizes=sizes),
        "batches": lambda: _steps({f"{b}": {**sizes, "batch": b} for b in BATCHES}, repeats),
        "members": lambda: _steps({f"{m}": {**sizes, "members": m} for m in MEMBERS}, repeats),
        "wide": lambda: {
            precision: _steps(
                {f"{b}": {**sizes, "batch": b} for b in BATCHES[1::2]}, repeats, WIDE, precision
            )
            for precision in PRECISIONS
        },
        "accuracy": lambda: {precision: _accuracy(precision, rows) for precision in PRECISIONS},
    }
    found: dict[str, Any] = {}
    for name, measure in parts.items():
        found[name] = measure()
        print(f"\n{name}\n{_text(name, found[name])}", flush=True)
    return found


def limits(*, size: int = 4_096, repeats: int = 5) -> dict[str, Any]:
    """What no step can beat: the time of a kernel that does next to nothing, and of arithmetic.

    Returns:
        `launch_us`, of each of many small kernels in a row; `rate`, operations a second of a
        product of two square matrices of this size, by precision.
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
    """Of an epoch of each of the fits, which take turns."""
    with contextlib.ExitStack() as stack:
        calls, steps = {}, {}
        for name, sizes in fits.items():
            ensemble = stack.enter_context(training(sizes, density, precision))
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
        }
        for name, sizes in fits.items()
    }


def _accuracy(precision: str, rows: int) -> dict[str, Any]:
    """Held-out loss of a wide flow that is trained in this precision, and the time it takes."""
    task = slcp()
    sims = sf.simulate(jax.random.key(0), task.prior, task.simulator, rows, progress=False)
    settings = sf.Training(
        batch_size=1_024, max_epochs=10, learning_rate=1e-3, matmul_precision=precision
    )
    npe = sf.NPE(task.prior, WIDE, training=settings, members=2)
    posterior, history = npe.fit(jax.random.key(1), sims, progress=False)
    x = task.observation(1)
    theta, of_draws = posterior.sample_and_log_prob(jax.random.key(2), x, 1_000)
    apart = jnp.abs(posterior.log_prob(theta, x) - of_draws)
    return {
        "held_out_loss": float(history.held_out_loss.mean()),
        "member_losses": [float(loss) for loss in history.best_loss],
        "seconds": history.seconds,
        "density_gap": float(jnp.max(apart)),
    }


def _text(name: str, part: dict[str, Any]) -> str:
    if name == "step":
        return profile.text(part)
    if name == "limits":
        rates = ", ".join(f"{rate / 1e12:.1f} TFLOP/s {p}" for p, rate in part["rate"].items())
        return f"{part['launch_us']:.2f} us a kernel; {rates}"
    if name == "wide":
        part = {f"{p} {b}": value for p, fits in part.items() for b, value in fits.items()}
    columns = [key for key in next(iter(part.values())) if key != "member_losses"]
    return table(
        list(part), {key: [f"{value[key]:.5g}" for value in part.values()] for key in columns}
    )
