"""`python -m benchmarks report`: Markdown and HTML tables of finished runs and published values.

Public names: `run`, `Cell`, `cells_of`, `summary`, `methods_table`, `parts_table`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.suite.published import best_amortised, published
from benchmarks.suite.published import figure as published_figure
from benchmarks.suite.records import SCHEMA, BadInput, writable_folder
from benchmarks.suite.report_observations import observations_table
from benchmarks.suite.report_page import Table, markdown, page
from benchmarks.suite.report_verdict import verdict_tables
from benchmarks.suite.scaling import PowerLaw, power_law


@dataclasses.dataclass(frozen=True)
class Cell:
    """All runs of one task, method and budget; the runs differ in their seeds.

    Attributes:
        task: Name of the task.
        method: Name of the method.
        budget: Number of simulations.
        records: Records of the runs, one per seed.
    """

    task: str
    method: str
    budget: int
    records: tuple[dict[str, Any], ...]

    def mean(self, *path: str) -> float | None:
        """Return the mean of a number over the records, or None if a record lacks the number.

        Args:
            path: Sequence of keys of the number in the nested dict of a record.
        """
        values = []
        for record in self.records:
            value: Any = record
            for name in path:
                value = None if value is None else value.get(name)
            values.append(value)
        return None if None in values else float(np.mean(values))

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean C2ST over observations, or None for fewer than two values."""
        values = np.array([record["c2st"]["values"] for record in self.records])
        count = values.shape[1]
        return float(values.mean(axis=0).std(ddof=1) / count**0.5) if count > 1 else None

    @property
    def least_predictive_p(self) -> float | None:
        """Median over runs of the smallest posterior predictive p-value of each run.

        None if a run has no p-values. The p-values are not corrected for multiple tests.
        """
        p_values = [
            [p for check in r.get("predictive", ()) for p in check.values()] for r in self.records
        ]
        return float(np.median([min(p) for p in p_values])) if all(p_values) else None

    @property
    def verdict(self) -> str:
        """Calibration verdict of the worst run, such as "calibrated" or "conservative: ..."."""
        checks = [record["check"] for record in self.records]
        worst = min(checks, key=lambda check: (check["calibrated"], check["conservative"]))
        # records of earlier versions have no information
        unused = max(_unused_nats(check) for check in checks)
        suffix = f"; leaves {unused:.2g} nats unused" * (unused > 0)
        if worst["calibrated"]:
            return f"calibrated{suffix}"
        text = re.sub(r" \([^()]*\)", "", worst["verdict"].splitlines()[0])
        return f"conservative: {text}{suffix}" if worst["conservative"] else f"{text}{suffix}"


def _unused_nats(check: dict[str, Any]) -> float:
    """Return the unused information that a check found, in nats; 0 if it found none."""
    information = check.get("information", {})
    return information["unused"] if information.get("kind") == "unused information" else 0.0


def run(results: Path, out: Path | None = None) -> Path:
    """Write the report to the files `report.md` and `report.html`, which need no other files.

    Args:
        results: Folder of the records of `python -m benchmarks run`.
        out: Folder in which the report is written, by default `results`.

    Returns:
        The path of `report.html`.

    Raises:
        BadInput: There is no finished run, or the folder is not writable.
    """
    cells = cells_of(_records(results))
    if not cells:
        raise BadInput(f"--results: no finished run in {results}")
    folder = writable_folder(results if out is None else out, "--out")
    tables = {**_tables(cells), **observations_table(results), **verdict_tables(results)}
    notes = _notes(cells)
    (folder / "report.md").write_text(markdown(tables, notes))
    path = folder / "report.html"
    path.write_text(page(tables, notes, _picture(cells)))
    print(f"written: {folder / 'report.md'}, {path}")
    return path


def cells_of(records: Sequence[dict[str, Any]]) -> list[Cell]:
    """Group records by task, method and budget, and sort the groups by the same three values."""
    groups = defaultdict(list)
    for record in records:
        groups[record["task"], record["method"], record["budget"]].append(record)
    ordered = sorted(groups.items(), key=lambda item: item[0])
    return [Cell(task, method, n, tuple(runs)) for (task, method, n), runs in ordered]


def _records(folder: Path) -> list[dict[str, Any]]:
    """Read all records of runs in a folder; print the names of unreadable files to stderr."""
    records = []
    for path in sorted(folder.glob("run-*.json")):
        try:
            record = json.loads(path.read_text())
            if record["schema"] == SCHEMA and record["kind"] == "run":
                records.append(record)
        except (OSError, ValueError, KeyError, TypeError):
            print(f"{path.name}: not a record, ignored", file=sys.stderr)
    return records


