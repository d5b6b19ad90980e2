"""Table that compares the conditional densities: accuracy, calibration and computing times.

Public names: `KINDS`, `choosing_table`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.suite.report import Cell

KINDS = {
    "npe": "`NSF`",
    "npe-flow-matching": "`FlowMatching`",
    "npe-diffusion": "`Diffusion`",
    "npe-diffusion-distilled": "`Diffusion`, distilled to 2 steps",
    "npe-cnf": "`CNF`",
}
"""Map from a method's name in the benchmark to the name of its density in the table."""

COLUMNS = (
    "task",
    "density",
    "C2ST",
    "held-out loss, nats",
    "fit, s",
    "10,000 draws, s",
    "10,000 densities, s",
    "verdict",
)


def choosing_table(records: Iterable[dict[str, Any]]) -> list[str]:
    """Format a Markdown table with a row per task and density; return its lines.

    The time of a fit includes compilation; the other times do not. Draws are timed at one
    observation. Each timed evaluation of the density uses a different observation.

    Args:
        records: Records of `python -m benchmarks run`. Records with fewer than two C2ST values are
            ignored.
    """
    order = list(KINDS)
    chosen = [r for r in records if r["method"] in KINDS and len(r["c2st"]["values"]) > 1]
    chosen.sort(key=lambda r: (r["task"], order.index(r["method"])))
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *map(_cells, chosen)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cells(record: dict[str, Any]) -> list[str]:
    seconds, compiling = record["seconds"], record["compile_seconds"]
    repeats = len(record["c2st"]["values"]) - 1
    return [
        record["task"],
        KINDS[record["method"]],
        f"{record['c2st']['mean']:.3f}",
        f"{record['held_out_loss']:.3f}",
        f"{seconds['fit']:.0f}",
        f"{seconds['draw again'] / repeats:.2f}",
        f"{seconds['held-out'] - compiling['held-out']:.1f}",
        Cell(record["task"], record["method"], record["budget"], (record,)).verdict,
    ]
