"""Profile of a training step: time by kind of kernel, and minimum time of the arithmetic.

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
"""Kinds of kernel, each with strings that occur in the XLA names of the kernels of this kind.

For the first two kinds, the kernel name must start with one of the strings. For the other kinds, a
string may occur anywhere in the name.
"""


def step_profile(*, sizes: dict[str, int] = BASE, repeats: int = 5) -> dict[str, Any]:
    """Profile a training step of the default estimator, and compute its minimum time.

    The minimum time is that of the matrix products alone. A step needs six operations per weight
    and simulation of the batch. The rate of operations is measured with a large matrix product on
    this machine.

    Args:
        sizes: Sizes of the problem, with the keys of `growth.BASE`.
        repeats: Number of timed epochs.

    Returns:
        A dict of `sizes`; `step_us`, the median time of a step; `kernels`, the number of kernels
        per step; `kernel_us`, the time of the kernels per step by kind; `parameters`, the number of
        weights; `operations`, the number of operations per step; `rate`, in operations per second;
        and `floor_us`, the minimum time of a step. Times are in microseconds. `kernels` and
        `kernel_us` come from a profiled epoch, which is slower than the timed epochs.
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
    """Format a table for the terminal: time by kind of kernel, time of a step, minimum time."""
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
    """Measure the median time of `repeats` calls in seconds, after an untimed first call."""
    return interleaved({"": work}, repeats, "profile")[""].median


def _ordered(profile: dict[str, Any]) -> list[tuple[str, float]]:
    return sorted(profile["kernel_us"].items(), key=lambda pair: -pair[1])


def _kind(name: str) -> str | None:
    """Return the kind of kernel of a profiler event, or None if the name matches no kind."""
    if " " in name or "::" in name or name.startswith(("while", "call", "conditional", "Pjit")):
        return None  # this event contains other kernels, which have their own events
    for kind, parts in list(KINDS.items())[:2]:
        if name.startswith(parts):
            return kind
    for kind, parts in list(KINDS.items())[2:]:
        if any(part in name for part in parts):
            return kind
    return None


def _profiled(work: Callable[[], Any]) -> Iterable[tuple[str, float]]:
    """Profile a call of `work`; return the name and the microseconds of each profiler event.

    On a GPU, only the kernels are returned.
    """
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level, options.python_tracer_level = 3, 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            work()
        (file,) = Path(folder).rglob("*.trace.json.gz")
        trace = json.loads(gzip.decompress(file.read_bytes()))
    events = trace["traceEvents"]
    named = [e for e in events if e.get("ph") == "M" and "name" in e.get("args", {})]
    # each GPU has trace lines named "Stream" with its kernels; its other lines repeat these
    devices = {e["pid"] for e in named if e["args"]["name"].startswith("/device:GPU")}
    streams = {(e["pid"], e.get("tid")) for e in named if e["args"]["name"].startswith("Stream")}
    return [
        (e["name"], e["dur"])
        for e in events
        if e.get("ph") == "X" and (not devices or (e["pid"], e["tid"]) in streams)
    ]
