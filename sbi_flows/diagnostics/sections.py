"""Sections of the HTML page of a check: tests, ranks, coverage, TARP, sharpness, environment.

Internal names: `tests_section`, `ranks_section`, `coverage_section`, `tarp_section`,
`sharpness_section`, `information_section`, `glossary_section`, `repeat_section`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sbi_flows.core.tables import p_text
from sbi_flows.diagnostics.coverage import TABLE_LEVELS, Coverage
from sbi_flows.diagnostics.information import Information
from sbi_flows.diagnostics.page import environment, html_table, picture, section
from sbi_flows.diagnostics.sbc import SBC
from sbi_flows.diagnostics.sharpness import Sharpness
from sbi_flows.diagnostics.tarp import TARP
from sbi_flows.diagnostics.verdict import Test


def tests_section(tests: Sequence[Test], level: float) -> str:
    """Return the table of all tests; rejecting tests are highlighted."""
    rows = [
        [t.parameter or "all jointly", t.name, p_text(t.p_value), p_text(t.adjusted)] for t in tests
    ]
    rejects = [t.adjusted <= level for t in tests]
    explanation = (
        f"A correct posterior is rejected with a probability of about {level:g}: p-values are "
        "corrected for the number of tests (Holm). Tests that reject are bold."
    )
    columns = ["parameter", "test", "p alone", "p corrected"]
    return section("All tests", explanation, html_table(columns, rows, rejects))


def ranks_section(sbc: SBC) -> str:
    """Return the plot of the ranks and the table of SBC."""
    values = zip(sbc.labels, sbc.shift, sbc.width, sbc.ks, sbc.log_gamma, strict=True)
    rows = [[m, f"{s:+.2f}", f"x{w:.2f}", p_text(k), f"{g:.1f}"] for m, s, w, k, g in values]
    explanation = (
        "Ranks of the true parameters among posterior draws (SBC). A line outside the band means "
        "an error. Above zero everywhere: the posterior lies too high. First above, then below "
        "zero: it is too narrow."
    )
    columns = ["parameter", "shift (sd)", "width", "p of ranks, alone", "log-gamma"]
    image = picture(sbc.plot, "ECDF of the ranks of each parameter minus that of uniform ranks")
    table = html_table(columns, rows)
    return section("Ranks of single parameters", explanation, image + table)


def coverage_section(coverage: Coverage) -> str:
    """Return the picture and the table of coverage."""
    curves = [("joint (highest density)", coverage.expected)]
    curves += [(label, coverage.central[:, i]) for i, label in enumerate(coverage.labels)]
    rows = [[label, *(f"{values[i]:.3f}" for i in TABLE_LEVELS)] for label, values in curves]
    explanation = (
        "Share of true parameters inside credible regions: joint regions of highest density, and "
        "the central interval of each parameter. Below the diagonal: over-confident."
    )
    columns = ["region", *(f"{coverage.levels[i]:.0%}" for i in TABLE_LEVELS)]
    image = picture(coverage.plot, "Share of truths in regions of highest density, by their level")
    return section("Coverage", explanation, image + html_table(columns, rows))


def tarp_section(tarp: TARP) -> str:
    """Return the picture and the p-value of TARP."""
    explanation = (
        "Coverage of regions around points that depend on the data. A posterior that ignores the "
        f"data fails this test. p alone {p_text(tarp.ks)}, area to the curve {tarp.atc:+.3f} "
        "(negative is over-confident)."
    )
    image = picture(tarp.plot, "Share of truths in regions around points, by their level")
    return section("Regions around points (TARP)", explanation, image)


def sharpness_section(sharpness: Sharpness) -> str:
    """Return the table of sharpness."""
    values = zip(
        sharpness.labels, sharpness.contraction, sharpness.sd, sharpness.movement, strict=True
    )
    rows = [[label, f"{c:.2f}", f"{s:.4g}", f"{m:.2f}"] for label, c, s, m in values]
    explanation = (
        "Information gained from the data. Contraction 0: as wide as the prior; 1: known exactly. "
        "Movement 0: the posterior does not depend on the data."
    )
    columns = ["parameter", "contraction", "posterior sd", "movement"]
    return section("Sharpness", explanation, html_table(columns, rows))


def information_section(information: Information) -> str:
    """Return the table of the test of information."""
    rows = [
        ["gained over the prior", f"{information.gain:.3g} ± {information.gain_error:.2g}"],
        ["unused", f"{information.unused:.2g} ± {information.unused_error:.2g}"],
        ["smallest amount that would be found", f"{information.detectable:.2g}"],
    ]
    if information.start_gain is not None:
        rows.insert(1, ["gained over the linear start", f"{information.start_gain:.3g}"])
    p_values = zip(information.labels, information.p_value, strict=True)
    tests = [[label, p_text(float(p))] for label, p in p_values]
    explanation = (
        "Can other regressions predict from the data where the truth lies within the posterior? "
        "What they predict is information that the posterior leaves unused. In nats."
    )
    tables = html_table(["information", "nats"], rows)
    tables += html_table(["parameter", "p corrected"], tests)
    return section("Use of the data", explanation, tables)


def glossary_section(text: str) -> str:
    """Return the explanations of terms; each starts with its term and a colon."""
    entries = text.replace("\n    ", " ").splitlines()
    pairs = [entry.split(": ", 1) for entry in entries]
    body = "".join(f"<dt>{escape(t)}</dt><dd>{escape(m)}</dd>" for t, m in pairs)
    return section("Glossary", "The terms of this report.", f"<dl>{body}</dl>")


def repeat_section(command: str) -> str:
    """Return the command that repeats the check, and the installed versions."""
    rows = [[name, number] for name, number in environment().items()]
    explanation = "The same posterior, simulator and versions give the same numbers."
    code = f"<pre><code>{escape(command)}</code></pre>"
    table = html_table(["with", "version"], rows)
    return section("To repeat this check", explanation, code + table)
