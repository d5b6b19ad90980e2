"""From p-values to words: which tests reject together, and what they say about the posterior.

Public names: `Test`, `Finding`, `tests_of`, `findings_of`, `verdict_of`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sbi_flows.core.tables import p_text
from sbi_flows.diagnostics.coverage import Coverage
from sbi_flows.diagnostics.sbc import SBC
from sbi_flows.diagnostics.tarp import TARP
from sbi_flows.diagnostics.uniformity import holm, ks_p_value

OVER, UNDER, BIASED, SHAPE = "over-confident", "under-confident", "biased", "mis-shaped"
JOINT = {"coverage": "HPD coverage", "tarp": "TARP", "classifier": "local C2ST"}


@dataclasses.dataclass(frozen=True)
class Test:
    """One test of the family that is corrected together.

    Attributes:
        name: "shift", "width" or "ranks" of a parameter; "coverage" or "tarp" of all jointly.
        parameter: Label of the parameter, or None for a joint test.
        p_value: P-value by itself.
        adjusted: P-value corrected for the whole family (Holm).
    """

    __test__ = False  # not a test class of pytest's

    name: str
    parameter: str | None
    p_value: float
    adjusted: float


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with the posterior.

    Attributes:
        kind: "over-confident", "under-confident", "biased" or "mis-shaped".
        parameter: Label of the parameter, or None where only the joint posterior shows it.
        p_value: Corrected p-value.
        effect: Shift in posterior standard deviations (too high is positive) for "biased"; how
            many times too wide (below 1 is too narrow) for a wrong width; None otherwise.
        test: Name of the test that found it.
        at_least: The effect is a lower bound: too many truths lie beyond all draws.
    """

    kind: str
    parameter: str | None
    p_value: float
    effect: float | None
    test: str
    at_least: bool = False


def tests_of(sbc: SBC, tarp: TARP, coverage: Coverage) -> tuple[Test, ...]:
    """Every test of a check: three a parameter and two joint ones, corrected together."""
    named: list[tuple[str, str | None, float]] = []
    for i, label in enumerate(sbc.labels):
        named.append(("shift", label, float(sbc.location[i])))
        named.append(("width", label, float(sbc.spread[i])))
        named.append(("ranks", label, float(sbc.ks[i])))
    named += [("coverage", None, coverage.ks), ("tarp", None, tarp.ks)]
    adjusted = holm([p for _, _, p in named])
    return tuple(Test(*test, float(a)) for test, a in zip(named, adjusted, strict=True))


def findings_of(
    tests: Sequence[Test], sbc: SBC, tarp: TARP, coverage: Coverage, level: float
) -> tuple[Finding, ...]:
    """What the rejected tests say, the surest first.

    A parameter's shift and width say what is wrong with it; its ranks alone say only that
    something is. The joint tests speak where no parameter does, as they reject for the same
    reasons. Coverage comes before TARP, whose direction is that of distances to a crude guess.
    """
    rejected = {(t.parameter, t.name): t for t in tests if t.adjusted <= level}
    found: list[Finding] = []
    for i, label in enumerate(sbc.labels):
        shift, width = rejected.get((label, "shift")), rejected.get((label, "width"))
        ranks, beyond = rejected.get((label, "ranks")), bool(sbc.beyond[i])
        if shift:
            effect = float(sbc.shift[i])
            found.append(Finding(BIASED, label, shift.adjusted, effect, "shift", beyond))
        if width:
            kind = OVER if sbc.width[i] < 1 else UNDER
            effect = float(sbc.width[i])
            found.append(Finding(kind, label, width.adjusted, effect, "width", beyond))
        if ranks and not (shift or width):
            found.append(Finding(SHAPE, label, ranks.adjusted, None, "ranks"))
    joint = {"coverage": coverage.density_ranks, "tarp": tarp.fractions}
    for name, values in joint.items():
        test = rejected.get((None, name))
        if test and not found:
            found.append(Finding(_joint_kind(values), None, test.adjusted, None, name))
    return tuple(sorted(found, key=lambda f: f.p_value))


def verdict_of(
    findings: Sequence[Finding], tests: Sequence[Test], labels: Sequence[str], level: float
) -> str:
    """The findings in one sentence; `labels` name all parameters."""
    if not findings:
        smallest = min(t.adjusted for t in tests)
        return (
            f"calibrated: none of {len(tests)} tests rejects at a family-wise level of {level:g} "
            f"(smallest corrected p {p_text(smallest)})"
        )
    kinds = list(dict.fromkeys(f.kind for f in findings))
    return "; ".join(_clause([f for f in findings if f.kind == k], labels) for k in kinds)


def _joint_kind(values: np.ndarray) -> str:
    """Too large throughout: the truth lies too far out. Some of each, or neither: another shape."""
    large, small = (ks_p_value(values, alternative=side) < 0.01 for side in ("less", "greater"))
    return SHAPE if large == small else OVER if large else UNDER


def _clause(findings: Sequence[Finding], labels: Sequence[str]) -> str:
    """One kind of finding: "biased in alpha (0.50 posterior sd too high; corrected p 2e-09)"."""
    kind = findings[0].kind
    p = f"corrected p {'at most ' * (len(findings) > 1)}{p_text(max(f.p_value for f in findings))}"
    if findings[0].parameter is None:
        tests = " and ".join(JOINT[f.test] for f in findings)
        return f"{kind} as a whole, located in no single parameter ({tests}; {p})"
    found = {f.parameter for f in findings}
    where = ", ".join(label for label in labels if label in found)
    if len(found) == len(labels) > 1:
        where = "every parameter"
    size = _size(kind, [f.effect for f in findings if f.effect is not None])
    if size and any(f.at_least for f in findings):
        size = f"at least {size}"
    return f"{kind} in {where} ({size}{p})"


def _size(kind: str, effects: Sequence[float]) -> str:
    """Size of a shift or of a wrong width, as a range over parameters; empty for other kinds."""
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