def _tables(cells: list[Cell]) -> dict[str, Table]:
    """Make the tables of the report; return a dict from heading to table."""
    return {
        "Summary": summary(cells),
        "Accuracy (C2ST, 0.5 is perfect)": _accuracy(cells),
        "Comparison of methods (C2ST, and held-out negative log density)": methods_table(cells),
        "Members of the stacks (held-out negative log density, and weight)": parts_table(cells),
        "Calibration": _calibration(cells),
        "Times and memory": _times(cells),
        "Scaling": _scaling(cells),
    }


def summary(cells: list[Cell]) -> Table:
    """Make a table with a row per task and method.

    The columns are the C2ST and the best published value at each budget, and the calibration
    verdict at the largest budget.
    """
    budgets = sorted({cell.budget for cell in cells})
    columns = ["task", "method"]
    for budget in budgets:
        columns += [f"C2ST at {budget:,}", "best published"]
    by_key = {(cell.task, cell.method, cell.budget): cell for cell in cells}
    rows = []
    for task, method in sorted({(cell.task, cell.method) for cell in cells}):
        row, verdict = [task, method], "-"
        for budget in budgets:
            cell, best = by_key.get((task, method, budget)), best_amortised(task, budget)
            row.append(_number(cell.mean("c2st", "mean") if cell else None))
            row.append(f"{best.c2st:.3f}" if best else "-")
            verdict = cell.verdict if cell else verdict
        rows.append([*row, verdict])
    return [*columns, "verdict"], rows


def _accuracy(cells: list[Cell]) -> Table:
    columns = ["task", "method", "simulations", "C2ST", "standard error over observations"]
    columns += ["published NPE", "best published amortised"]
    rows = []
    for cell in cells:
        best = best_amortised(cell.task, cell.budget)
        npe = published_figure(cell.task, cell.budget, "NPE")
        rows.append(
            [
                cell.task,
                cell.method,
                f"{cell.budget:,}",
                _number(cell.mean("c2st", "mean")),
                _number(cell.standard_error),
                _number(npe),
                f"{best.c2st:.3f} ({best.method})" if best else "-",
            ]
        )
    return columns, rows


def methods_table(cells: list[Cell]) -> Table:
    """Make a table with a row per task and budget and a column per method.

    The table is empty if there is only one method.
    """
    methods = sorted({cell.method for cell in cells})
    pairs = sorted({(cell.task, cell.budget) for cell in cells})
    by_key = {(c.task, c.budget, c.method): c for c in cells}
    rows = []
    for task, budget in pairs if len(methods) > 1 else []:
        row = [by_key.get((task, budget, method)) for method in methods]
        rows.append([task, f"{budget:,}", *(_c2st_and_loss(cell) for cell in row)])
    return ["task", "simulations", *methods], rows


def parts_table(cells: list[Cell]) -> Table:
    """Make a table of stacks: loss and weight of each estimator, and loss of the mixture."""
    stacks = [c for c in cells if all("shares" in r["history"] for r in c.records)]
    names = list(dict.fromkeys(name for c in stacks for name in _parts(c.records[0])))
    rows = []
    for cell in stacks:
        values = {name: "-" for name in names}
        for i, name in enumerate(_parts(cell.records[0])):
            weight = np.mean([r["history"]["shares"][i] for r in cell.records])
            losses = [r["history"]["held_out_loss"][i] for r in cell.records]
            loss = None if None in losses else float(np.mean(losses))
            values[name] = f"{_number(loss)} ({weight:.0%})"
        mixture = _number(cell.mean("history", "mixture_loss"))
        rows.append([cell.task, cell.method, f"{cell.budget:,}", *values.values(), mixture])
    return ["task", "method", "simulations", *names, "mixture"], rows


