"""Verdict on a posterior: the errors that the tests find, and a sentence that describes them.

Public names: `Test`, `Finding`. Internal names: `tests_of`, `findings_of`, `verdict_of`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sbi_flows.core.tables import p_text
from sbi_flows.diagnostics.coverage import Coverage
from sbi_flows.diagnostics.directions import JointWidth
from sbi_flows.diagnostics.sbc import SBC
from sbi_flows.diagnostics.tarp import TARP
from sbi_flows.diagnostics.uniformity import holm, ks_p_value

OVER, UNDER, BIASED, SHAPE = "over-confident", "under-confident", "biased", "mis-shaped"

JOINT_TEST_TITLES = {"coverage": "HPD coverage", "tarp": "TARP"}
"""Names of tests of the joint posterior as they appear in a verdict."""

MAX_DETECTABLE_WIDTH = 1.2
"""If only larger errors of a width would be found, the verdict is "cannot tell"."""

MIN_LOG_WIDTH = 0.03
"""Smallest logarithm of a width, wrong over correct, that is reported for the joint posterior."""

JOINT_KIND_LEVEL = 0.01
"""Level of the one-sided tests of whether the joint posterior is over- or under-confident."""


@dataclasses.dataclass(frozen=True)
class Test:
    """One of the tests of `check`; its p-value is also corrected for the number of tests.

    Attributes:
        name: "shift", "width" or "ranks" for one parameter; "coverage" or "tarp" for all
            parameters jointly.
        parameter: Name of the parameter; None for a joint test.
        p_value: P-value of this test alone.
        adjusted: P-value corrected for the number of tests of `check` (Holm).
    """

    __test__ = False  # pytest does not collect this class

    name: str
    parameter: str | None
    p_value: float
    adjusted: float


@dataclasses.dataclass(frozen=True)
class Finding:
    """One error of a posterior that a test has found.

    Attributes:
        kind: "over-confident", "under-confident", "biased" or "mis-shaped".
        parameter: Name of the parameter; None if only the joint posterior shows the error.
        p_value: Corrected p-value.
        effect: For "biased", the shift in posterior standard deviations (positive is too high).
            For a wrong width, posterior width divided by correct width. For a wrong correlation of
            two parameters, the difference of the correlations. None for other errors.
        test: Name of the test that found the error.
        at_least: True if the effect is a lower bound, because too many truths lie outside the
            range of all draws.
        direction: For an error of the joint posterior, the combination of standardised parameters
            to which the effect refers, for example "alpha - beta"; None if all directions are
            about equally wrong, or for an error of one parameter.
    """

    kind: str
    parameter: str | None
    p_value: float
    effect: float | None
    test: str
    at_least: bool = False
    direction: str | None = None


def tests_of(sbc: SBC, tarp: TARP, coverage: Coverage) -> tuple[Test, ...]:
    """Return all tests of a check: three per parameter and two joint ones, corrected together."""
    named: list[tuple[str, str | None, float]] = []
    for i, label in enumerate(sbc.labels):
        named.append(("shift", label, float(sbc.location[i])))
        named.append(("width", label, float(sbc.spread[i])))
        named.append(("ranks", label, float(sbc.ks[i])))
    named += [("coverage", None, coverage.ks), ("tarp", None, tarp.ks)]
    adjusted = holm([p for _, _, p in named])
    return tuple(Test(*test, float(a)) for test, a in zip(named, adjusted, strict=True))


def findings_of(
    tests: Sequence[Test],
    sbc: SBC,
    tarp: TARP,
    coverage: Coverage,
    level: float,
    joint_width: JointWidth | None = None,
) -> tuple[Finding, ...]:
    """Translate tests that reject into findings, in order of their p-values.

    Tests of shift and width identify the error of a parameter. If only the test of the ranks
    rejects, the error is reported as mis-shaped. Joint tests are reported only if no parameter has
    a finding, because an error of one parameter makes the joint tests reject as well. Coverage has
    priority over TARP: it shows more reliably whether the posterior is too narrow or too wide.
    `joint_width` gives the size and the direction of an error of the joint posterior.
    """
    rejected = {(t.parameter, t.name): t for t in tests if t.adjusted <= level}
    findings: list[Finding] = []
    for i, label in enumerate(sbc.labels):
        shift, width = rejected.get((label, "shift")), rejected.get((label, "width"))
        ranks, is_bound = rejected.get((label, "ranks")), bool(sbc.beyond[i])
        if shift:
            effect = float(sbc.shift[i])
            findings.append(Finding(BIASED, label, shift.adjusted, effect, "shift", is_bound))
        if width:
            kind = OVER if sbc.width[i] < 1 else UNDER
            effect = float(sbc.width[i])
            findings.append(Finding(kind, label, width.adjusted, effect, "width", is_bound))
        if ranks and not (shift or width):
            findings.append(Finding(SHAPE, label, ranks.adjusted, None, "ranks"))
    joint = {"coverage": coverage.density_ranks, "tarp": tarp.fractions}
    for name, values in joint.items():
        test = rejected.get((None, name))
        if test and not findings:
            findings.append(_joint_finding(_joint_kind(values), test, joint_width))
    return tuple(sorted(findings, key=lambda f: f.p_value))


def verdict_of(
    findings: Sequence[Finding],
    tests: Sequence[Test],
    labels: Sequence[str],
    level: float,
    least_width: float = 1.0,
) -> str:
    """Return the findings as one sentence.

    Args:
        findings: The findings.
        tests: All tests.
        labels: Names of all parameters.
        level: Family-wise level of the tests.
        least_width: Smallest factor by which a width must be wrong to be found.
    """
    if not findings:
        smallest = min(t.adjusted for t in tests)
        if least_width > MAX_DETECTABLE_WIDTH:
            return (
                f"cannot tell: none of {len(tests)} tests rejects, but a width is found to be "
                f"wrong only if it is wrong by a factor of {least_width:.2g} or more; check with "
                "more data sets"
            )
        return (
            f"calibrated: none of {len(tests)} tests rejects at a family-wise level of {level:g} "
            f"(smallest corrected p {p_text(smallest)})"
        )
    kinds = list(dict.fromkeys(f.kind for f in findings))
    return "; ".join(_clause([f for f in findings if f.kind == k], labels) for k in kinds)


def _joint_finding(kind: str, test: Test, joint_width: JointWidth | None) -> Finding:
    """Return the finding of a joint test, with the width if that agrees with the kind of error."""
    width, direction = joint_width or (1.0, None)
    agrees = kind == SHAPE or (width < 1) == (kind == OVER)
    if not agrees or abs(np.log(width)) < MIN_LOG_WIDTH:
        return Finding(kind, None, test.adjusted, None, test.name)
    return Finding(kind, None, test.adjusted, width, test.name, direction=direction)


def _joint_kind(values: np.ndarray) -> str:
    """Return the kind of error of density ranks or TARP fractions (N,) that are not uniform.

    Values that are too large mean over-confidence, values that are too small under-confidence. If
    the one-sided tests find both errors or neither, the posterior is mis-shaped.
    """
    too_large, too_small = (
        ks_p_value(values, alternative=side) < JOINT_KIND_LEVEL for side in ("less", "greater")
    )
    return SHAPE if too_large == too_small else OVER if too_large else UNDER


def _clause(findings: Sequence[Finding], labels: Sequence[str]) -> str:
    """Describe findings of one kind.

    For example "biased in alpha (0.50 posterior sd too high; corrected p 2e-09)".
    """
    kind = findings[0].kind
    p = f"corrected p {'at most ' * (len(findings) > 1)}{p_text(max(f.p_value for f in findings))}"
    if findings[0].parameter is None:
        tests = " and ".join(JOINT_TEST_TITLES[f.test] for f in findings)
        return f"{kind} jointly, no single parameter ({_joint_text(findings[0])}{tests}; {p})"
    affected = {f.parameter for f in findings}
    parameters = ", ".join(label for label in labels if label in affected)
    if len(affected) == len(labels) > 1:
        parameters = "every parameter"
    size = _effect_text(kind, [f.effect for f in findings if f.effect is not None])
    if size and any(f.at_least for f in findings):
        size = f"at least {size}"
    return f"{kind} in {parameters} ({size}{p})"


def _joint_text(finding: Finding) -> str:
    """Describe the width and the direction of an error of the joint posterior; may be empty."""
    if finding.effect is None:
        return ""
    size = _effect_text(OVER if finding.effect < 1 else UNDER, [finding.effect])
    where = f" along {finding.direction}" if finding.direction else " in all directions"
    return f"about {size.removesuffix('; ')}{where}; "


def _effect_text(kind: str, effects: Sequence[float]) -> str:
    """Describe shifts or wrong widths as a range over parameters; empty for other kinds."""
    if not effects:
        return ""
    if kind == BIASED:
        sides = [
            name for name, sign in (("high", 1), ("low", -1)) if any(e * sign > 0 for e in effects)
        ]
        return f"{_range([abs(e) for e in effects])} posterior sd too {' or '.join(sides)}; "
    if kind == OVER:
        return f"{_range([1.0 / e for e in effects])} times too narrow; "
    return f"{_range(effects)} times too wide; "


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"
