"""A report as one file: a self-contained page, or numbers.

Public names: `save_report`.

The page loads nothing: its style is in it, and pictures are data. Pictures are images of their own,
so that no name in them can act on the page.
"""

from __future__ import annotations

import base64
import io
import json
import os
import platform
import warnings
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbi_flows.core.files import whole_file
from sbi_flows.core.record import to_json_data
from sbi_flows.core.tables import p_text
from sbi_flows.core.versions import versions

if TYPE_CHECKING:
    from sbi_flows.diagnostics.check import Report

PACKAGES = ("sbi-flows", "jax", "jaxlib", "flax", "numpyro", "numpy", "scipy", "matplotlib")

SHOWN = (49, 79, 89, 94)
"""Which of the levels of `Coverage` the table has: 50, 80, 90 and 95%."""

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --soft: #595959;
  --line: #c8c8c8; --good: #00614a; --bad: #a32d00; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --paper: #16181b; --soft: #b4b4b4;
  --line: #484c52; --good: #5fd3b0; --bad: #ff9d73; } }
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 52rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.verdict { border-left: .4rem solid var(--bad); padding: .4rem .8rem; font-size: 1.1rem; }
.verdict.good { border-color: var(--good); }
.soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
td.bad { color: var(--bad); font-weight: bold; }
img { background: #ffffff; width: 100%; max-width: 30rem; height: auto; border-radius: .3rem; }
pre { border: 1px solid var(--line); padding: .7rem; overflow-x: auto; }
"""


def save_report(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write a report as a page (`.html`) or as its numbers (`.json`).

    The file is there as a whole or not at all. In JSON, numbers that are not finite are null.

    Args:
        report: What `check` found.
        path: Where to write; the folder exists.

    Returns:
        The path.

    Raises:
        ValueError: Another ending than `.html` or `.json`, or a folder that is missing or cannot be
            written to.
    """
    path = Path(path)
    if path.suffix not in (".html", ".json"):
        raise ValueError(f"path: expected a name that ends in .html or .json, got {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"path: expected a folder that exists, got {path.parent}")
    text = page(report) if path.suffix == ".html" else _json(report)
    try:
        with whole_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise ValueError(f"path: cannot write {path}: {error.strerror or error}") from None
    return path


def page(report: Report) -> str:
    """The report as HTML."""
    good = " good" if report.calibrated else ""
    failed = f"; {report.num_failed} simulations failed and were left out"
    sizes = (
        f"{report.num_datasets} data sets, {report.draws} draws from the posterior of each"
        f"{failed if report.num_failed else '; no simulation failed'}."
    )
    body = [
        "<h1>Is this posterior to be trusted?</h1>",
        f'<p class="verdict{good}">{escape(report.verdict)}</p>',
        f"<p>{sizes}</p>",
        *(f"<p>{escape(text)}</p>" for text in report.notes()),
        _tests(report),
        _ranks(report),
        _coverage(report),
        _tarp(report),
        _sharpness(report),
        _repeat(report),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>check: {escape(report.verdict.split(':')[0][:60])}</title>",
            f"<style>{STYLE}</style></head>",
            "<body><main>",
            *body,
            "</main></body></html>\n",
        ]
    )


def _tests(report: Report) -> str:
    cells = [
        [t.parameter or "all jointly", t.name, p_text(t.p_value), p_text(t.adjusted)]
        for t in report.tests
    ]
    bad = [t.adjusted <= report.level for t in report.tests]
    said = (
        f"A correct posterior is refused with a probability of about {report.level:g}: p-values "
        "are corrected for their number (Holm). Those that reject are bold."
    )
    columns = ["parameter", "test", "p alone", "p corrected"]
    return _section("All tests", said, _table(columns, cells, bad))


def _ranks(report: Report) -> str:
    sbc = report.sbc
    cells = [
        [label, f"{s:+.2f}", f"x{w:.2f}", p_text(k), f"{g:.1f}"]
        for label, s, w, k, g in zip(
            sbc.labels, sbc.shift, sbc.width, sbc.ks, sbc.log_gamma, strict=True
        )
    ]
    said = (
        "Where true parameters rank among draws (SBC). A line that leaves the band is wrong: above "
        "zero throughout, the posterior lies too high; above, then below, it is too narrow."
    )
    columns = ["parameter", "shift (sd)", "width", "p of ranks, alone", "log-gamma"]
    picture = _picture(sbc, "ECDF of the ranks of each parameter less that of uniform ranks")
    return _section("Ranks of single parameters", said, picture + _table(columns, cells))


def _coverage(report: Report) -> str:
    found = report.coverage
    rows = [("joint (highest density)", found.expected)]
    rows += [(label, found.central[:, i]) for i, label in enumerate(found.labels)]
    cells = [[label, *(f"{values[i]:.3f}" for i in SHOWN)] for label, values in rows]
    said = (
        "How often credible regions hold the truth. Jointly by regions of highest density, each "
        "parameter by central intervals. Below the diagonal: over-confident."
    )
    columns = ["region", *(f"{found.levels[i]:.0%}" for i in SHOWN)]
    picture = _picture(found, "Share of truths in regions of highest density, by their level")
    return _section("Coverage", said, picture + _table(columns, cells))


def _tarp(report: Report) -> str:
    found = report.tarp
    said = (
        "Coverage of regions around points that depend on the data, which a posterior that does "
        f"not listen to the data fails. p alone {p_text(found.ks)}, area to the curve "
        f"{found.atc:+.3f} (negative is over-confident)."
    )
    return _section(
        "Regions around points (TARP)",
        said,
        _picture(found, "Share of truths in regions around points, by their level"),
    )


def _sharpness(report: Report) -> str:
    found = report.sharpness
    cells = [
        [label, f"{c:.2f}", f"{s:.4g}", f"{m:.2f}"]
        for label, c, s, m in zip(
            found.labels, found.contraction, found.sd, found.movement, strict=True
        )
    ]
    said = (
        "How much the data teach. Contraction 0: as wide as the prior; 1: known exactly. Movement "
        "0: the posterior does not answer to the data."
    )
    columns = ["parameter", "contraction", "posterior sd", "movement"]
    return _section("Sharpness", said, _table(columns, cells))


def _repeat(report: Report) -> str:
    cells = [[name, number] for name, number in environment().items()]
    said = "The same posterior, simulator and versions give the same numbers."
    code = f"<pre><code>{escape(report.command)}</code></pre>"
    return _section("To repeat this check", said, code + _table(["with", "version"], cells))


def environment() -> dict[str, str]:
    """Versions of Python and of packages, the platform and the device, by name."""
    import jax

    found = versions(PACKAGES)
    device = jax.devices()[0]
    precision = "64" if jax.config.read("jax_enable_x64") else "32"
    found["platform"] = f"{platform.system()} on {platform.machine()}"
    found["device"] = f"{device.device_kind} ({device.platform}), {precision}-bit numbers"
    return found


def _section(title: str, said: str, inside: str) -> str:
    return f'<section><h2>{title}</h2>\n<p class="soft">{escape(said)}</p>\n{inside}\n</section>'


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], bad: Sequence[bool] | None = None
) -> str:
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    lines = []
    for i, row in enumerate(rows):
        mark = ' class="bad"' if bad is not None and bad[i] else ""
        lines.append("<tr>" + "".join(f"<td{mark}>{escape(c)}</td>" for c in row) + "</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>'
        "</table></div>"
    )


def _picture(part: Any, alt: str) -> str:
    """A plot as an image with text for those who do not see it; the same bytes every time."""
    import matplotlib
    from matplotlib import style
    from matplotlib.figure import Figure

    # names are not mathematics, and letters come from the reader's fonts, whatever their script
    plain = {"svg.hashsalt": alt, "svg.fonttype": "none", "text.parse_math": False}
    with matplotlib.rc_context(), style.context(["default", plain]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(5.4, 3.8), layout="constrained")
        part.plot(figure.add_subplot())
        held = io.StringIO()
        figure.savefig(held, format="svg", metadata={"Date": None})
    data = base64.b64encode(held.getvalue().encode()).decode()
    return f'<p><img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}"></p>\n'


def _json(report: Report) -> str:
    held = {**report.to_dict(), "command": report.command, "versions": environment()}
    return json.dumps(to_json_data(held), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
