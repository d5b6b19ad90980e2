"""Where the time of one training step goes, and how far it is from the arithmetic alone.

Public names: `step_profile`, `text`, `markdown`.
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
import jax.numpy as jnp

from benchmarks.growth import BASE, training
from benchmarks.peers.measure import interleaved
from sbi_flows.diagnostics.tables import table

KINDS = {
    "products and sums": ("dot", "ynn_fusion", "gemm", "cublas"),
    "sorts of the data's order": ("sort",),
    "copies and slices": ("copy", "slice", "wrapped_", "bitcast_dynamic", "pad", "transpose"),
    "elementwise": ("fusion", "exponential", "select", "broadcast", "concatenate"),
}
"""Beginnings, or for the last two any part, of the names that XLA gives its kernels."""


def step_profile(*, repeats: int = 5) -> dict[str, Any]:
    """Time of a step of the default estimator, by kind of kernel, beside its floor.

    The floor is the arithmetic of the matrix products, six operations for each weight and row, at
    the rate that this machine reaches with a large product.

    Returns:
        `step_us` (median), `kernels` a step and `kernel_us` by kind, as a profiled epoch has them
        (profiling slows it), `parameters`, `operations` a step, `rate` in operations a second, and
        `floor_us`.
    """
    with training(BASE) as ensemble:
        rows = BASE["rows"] - ensemble.held_out.shape[1]
        steps = rows // BASE["batch"]
        seconds = _seconds(lambda: ensemble.epoch(jax.random.key(1)), repeats)
        events = _profiled(lambda: ensemble.epoch(jax.random.key(2)))
        (best,) = ensemble.best
        parameters = int(best.params.size)
    kinds, count = collections.Counter[str](), 0
    for name, microseconds in events:
        kind = _kind(name)
        if kind is not None:
            kinds[kind] += microseconds / steps
            count += 1
    operations = 6 * parameters * BASE["batch"]
    rate = _rate()
    return {
        "sizes": BASE,
        "step_us": 1e6 * seconds / steps,
        "kernels": count / steps,
        "kernel_us": dict(kinds),
        "parameters": parameters,
        "operations": operations,
        "rate": rate,
        "floor_us": 1e6 * operations / rate,
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
    """Names and microseconds of all events while the work is done."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level, options.python_tracer_level = 3, 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            work()
        (file,) = Path(folder).rglob("*.trace.json.gz")
        trace = json.loads(gzip.decompress(file.read_bytes()))
    return [(e["name"], e["dur"]) for e in trace["traceEvents"] if e.get("ph") == "X"]


def _rate(size: int = 1024) -> float:
    """Operations a second of a product of two large matrices."""
    matrix = jnp.ones((size, size)) / size
    product = jax.jit(lambda a: a @ a)
    seconds = _seconds(lambda: jax.block_until_ready(product(matrix)), 10)
    return 2 * size**3 / seconds


def _seconds(work: Callable[[], Any], repeats: int) -> float:
    return interleaved({"": work}, repeats, "profile")[""].median
