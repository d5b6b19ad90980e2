"""Is this posterior to be trusted? Three checks on fresh simulations, and a verdict.

Public names: `check`, `Report`.
"""

from __future__ import annotations

import dataclasses
import os
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.core.checks import require_count
from sbi_flows.core.errors import SimulationFailed
from sbi_flows.core.tables import p_text, table
from sbi_flows.core.typing import Key, Simulator
from sbi_flows.diagnostics.coverage import Coverage, coverage_of
from sbi_flows.diagnostics.ranks import draw_pass
from sbi_flows.diagnostics.references import crude_posterior, prior_scale
from sbi_flows.diagnostics.sbc import SBC, sbc_of
from sbi_flows.diagnostics.sharpness import Sharpness, sharpness_of
from sbi_flows.diagnostics.tarp import TARP, tarp_of
from sbi_flows.diagnostics.verdict import UNDER, Finding, Test, findings_of, tests_of, verdict_of
from sbi_flows.posteriors.base import PosteriorLike
from sbi_flows.posteriors.passes import MIN_DATASETS, MIN_DRAWS
from sbi_flows.simulations.simulate import simulate
from sbi_flows.simulations.simulations import Simulations


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What `check` found.

    Attributes:
        verdict: One sentence: calibrated, or over-confident, under-confident, biased or
            mis-shaped, in which parameters, how far and with which corrected p-values; and how many
            simulations it is about, if some failed.
        calibrated: Whether no test rejects; a correct posterior is refused with probability of
            about `level`.
        conservative: Whether nothing worse than under-confidence was found.
        findings: What is wrong, the surest first; empty when calibrated.
        tests: Every test with its p-value, alone and corrected for the family.
        sbc: Ranks per parameter.
        tarp: Coverage around reference points.
        coverage: Coverage of highest-density regions and central intervals.
        sharpness: How much narrower than the prior the posterior is.
        level: Family-wise level of the tests.
        num_datasets: Data sets checked.
        num_failed: Simulations left out because they failed.
        draws: Draws from each posterior.
        command: Python that repeats the check, given the posterior and the simulator.
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
    level: float
    num_datasets: int
    num_failed: int
    draws: int
    command: str

    def __repr__(self) -> str:
        """The text of `summary`."""
        return self.summary()

    def summary(self) -> str:
        """The verdict, a table of parameters, the joint tests, and what to know beside them."""
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
        head = f"check of {self.num_datasets} data sets x {self.draws} draws"
        if self.num_failed:
            head += f"; {self.num_failed} simulations failed and were left out"
        verdict = textwrap.fill(self.verdict, 100)
        lines = [verdict, "", head, table(labels, columns), joint, *self.notes()]
        lines.append("p-values are corrected for their number (Holm)")
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """What a calibrated posterior may still lack."""
        unlearned = self.sharpness.unlearned
        if not unlearned:
            return []
        if len(unlearned) == len(self.sbc.labels):
            return ["the posterior equals the prior (contraction about 0): the data taught nothing"]
        return [f"not learned from the data (contraction about 0): {', '.join(unlearned)}"]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, fit for JSON; ranks of single data sets are left out."""
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
        }

    def plot(self) -> Any:
        """Ranks, highest-density coverage and TARP beside each other; a matplotlib figure."""
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=(11.5, 4.0), layout="constrained")
        parts = {
            "ranks (SBC)": self.sbc,
            "highest-density regions": self.coverage,
            "regions around points (TARP)": self.tarp,
        }
        for ax, (title, part) in zip(figure.subplots(1, 3), parts.items(), strict=True):
            part.plot(ax).set_title(title, fontsize="medium")
        figure.suptitle(textwrap.fill(self.verdict, 110), fontsize="medium")
        return figure

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as one self-contained page (`.html`), or as numbers (`.json`).

        The page has the verdict, every check with its picture, sharpness, failures, versions and
        the command that repeats the check; it loads nothing from anywhere. A file that is there is
        replaced as a whole.

        Args:
            path: Where to write; the folder exists.

        Returns:
            The path.

        Raises:
            ValueError: Another ending, or a folder that is missing or cannot be written to.
        """
        from sbi_flows.diagnostics.page import save_report

        return save_report(self, path)


