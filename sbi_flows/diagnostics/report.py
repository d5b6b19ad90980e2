"""The report of `check`, which can be printed, plotted, or saved as an HTML page or as JSON.

Public name: `Report`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import textwrap
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbi_flows.core.record import to_json_data
from sbi_flows.core.tables import p_text, table
from sbi_flows.diagnostics import sections
from sbi_flows.diagnostics.coverage import Coverage
from sbi_flows.diagnostics.glossary import explain
from sbi_flows.diagnostics.information import Information
from sbi_flows.diagnostics.page import document, environment, write_text
from sbi_flows.diagnostics.sbc import SBC
from sbi_flows.diagnostics.sharpness import Sharpness
from sbi_flows.diagnostics.tarp import TARP
from sbi_flows.diagnostics.verdict import BIASED, OVER, SHAPE, UNDER, Finding, Test

if TYPE_CHECKING:
    from matplotlib.figure import Figure


ADVICE = {
    OVER: "fit with more simulations or members, or correct with sf.recalibrate or sf.conformal",
    BIASED: "fit with more simulations, or correct with sf.recalibrate",
    SHAPE: "fit with more simulations, or try another density; see docs/choosing.md",
    UNDER: "usable, but wider than necessary: fit with more simulations",
}
"""Recommended action for each kind of finding."""


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """Result of `check`.

    Attributes:
        verdict: Two lines. The first says "calibrated", "cannot tell" (too few data sets), or the
            errors: their kinds, parameters, sizes and corrected p-values. If some simulations
            failed, it gives the number used. The second line says whether the posterior uses the
            data (`information.verdict`).
        calibrated: True if no test rejects and there are enough data sets to find errors that
            matter (`least_width`). A correct posterior is rejected with a probability of about
            `level`.
        conservative: True if the posterior is calibrated, or under-confident and not otherwise
            wrong.
        findings: Errors of the posterior, in order of their p-values; empty if calibrated.
        tests: All tests, with p-values before and after correction for the number of tests.
        sbc: Ranks per parameter.
        tarp: Coverage around reference points.
        coverage: Coverage of highest-density regions and central intervals.
        sharpness: Width of the posterior relative to the prior.
        information: Test whether the posterior uses the information in the data.
        least_width: Smallest factor by which the width of a parameter must be wrong to be found,
            in 95% of cases. If it is above 1.2 and no test rejects, the verdict is "cannot tell".
        level: Probability of rejecting a correct posterior, for each line of the verdict.
        num_datasets: Number of data sets checked.
        num_failed: Number of failed simulations that were left out.
        draws: Number of draws from each posterior.
        command: Python code that repeats the check, given the posterior and the simulator
            or the simulations.
    """

    verdict: str
    calibrated: bool
    conservative: bool
    findings: tuple[Finding, ...]
    tests: tuple[Test, ...]
    sbc: SBC
    tarp: TARP
    coverage: Coverage
    sharpness: Sharpness
    information: Information
    least_width: float
    level: float
    num_datasets: int
    num_failed: int
    draws: int
    command: str

    @property
    def uses_data(self) -> bool | None:
        """Return True if the posterior uses the data; None if too few data sets were checked."""
        kind = self.information.kind
        return None if kind == "cannot tell" else kind == "uses the data"

    @property
    def advice(self) -> tuple[str, ...]:
        """Recommended action for each problem; empty if there is none."""
        kinds = {f.kind for f in self.findings}
        if self.information.kind == "unused information":
            # a better posterior comes first: other errors may then disappear
            return self.information.advice
        if len(kinds) > 1:
            kinds -= {UNDER}  # a posterior with other errors is not usable
        lines = [ADVICE[kind] for kind in ADVICE if kind in kinds]
        if not self.findings and not self.calibrated and self.uses_data is not None:
            lines.append("check with more data sets")
        return (*lines, *self.information.advice)

    def explain(self) -> str:
        """Return an explanation of each term of the glossary that occurs in the report."""
        return explain(self.summary())

    def __repr__(self) -> str:
        """Return the text of `summary`."""
        return self.summary()

    def summary(self) -> str:
        """Return the verdict, what to do, a table of parameters, the joint tests, and notes."""
        p = {(t.parameter, t.name): p_text(t.adjusted) for t in self.tests}
        labels = self.sbc.labels
        columns = {
            "shift (sd)": (f"{s:+.2f}" for s in self.sbc.shift),
            "p": (p[m, "shift"] for m in labels),
            "width": (f"x{w:.2f}" for w in self.sbc.width),
            "p ": (p[m, "width"] for m in labels),
            "ranks p": (p[m, "ranks"] for m in labels),
            "log-gamma": (f"{g:.1f}" for g in self.sbc.log_gamma),
            "90% interval": (f"{c:.3f}" for c in self.coverage.central[89]),
            "contraction": (f"{c:.2f}" for c in self.sharpness.contraction),
        }
        joint = (
            f"joint: HPD coverage p {p[None, 'coverage']} (50%: {self.coverage.at(0.5):.3f}, "
            f"90%: {self.coverage.at(0.9):.3f}); TARP p {p[None, 'tarp']} "
            f"(ATC {self.tarp.atc:+.3f})"
        )
        title = f"check of {self.num_datasets} data sets x {self.draws} draws"
        if self.num_failed:
            title += f"; {self.num_failed} simulations failed and were left out"
        verdict = _filled(self.verdict, 100)
        advice = [_filled(f"to do: {line}", 100) for line in self.advice]
        lines = [verdict, *advice, "", title, table(labels, columns), joint, *self.notes()]
        lines.append("p-values are corrected for the number of tests (Holm)")
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """Return sentences on parameters that the data do not constrain."""
        unlearned = self.sharpness.unlearned
        if not unlearned or self.information.kind == "no information":
            return []
        if len(unlearned) == len(self.sbc.labels):
            return ["the posterior equals the prior in every parameter (contraction about 0)"]
        return [f"not learned from the data (contraction about 0): {', '.join(unlearned)}"]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON data, without the ranks of single data sets."""
        return {
            "verdict": self.verdict,
            "calibrated": self.calibrated,
            "conservative": self.conservative,
            "level": self.level,
            "num_datasets": self.num_datasets,
            "num_failed": self.num_failed,
            "draws": self.draws,
            "findings": [dataclasses.asdict(f) for f in self.findings],
            "tests": [dataclasses.asdict(t) for t in self.tests],
            "sbc": self.sbc.to_dict(),
            "tarp": self.tarp.to_dict(),
            "coverage": self.coverage.to_dict(),
            "sharpness": self.sharpness.to_dict(),
            "information": self.information.to_dict(),
            "least_width": self.least_width,
            "advice": list(self.advice),
        }

    def to_html(self) -> str:
        """Return the report as one self-contained HTML page that loads no other file."""
        calibration, information = self.verdict.split("\n", 1)
        judged = {calibration: self.calibrated, information: bool(self.uses_data)}
        failures = "no simulation failed"
        if self.num_failed:
            failures = f"{self.num_failed} simulations failed and were left out"
        draws = f"{self.draws} draws from the posterior of each"
        body = [
            "<h1>Can this posterior be trusted?</h1>",
            *(
                f'<p class="verdict{" good" * good}">{escape(line)}</p>'
                for line, good in judged.items()
            ),
            *(f"<p>To do: {escape(line)}.</p>" for line in self.advice),
            f"<p>{self.num_datasets} data sets, {draws}; {failures}.</p>",
            *(f"<p>{escape(note)}</p>" for note in self.notes()),
            sections.tests_section(self.tests, self.level),
            sections.ranks_section(self.sbc),
            sections.coverage_section(self.coverage),
            sections.tarp_section(self.tarp),
            sections.sharpness_section(self.sharpness),
            sections.information_section(self.information),
            sections.glossary_section(self.explain()),
            sections.repeat_section(self.command),
        ]
        return document(f"check: {re.split('[:(]', self.verdict)[0].strip()[:60]}", body)

    def plot(self) -> Figure:
        """Plot ranks, highest-density coverage and TARP side by side."""
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=(11.5, 4.0), layout="constrained")
        ranks, regions, points = figure.subplots(1, 3)
        self.sbc.plot(ranks).set_title("ranks (SBC)", fontsize="medium")
        self.coverage.plot(regions).set_title("highest-density regions", fontsize="medium")
        self.tarp.plot(points).set_title("regions around points (TARP)", fontsize="medium")
        figure.suptitle(_filled(self.verdict, 110), fontsize="medium")
        return figure

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as a self-contained HTML page or as JSON.

        The page contains the verdict, a picture of each check, the sharpness, the number of failed
        simulations, versions, and the command that repeats the check. In JSON, NaN and infinity are
        null. An existing file is replaced only when the new one is complete.

        Args:
            path: File to write, with the ending `.html` or `.json`, in a folder that exists.

        Returns:
            The path.

        Raises:
            ValueError: The file has another ending, or its folder does not exist or cannot be
                written to.
        """
        path = Path(path)
        if path.suffix not in (".html", ".json"):
            raise ValueError(
                f"path: expected a name that ends in .html or .json, got {path.name!r}"
            )
        write_text(path, self.to_html() if path.suffix == ".html" else self._to_json())
        return path

    def _to_json(self) -> str:
        data = {**self.to_dict(), "command": self.command, "versions": environment()}
        text = json.dumps(to_json_data(data), indent=1, allow_nan=False, ensure_ascii=False)
        return f"{text}\n"


def _filled(text: str, width: int) -> str:
    """Break each line of a text at the given width, and indent what follows."""
    lines = (textwrap.fill(line, width, subsequent_indent="  ") for line in text.splitlines())
    return "\n".join(lines)
