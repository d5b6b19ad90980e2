"""Where the time of one training step goes, and how far it is from the arithmetic alone.

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
"""Beginnings, or for the last two any part, of the names that XLA gives its kernels."""


def step_profile(*, sizes: dict[str, int] = BASE, repeats: int = 5) -> dict[str, Any]:
    """Time of a step of the default estimator, by kind of kernel, beside its floor.

    The floor is the arithmetic of the matrix products, six operations for each weight and row, at
    the rate that this machine reaches with a large product.

    Args:
        sizes: As `growth.BASE`.
        repeats: Epochs timed.

    Returns:
        `step_us` (median), `kernels` a step and `kernel_us` by kind, as a profiled epoch has them
        (profiling slows it), `parameters`, `operations` a step, `rate` in operations a second, and
        `floor_us`.
    """
    with training(sizes) as ensemble:
        rows = sizes["rows"] - ensemble.held_out.shape[1]
        steps = rows // sizes["batch"]
        spent = seconds(lambda: ensemble.epoch(jax.random.key(1)), repeats)
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
    reached = rate(jax.random.normal(jax.random.key(0), (1024, 1024)))
    return {
        "sizes": sizes,
        "step_us": 1e6 * spent / steps,
        "kernels": count / steps,
        "kernel_us": dict(kinds),
        "parameters": parameters,
        "operations": operations,
        "rate": reached,
        "floor_us": 1e6 * operations / reached,
    }


def markdown(profile: dict[str, Any]) -> list[str]:
    """The kinds of kernels as the lines of a Markdown table."""
    rows = [f"| {kind} | {us:.0f} |" for kind, us in _ordered(profile)]
    return ["| kernels | microseconds a step |", "| --- | --- |", *rows]


def text(profile: dict[str, Any]) -> str:
    """The kinds of kernels with their time, then the step beside its floor."""
    kinds = _ordered(profile)
    rows = table([kind for kind, _ in kinds], {"us a step": (f"{us:.0f}" for _, us in kinds)})
    return (
        f"{rows}\n{profile['kernels']:.0f} kernels a step of {profile['step_us']:.0f} us; its "
        f"products alone take {profile['floor_us']:.0f} us at {profile['rate'] / 1e9:.0f} GFLOP/s"
    )


def rate(matrix: jax.Array, precision: str = "highest", repeats: int = 10) -> float:
    """Operations a second of the product of a square matrix with itself."""
    with precision_context(precision):
        product = jax.jit(lambda a: a @ a)
        spent = seconds(lambda: jax.block_until_ready(product(matrix)), repeats)
    return 2 * len(matrix) ** 3 / spent


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median time of the work, once it has been done before."""
    return interleaved({"": work}, repeats, "profile")[""].median


def _ordered(profile: dict[str, Any]) -> list[tuple[str, float]]:
    return sorted(profile["kernel_us"].items(), key=lambda pair: -pair[1])


def _kind(name: str) -> str | None:
    """Kind of the kernel of this name; None for what is no kernel."""
    if " " in name or "::" in name or name.startswith(("while", "call", "conditional", "Pjit")):
        return None  # what other kernels run inside
    for kind, parts in list(KINDS.items())[:2]:
        if name.startswith(parts):
            return kind
    for kind, parts in list(KINDS.items())[2:]:
        if any(part in name for part in parts):
            return kind
    return None


def _profiled(work: Callable[[], Any]) -> Iterable[tuple[str, float]]:
    """Names and microseconds of all events while the work is done; an accelerator's kernels."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level, options.python_tracer_level = 3, 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            work()
        (file,) = Path(folder).rglob("*.trace.json.gz")
        trace = json.loads(gzip.decompress(file.read_bytes()))
    events = trace["traceEvents"]
    named = [e for e in events if e.get("ph") == "M" and "name" in e.get("args", {})]
    # a device's lines named Stream are its kernels; others sum them up once more
    devices = {e["pid"] for e in named if e["args"]["name"].startswith("/device:GPU")}
    streams = {(e["pid"], e.get("tid")) for e in named if e["args"]["name"].startswith("Stream")}
    return [
        (e["name"], e["dur"])
        for e in events
        if e.get("ph") == "X" and (not devices or (e["pid"], e["tid"]) in streams)
    ]
