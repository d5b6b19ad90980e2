"""`python -m benchmarks report`: finished runs beside what is published, as Markdown and HTML.

Public names: `run`, `Cell`, `cells_of`, `summary`, `methods_table`, `parts_table`.
"""

from __future__ import annotations

import base64
import dataclasses
import html
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
from benchmarks.suite.scaling import PowerLaw, power_law


@dataclasses.dataclass(frozen=True)
class Cell:
    """Runs of one task, method and budget, over their seeds.

    Attributes:
        task: Name of the task.
        method: Name of the method.
        budget: Number of simulations.
        records: The runs.
    """

    task: str
    method: str
    budget: int
    records: tuple[dict[str, Any], ...]

    def mean(self, *path: str) -> float | None:
        """Mean of a number in the records; None where it is missing in any."""
        values = []
        for record in self.records:
            value: Any = record
            for name in path:
                value = None if value is None else value.get(name)
            values.append(value)
        return None if None in values else float(np.mean(values))

    @property
    def standard_error(self) -> float | None:
        """Of the mean C2ST over observations; None for fewer than two, or without references."""
        each = np.array([record["c2st"]["values"] for record in self.records])
        count = each.shape[1]
        return float(each.mean(axis=0).std(ddof=1) / count**0.5) if count > 1 else None

    @property
    def least_predictive_p(self) -> float | None:
        """Of all observations of a run, as it is; the median over runs, None without any."""
        found = [[p for one in r.get("predictive", ()) for p in one.values()] for r in self.records]
        return float(np.median([min(p) for p in found])) if all(found) else None

    @property
    def verdict(self) -> str:
        """Of the worst run: "calibrated", "conservative" or what is wrong, and where."""
        checks = [record["check"] for record in self.records]
        worst = min(checks, key=lambda check: (check["calibrated"], check["conservative"]))
        if worst["calibrated"]:
            return "calibrated"
        said = re.sub(r" \([^()]*\)", "", worst["verdict"])
        return f"conservative: {said}" if worst["conservative"] else said


def run(results: Path, out: Path | None = None) -> Path:
    """Write `report.md` and `report.html`, one file each with everything in it.

    Args:
        results: Folder with the records of `python -m benchmarks run`.
        out: Folder for the report; that of the results by default.

    Returns:
        The page.

    Raises:
        BadInput: There is no finished run, or the folder cannot be written to.
    """
    cells = cells_of(_records(results))
    if not cells:
        raise BadInput(f"--results: no finished run in {results}")
    folder = writable_folder(results if out is None else out, "--out")
    tables = _tables(cells)
    notes = _notes(cells)
    (folder / "report.md").write_text(_markdown(tables, notes))
    page = folder / "report.html"
    page.write_text(_page(tables, notes, _picture(cells)))
    print(f"written: {folder / 'report.md'}, {page}")
    return page


def cells_of(records: Sequence[dict[str, Any]]) -> list[Cell]:
    """Group records by task, method and budget, in this order."""
    groups = defaultdict(list)
    for record in records:
        groups[record["task"], record["method"], record["budget"]].append(record)
    ordered = sorted(groups.items(), key=lambda item: item[0])
    return [Cell(task, method, n, tuple(runs)) for (task, method, n), runs in ordered]


def _records(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("run-*.json")):
        try:
            record = json.loads(path.read_text())
            if record["schema"] == SCHEMA and record["kind"] == "run":
                found.append(record)
        except (OSError, ValueError, KeyError, TypeError):
            print(f"{path.name}: not a record, left out", file=sys.stderr)
    return found


