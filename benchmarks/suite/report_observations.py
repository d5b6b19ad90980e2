"""Part of the report about sets, series, images and missing entries.

Public names: `observations_table`.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.suite.report_page import Table


def observations_table(folder: Path) -> dict[str, Table]:
    """Make a table of `observations.json`, by its heading; empty if there is no such file.

    It has a row for each kind of observation of each task.

    Args:
        folder: Folder of the record of `python -m benchmarks observations`.
    """
    path = folder / "observations.json"
    if not path.exists():
        return {}
    rows = []
    for name, case in json.loads(path.read_text())["cases"].items():
        verdicts = "; ".join(
            f"{group}: {lines[0].split(':')[0]}" for group, lines in case["checks"].items()
        )
        for kind, score in case["c2st"].items():
            shown = [f"{score['mean']:.3f}", f"{max(score['values']):.3f}"]
            seconds = f"{case['fit_seconds']:.0f}"
            rows.append(
                [
                    name,
                    kind,
                    f"{case['simulations']:,}",
                    seconds,
                    *shown,
                    verdicts,
                ]
            )
    columns = ["task", "observation", "simulations", "fit (s)", "C2ST", "worst C2ST"]
    return {"Sets, series, images, missing entries": ([*columns, "verdict of sf.check"], rows)}
