"""Profile of one training step by kind of kernel, and the time of its arithmetic alone.

Public names: `step_profile`, `rate`, `seconds`, `text`, `markdown`.
"""

from __future__ import annotations

import collections
import gzip
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from benchmarks.peers.measure import interleaved
from benchmarks.speed.growth import BASE, training
from sbi_flows.core.precision import precision_context
from sbi_flows.core.tables import table

KINDS = {
    "products and sums": ("dot", "ynn_fusion", "gemm", "cublas"),
    "sorts of the data's order": ("sort",),
    "copies and slices": ("copy", "slice", "wrapped_", "bitcast_dynamic", "pad", "transpose"),
    "elementwise": ("fusion", "exponential", "select", "broadcast", "concatenate"),
}
"""Kinds of kernel and the parts of XLA's kernel names by which they are recognised.

For the first two kinds these are prefixes of the name; for the others, any part of it.
"""


def step_profile(*, sizes: dict[str, int] = BASE, repeats: int = 5) -> dict[str, Any]:
    """Profile a training step of the default estimator, and compute the minimum time of a step.

    The minimum is the time of the matrix products, six operations for each weight and row, at the
    rate that this machine reaches for a large matrix product.

    Args:
        sizes: Sizes, with the keys of `growth.BASE`.
        repeats: Number of timed epochs.

    Returns:
        A dict of `step_us`, the median time of a step; `kernels`, the number of kernels per step,
        and `kernel_us`, their time by kind, in a profiled epoch (which is slower); `parameters`;
        `operations` per step; `rate`, in operations per second; and `floor_us`, the minimum time.
        Times are in microseconds.
    """
    with training(sizes) as ensemble:
        rows = sizes["rows"] - ensemble.held_out.shape[1]
        steps = rows // sizes["batch"]
        epoch_seconds = seconds(lambda: ensemble.epoch(jax.random.key(1)), repeats)
        events = _profiled(lambda: ensemble.epoch(jax.random.key(2)))
        (best,) = ensemble.best
        parameters = int(best.params.size)
    kinds, count = collections.Counter[str](), 0
    for name, microseconds in events:
        kind = _kind(name)
        if kind is not None:
            kinds[kind] += microseconds / steps
            count += 1
    operations = 6 * parameters * sizes["batch"]
    machine_rate = rate(jax.random.normal(jax.random.key(0), (1024, 1024)))
    return {
        "sizes": sizes,
        "step_us": 1e6 * epoch_seconds / steps,
        "kernels": count / steps,
        "kernel_us": dict(kinds),
        "parameters": parameters,
        "operations": operations,
        "rate": machine_rate,
        "floor_us": 1e6 * operations / machine_rate,
    }


def markdown(profile: dict[str, Any]) -> list[str]:
    """Format the times by kind of kernel as a Markdown table; return its lines."""
    rows = [f"| {kind} | {us:.0f} |" for kind, us in _ordered(profile)]
    return ["| kernels | microseconds per step |", "| --- | --- |", *rows]


def text(profile: dict[str, Any]) -> str:
    """Format the profile for the terminal: times by kind, the step, and its minimum time."""
    kinds = _ordered(profile)
    rows = table([kind for kind, _ in kinds], {"us per step": (f"{us:.0f}" for _, us in kinds)})
    return (
        f"{rows}\n{profile['kernels']:.0f} kernels per step of {profile['step_us']:.0f} us; the "
        f"matrix products alone would take {profile['floor_us']:.0f} us at "
        f"{profile['rate'] / 1e9:.0f} GFLOP/s"
    )


def rate(matrix: jax.Array, precision: str = "highest", repeats: int = 10) -> float:
    """Measure the operations per second of the product of a square matrix with itself."""
    with precision_context(precision):
        product = jax.jit(lambda a: a @ a)
        product_seconds = seconds(lambda: jax.block_until_ready(product(matrix)), repeats)
    return 2 * len(matrix) ** 3 / product_seconds


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Measure the median time of a call, after a first call that is not counted."""
    return interleaved({"": work}, repeats, "profile")[""].median


def _ordered(profile: dict[str, Any]) -> list[tuple[str, float]]:
    return sorted(profile["kernel_us"].items(), key=lambda pair: -pair[1])


def _kind(name: str) -> str | None:
    """Return the kind of a kernel by its name; None if the event is not a kernel."""
    if " " in name or "::" in name or name.startswith(("while", "call", "conditional", "Pjit")):
        return None  # an event that contains other kernels
    for kind, parts in list(KINDS.items())[:2]:
        if name.startswith(parts):
            return kind
    for kind, parts in list(KINDS.items())[2:]:
        if any(part in name for part in parts):
            return kind
    return None


def _profiled(work: Callable[[], Any]) -> Iterable[tuple[str, float]]:
    """Profile a call; return name and microseconds of each event, on a GPU of each kernel."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level, options.python_tracer_level = 3, 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            work()
        (file,) = Path(folder).rglob("*.trace.json.gz")
        trace = json.loads(gzip.decompress(file.read_bytes()))
    events = trace["traceEvents"]
    named = [e for e in events if e.get("ph") == "M" and "name" in e.get("args", {})]
    # the lines of a device named Stream hold its kernels; other lines repeat them
    devices = {e["pid"] for e in named if e["args"]["name"].startswith("/device:GPU")}
    streams = {(e["pid"], e.get("tid")) for e in named if e["args"]["name"].startswith("Stream")}
    return [
        (e["name"], e["dur"])
        for e in events
        if e.get("ph") == "X" and (not devices or (e["pid"], e["tid"]) in streams)
    ]