def _parts(record: dict[str, Any]) -> list[str]:
    """Return the names of the densities of a stack's estimators, in order."""
    estimators = record["estimator"]["estimators"]
    names = [e["density"].split("(")[0] + ", emulated" * bool(e["emulator"]) for e in estimators]
    return [f"{name} {i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _c2st_and_loss(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return f"{_number(cell.mean('c2st', 'mean'))} ({_number(cell.mean('held_out_loss'))})"


def _calibration(cells: list[Cell]) -> Table:
    columns = ["task", "method", "simulations", "verdict", "smallest predictive p"]
    columns += ["held-out loss, nats", "draws outside the support"]
    return columns, [
        [
            cell.task,
            cell.method,
            f"{cell.budget:,}",
            cell.verdict,
            _number(cell.least_predictive_p),
            _number(cell.mean("held_out_loss")),
            _number(cell.mean("outside_support"), ".2%"),
        ]
        for cell in cells
    ]


def _times(cells: list[Cell]) -> Table:
    phases = ("simulate", "fit", "draw", "check")
    timed = ("simulate (s)", "fit (s)", "of which compilation (s, all threads)", "draw (s)")
    columns = ["task", "method", "simulations", *timed, "check (s)", "peak memory (GiB)"]
    rows = []
    for cell in cells:
        seconds = [_number(cell.mean("seconds", phase), ".1f") for phase in phases]
        seconds.insert(2, _number(cell.mean("compile_seconds", "fit"), ".1f"))
        memory = _number(cell.mean("peak_memory_gib"), ".1f")
        rows.append([cell.task, cell.method, f"{cell.budget:,}", *seconds, memory])
    return columns, rows


def _scaling(cells: list[Cell]) -> Table:
    columns = ["task", "method", "score", "power law", "90% interval of the exponent"]
    columns += ["at the largest budget", "at ten times this budget"]
    rows = []
    for task, method in sorted({(c.task, c.method) for c in cells}):
        selected = [c for c in cells if (c.task, c.method) == (task, method)]
        largest = max(cell.budget for cell in selected)
        for score, law in _laws(selected).items():
            if law:
                power, interval = f"N^-{law.exponent:.2f}", f"{law.low:.2f} to {law.high:.2f}"
                values = [f"{law.at(largest):.3f}", f"{law.at(10 * largest):.3f}"]
                rows.append([task, method, score, power, interval, *values])
    return columns, rows


def _laws(cells: list[Cell]) -> dict[str, PowerLaw | None]:
    """Fit power laws to the C2ST (with floor 0.5) and to the held-out loss (with fitted floor)."""
    runs = [(cell.budget, record) for cell in cells for record in cell.records]
    scores = [(n, r["c2st"]["mean"]) for n, r in runs if r["c2st"]["mean"] is not None]
    losses = [(n, r["held_out_loss"]) for n, r in runs if r["held_out_loss"] is not None]
    return {"C2ST": _law(scores, 0.5), "held-out loss": _law(losses, None)}


def _law(pairs: list[tuple[int, float]], floor: float | None) -> PowerLaw | None:
    return power_law([n for n, _ in pairs], [score for _, score in pairs], floor)


def _notes(cells: list[Cell]) -> list[str]:
    """Return the notes on the machine, the averages and the published values."""
    records = [record for cell in cells for record in cell.records]
    machines = {json.dumps(r["machine"], sort_keys=True) for r in records}
    descriptions = []
    for machine in map(json.loads, sorted(machines)):
        memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
        descriptions.append(
            f"{machine['cores']} cores, {machine['architecture']}{memory}, {machine['device']}"
        )
    sources = sorted({p.source for p in published() if p.task in {c.task for c in cells}})
    jobs = max(record.get("jobs", 1) for record in records)
    return [
        f"Machine: {'; '.join(descriptions)}."
        + f" Up to {jobs} runs shared it at the same time." * (jobs > 1),
        f"{len(records)} runs. Values are means over seeds and over the observations of a task. "
        "The smallest predictive p is over two tests per observation, without correction; with a "
        "thousand draws, the p-value of a test is at least .002.",
        "Our C2ST uses the compiled classifier, which agrees with scikit-learn's to .005, and our "
        "own observations. The published values use scikit-learn's classifier and ten other "
        "observations of the same tasks; between observations they vary by .02 to .14 (one "
        "standard deviation). Sources: " + "; ".join(sources) + ".",
    ]


def _picture(cells: list[Cell]) -> bytes:
    """Plot C2ST against fit time, with a line per task and method; return the PNG data."""
    from matplotlib.figure import Figure

    from sbi_flows.plots.style import COLOURS, STYLES

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (task, method) in enumerate(sorted({(c.task, c.method) for c in cells})):
        selected = [c for c in cells if (c.task, c.method) == (task, method)]
        points = [(c.mean("seconds", "fit"), c.mean("c2st", "mean")) for c in selected]
        complete = [point for point in points if None not in point]
        if complete:
            seconds, accuracies = zip(*complete, strict=True)
            line = axes.plot(seconds, accuracies, marker="o", ms=4, label=f"{task}, {method}")[0]
            line.set(color=COLOURS[i % len(COLOURS)], ls=STYLES[i // len(COLOURS) % len(STYLES)])
    axes.axhline(0.5, color="0.6", lw=0.8)
    axes.set(xscale="log", xlabel="time of the fit with compilation, s", ylabel="C2ST")
    if axes.lines[1:]:
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)
