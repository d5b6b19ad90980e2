"""Part of the report about the verdict of `sf.check` and about learning curves.

Public names: `verdict_tables`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.suite.report_page import Table


def verdict_tables(folder: Path) -> dict[str, Table]:
    """Make the tables of `verdict.json`, by their headings; empty if there is no such file.

    Args:
        folder: Folder of the record of `python -m benchmarks verdict`.
    """
    path = folder / "verdict.json"
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    makers = {
        "Verdict: unused information": ("unused", _unused),
        "Verdict: few data sets": ("few", _few),
        "Verdict: held-out rows against fresh rows": ("held_out", _held_out),
        "Learning curve: predicted and measured": ("learning", _learning),
    }
    return {heading: make(record) for heading, (part, make) in makers.items() if record.get(part)}


def _unused(record: dict[str, Any]) -> Table:
    """Make a table of the exact posteriors and of those that leave information unused."""
    rows = []
    for name, case in {**record.get("exact", {}), **record["unused"]}.items():
        low, high = case["nats_range"]
        is_exact = "exact_nats" not in case
        rows.append(
            [
                f"{name}, exact" if is_exact else name,
                str(case["checks"]),
                f"{case['unused information']:.3f}",
                "" if is_exact else f"{case['named']:.3f}",
                f"{case['nats']:.3f} ({low:.2f} to {high:.2f})",
                "0" if is_exact else ", ".join(f"{nats:.2f}" for nats in case["exact_nats"]),
                f"{case['calibrated']:.2f}",
            ]
        )
    columns = ["posterior", "checks", "leaves information unused", "right parameters named"]
    return [*columns, "nats found (range)", "nats unused", "calibrated"], rows


def _few(record: dict[str, Any]) -> Table:
    """Make a table of the verdicts about a posterior that is 1.3 times too narrow."""
    rows = [
        [n, case["checks"], f"x{case['least_width']:.2f}", _counts(case["verdicts"])]
        for n, case in record["few"].items()
    ]
    rows = [[str(cell) for cell in row] for row in rows]
    return ["data sets", "checks", "smallest error found in 95% of cases", "verdicts"], rows


def _counts(verdicts: dict[str, int]) -> str:
    return ", ".join(f"{word}: {count}" for word, count in sorted(verdicts.items()))


def _held_out(record: dict[str, Any]) -> Table:
    """Make a table of the optimism of a check on held-out rows, over all fits of each task."""
    rows = []
    for name, fits in record["held_out"].items():
        for what, label in (("gain", "gain (nats)"), ("width", "width")):
            kinds = ("held_out", "fresh_members", "fresh_mixture")
            values = np.array([[fit[f"{what}_{kind}"] for kind in kinds] for fit in fits])
            excess = values[:, 0] - values[:, 1]
            error = excess.std(ddof=1) / np.sqrt(len(excess)) if len(excess) > 1 else np.nan
            means = (f"{mean:.3f}" for mean in values.mean(axis=0))
            rows.append(
                [name, label, str(len(fits)), *means, f"{excess.mean():+.3f} +- {error:.3f}"]
            )
    columns = ["task", "figure", "fits", "held-out rows", "members, fresh rows"]
    return [*columns, "mixture, fresh rows", "optimism"], rows


def _learning(record: dict[str, Any]) -> Table:
    """Make a table of predicted and measured gains with more simulations."""
    rows = []
    for name, case in record["learning"].items():
        first, *larger = case["rows"]
        predictions = zip(larger, case["predicted"], case["measured"], strict=True)
        for size, (low, middle, high), measured in predictions:
            interval = f"{middle:+.3f} ({low:+.3f} to {high:+.3f})"
            rows.append([name, f"{first:,} to {size:,}", interval, f"{measured:+.3f}"])
    return ["task", "simulations", "predicted gain (90%), nats", "measured gain, nats"], rows