def _tables(cells: list[Cell]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Heading, columns and rows of each table."""
    return {
        "Summary": summary(cells),
        "Accuracy (C2ST, 0.5 is perfect)": _accuracy(cells),
        "Methods side by side (C2ST, and the held-out negative log density)": methods_table(cells),
        "Parts of the stacks (held-out negative log density, and share)": parts_table(cells),
        "Calibration": _calibration(cells),
        "Times and memory": _times(cells),
        "Scaling": _scaling(cells),
    }


def summary(cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: one row a task and method, C2ST beside the best published at each budget.

    The verdict is that of the largest budget.
    """
    budgets = sorted({cell.budget for cell in cells})
    columns = ["task", "method"]
    for budget in budgets:
        columns += [f"C2ST at {budget:,}", "best published"]
    found = {(cell.task, cell.method, cell.budget): cell for cell in cells}
    rows = []
    for task, method in sorted({(cell.task, cell.method) for cell in cells}):
        row, verdict = [task, method], "-"
        for budget in budgets:
            cell, best = found.get((task, method, budget)), best_amortised(task, budget)
            row.append(_number(cell.mean("c2st", "mean") if cell else None))
            row.append(f"{best.c2st:.3f}" if best else "-")
            verdict = cell.verdict if cell else verdict
        rows.append([*row, verdict])
    return [*columns, "verdict"], rows


def _accuracy(cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
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


def methods_table(cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
    """One row a task and budget, one column a method; no rows for a single method."""
    methods = sorted({cell.method for cell in cells})
    places = sorted({(cell.task, cell.budget) for cell in cells})
    found = {(c.task, c.budget, c.method): c for c in cells}
    rows = []
    for task, budget in places if len(methods) > 1 else []:
        row = [found.get((task, budget, method)) for method in methods]
        rows.append([task, f"{budget:,}", *(_both(cell) for cell in row)])
    return ["task", "simulations", *methods], rows


def parts_table(cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
    """What each estimator of a stack was worth: its share, its held-out loss, and the mixture's."""
    stacks = [c for c in cells if all("shares" in r["history"] for r in c.records)]
    names = list(dict.fromkeys(name for c in stacks for name in _parts(c.records[0])))
    rows = []
    for cell in stacks:
        found = {name: "-" for name in names}
        for i, name in enumerate(_parts(cell.records[0])):
            share = np.mean([r["history"]["shares"][i] for r in cell.records])
            losses = [r["history"]["held_out_loss"][i] for r in cell.records]
            loss = None if None in losses else float(np.mean(losses))
            found[name] = f"{_number(loss)} ({share:.0%})"
        mixture = _number(cell.mean("history", "mixture_loss"))
        rows.append([cell.task, cell.method, f"{cell.budget:,}", *found.values(), mixture])
    return ["task", "method", "simulations", *names, "together"], rows


def _parts(record: dict[str, Any]) -> list[str]:
    """Kinds of the estimators of a stack, in their order."""
    estimators = record["estimator"]["estimators"]
    names = [e["density"].split("(")[0] + ", emulated" * bool(e["emulator"]) for e in estimators]
    return [f"{name} {i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _both(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return f"{_number(cell.mean('c2st', 'mean'))} ({_number(cell.mean('held_out_loss'))})"


def _calibration(cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
    columns = ["task", "method", "simulations", "verdict", "least predictive p", "held-out"]
    columns.append("outside the support")
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


def _times(cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
    phases = ("simulate", "fit", "draw", "check")
    timed = ("simulate (s)", "fit (s)", "of which compilation (s, all threads)", "draw (s)")
    columns = ["task", "method", "simulations", *timed, "check (s)", "memory (GiB)"]
    rows = []
    for cell in cells:
        seconds = [_number(cell.mean("seconds", phase), ".1f") for phase in phases]
        seconds.insert(2, _number(cell.mean("compile_seconds", "fit"), ".1f"))
        memory = _number(cell.mean("peak_memory_gib"), ".1f")
        rows.append([cell.task, cell.method, f"{cell.budget:,}", *seconds, memory])
    return columns, rows


def _scaling(cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
    columns = ["task", "method", "score", "falls as", "90% interval", "at the most", "at ten times"]
    rows = []
    for task, method in sorted({(c.task, c.method) for c in cells}):
        own = [c for c in cells if (c.task, c.method) == (task, method)]
        most = max(cell.budget for cell in own)
        for score, law in _laws(own).items():
            if law:
                falls, interval = f"N^-{law.exponent:.2f}", f"{law.low:.2f} to {law.high:.2f}"
                bought = [f"{law.at(most):.3f}", f"{law.at(10 * most):.3f}"]
                rows.append([task, method, score, falls, interval, *bought])
    return columns, rows


def _laws(cells: list[Cell]) -> dict[str, PowerLaw | None]:
    """Laws of the classifier's accuracy and of the held-out loss, whose floor is not known."""
    runs = [(cell.budget, record) for cell in cells for record in cell.records]
    told = [(n, r["c2st"]["mean"]) for n, r in runs if r["c2st"]["mean"] is not None]
    losses = [(n, r["held_out_loss"]) for n, r in runs if r["held_out_loss"] is not None]
    return {"C2ST": _law(told, 0.5), "held-out": _law(losses, None)}


def _law(pairs: list[tuple[int, float]], floor: float | None) -> PowerLaw | None:
    return power_law([n for n, _ in pairs], [score for _, score in pairs], floor)


def _notes(cells: list[Cell]) -> list[str]:
    records = [record for cell in cells for record in cell.records]
    machines = {json.dumps(r["machine"], sort_keys=True) for r in records}
    said = []
    for machine in map(json.loads, sorted(machines)):
        memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
        said.append(
            f"{machine['cores']} cores, {machine['architecture']}{memory}, {machine['device']}"
        )
    sources = sorted({p.source for p in published() if p.task in {c.task for c in cells}})
    jobs = max(record.get("jobs", 1) for record in records)
    return [
        f"Machine: {'; '.join(said)}."
        + f" Up to {jobs} runs at a time, which share it." * (jobs > 1),
        f"{len(records)} runs; means over seeds, and over the observations of a task. The least "
        "predictive p is that of two tests an observation; with a thousand draws, a test says .002 "
        "at the least.",
        "C2ST by the compiled classifier, which agrees with scikit-learn's to .005, on "
        "observations of our own. Published figures are of scikit-learn's, on ten other "
        "observations of the same tasks, among which they vary by .02 to .14 (one standard "
        "deviation): " + "; ".join(sources) + ".",
    ]


def _markdown(tables: dict[str, tuple[list[str], list[list[str]]]], notes: list[str]) -> str:
    parts = ["# Benchmark", *notes]
    for heading, (columns, rows) in tables.items():
        if rows:
            lines = [columns, ["---"] * len(columns), *rows]
            parts.append(f"## {heading}\n\n" + "\n".join(f"| {' | '.join(r)} |" for r in lines))
    return "\n\n".join(parts) + "\n"


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } th, td { padding: .25em .8em; text-align: left; }
th { border-bottom: 2px solid #888; } tr:nth-child(even) { background: #f4f4f4; }
td.fine { background: #cdebd3; } td.wrong { background: #f5cfcb; } img { max-width: 100%; }
"""


def _page(
    tables: dict[str, tuple[list[str], list[list[str]]]], notes: list[str], picture: bytes
) -> str:
    parts = [f"<p>{html.escape(note)}</p>" for note in notes]
    for heading, (columns, rows) in tables.items():
        if rows:
            parts.append(f"<h2>{html.escape(heading)}</h2>{_html_table(columns, rows)}")
    source = base64.b64encode(picture).decode()
    parts.append(
        "<h2>Accuracy against training time</h2>"
        f'<img alt="C2ST against seconds of fitting" src="data:image/png;base64,{source}">'
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Benchmark</title>"
        f"<style>{STYLE}</style></head><body><h1>Benchmark</h1>{''.join(parts)}</body></html>\n"
    )


def _html_table(columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = []
    for row in rows:
        data = (
            f"<td{_colour(c, v)}>{html.escape(v)}</td>" for c, v in zip(columns, row, strict=True)
        )
        body.append(f"<tr>{''.join(data)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _colour(column: str, value: str) -> str:
    if column != "verdict":
        return ""
    fine = value.startswith(("calibrated", "conservative"))
    return ' class="fine"' if fine else ' class="wrong"'


def _picture(cells: list[Cell]) -> bytes:
    """C2ST against seconds of fitting, a line a task; PNG."""
    from matplotlib.figure import Figure

    from sbi_flows.plots.style import COLOURS, STYLES

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (task, method) in enumerate(sorted({(c.task, c.method) for c in cells})):
        own = [c for c in cells if (c.task, c.method) == (task, method)]
        points = [(c.mean("seconds", "fit"), c.mean("c2st", "mean")) for c in own]
        drawn = [p for p in points if None not in p]
        if drawn:
            seconds, accuracies = zip(*drawn, strict=True)
            line = axes.plot(seconds, accuracies, marker="o", ms=4, label=f"{task}, {method}")[0]
            line.set(color=COLOURS[i % len(COLOURS)], ls=STYLES[i // len(COLOURS) % len(STYLES)])
    axes.axhline(0.5, color="0.6", lw=0.8)
    axes.set(xscale="log", xlabel="seconds of fitting, compilation included", ylabel="C2ST")
    if axes.lines[1:]:
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)