def check(
    key: Key,
    posterior: PosteriorLike,
    simulator: Simulator,
    *,
    datasets: int = 1_000,
    draws: int = 1_000,
    level: float = 0.05,
    progress: bool = True,
) -> Report:
    """Check a posterior on fresh simulations from its own prior, and say what is wrong.

    SBC, TARP and highest-density coverage share one pass of posterior draws. Each parameter is
    tested for a shift, for a wrong width and for ranks of any other shape, the joint posterior by
    coverage and by TARP; Holm's correction over all of them keeps a correct posterior from being
    refused more often than `level`.

    The answer is about the posterior on average over data sets from the prior; that it is right at
    one observation, or that the simulator describes the real data, it does not say. Where some
    simulations fail, it is about the others: the posterior is checked on parameters from the prior
    given that their simulation is valid, which are those that it was trained on.

    Args:
        key: Random key.
        posterior: The posterior to check.
        simulator: The simulator that it was trained on, `(key, theta) -> x`.
        datasets: Number of fresh simulations, at least 50; those that fail are left out and
            counted.
        draws: Independent draws from each posterior, at least 20.
        level: Probability of refusing a correct posterior.
        progress: Show progress bars.

    Returns:
        The report; printing it shows the verdict and a table.

    Raises:
        ValueError: Too few data sets or draws, a level outside (0, 1), or a simulator that cannot
            be traced.
        SimulationFailed: Fewer than 50 simulations succeeded.
        SbiFlowsError: The posterior gave NaN, or draws that are not finite.
    """
    _check_sizes(datasets, draws, level)
    simulate_key, reference_key, draw_key = jax.random.split(key, 3)
    sims = simulate(simulate_key, posterior.prior, simulator, datasets, progress=progress)
    valid = sims.only_valid()
    if len(valid) < MIN_DATASETS:
        raise SimulationFailed(
            f"{len(sims) - len(valid)} of {len(sims)} simulations failed: too few left for a "
            f"check, which needs {MIN_DATASETS}"
        )
    ranks = draw_pass(
        draw_key,
        posterior,
        sims,
        draws=draws,
        references=crude_posterior(reference_key, valid),
        scale=prior_scale(valid.theta),
        progress=progress,
    )
    sbc, tarp, coverage = sbc_of(ranks), tarp_of(ranks), coverage_of(ranks)
    tests = tests_of(sbc, tarp, coverage)
    findings = findings_of(tests, sbc, tarp, coverage, level)
    harmless = all(f.kind == UNDER for f in findings)
    return Report(
        verdict=verdict_of(findings, tests, ranks.labels, level) + _of_those_left(sims),
        calibrated=not findings,
        conservative=not findings or (harmless and coverage.ks_over_confident > level),
        findings=findings,
        tests=tests,
        sbc=sbc,
        tarp=tarp,
        coverage=coverage,
        sharpness=sharpness_of(ranks),
        level=level,
        num_datasets=len(valid),
        num_failed=ranks.num_failed,
        draws=draws,
        command=_command(key, datasets, draws, level),
    )


def _command(key: Key, datasets: int, draws: int, level: float) -> str:
    """What to type for the same numbers."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        numbers = np.asarray(jax.random.key_data(key)).tolist()
        made = f"jax.random.wrap_key_data(\n    jnp.array({numbers}, dtype=jnp.uint32), "
        made += f"impl={str(jax.random.key_impl(key))!r}\n)"
    else:
        made = f"jnp.array({np.asarray(key).tolist()}, dtype=jnp.uint32)"
    wide = 'jax.config.update("jax_enable_x64", True)\n' * bool(jax.config.read("jax_enable_x64"))
    return (
        f"import jax\nimport jax.numpy as jnp\nimport sbi_flows as sf\n\n{wide}key = {made}\n"
        "report = sf.check(\n    key, posterior, simulator, "
        f"datasets={datasets}, draws={draws}, level={level!r}\n)\n"
    )


def _of_those_left(sims: Simulations) -> str:
    """What the verdict is about where some simulations failed."""
    if sims.num_valid == len(sims):
        return ""
    return f"; about the {sims.num_valid} of {len(sims)} simulations that did not fail"


def _check_sizes(datasets: int, draws: int, level: float) -> None:
    require_count(MIN_DATASETS, datasets=datasets)
    require_count(MIN_DRAWS, draws=draws)
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
