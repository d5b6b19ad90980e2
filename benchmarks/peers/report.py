"""A comparison as a table for the terminal, and for a page.

Public names: `text`, `markdown`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sbi_flows.core.tables import table

Contestants = Mapping[str, Mapping[str, Any]]

_ROWS: dict[str, tuple[Callable[[Mapping[str, Any]], float | None], str, bool]] = {
    # what a row shows, its format, and whether a ratio of it means anything
    "training steps a second": (lambda c: c["training"]["median"], ".1f", True),
    "compilation and set-up, s": (lambda c: c["training"]["compilation_seconds"], ".1f", False),
    "converged held-out loss, nats": (lambda c: c["fit"]["held_out_loss"], ".3f", False),
    "steps until converged": (lambda c: c["fit"]["steps"], ".0f", True),
    "steps to the target's loss": (lambda c: (c["to_target"] or {}).get("steps"), ".0f", True),
    "time to the target's loss, s": (lambda c: (c["to_target"] or {}).get("seconds"), ".1f", True),
    "the same and compilation, s": (lambda c: _with_compilation(c), ".1f", True),
    "draws at one observation, s": (lambda c: c["sample"]["median"], ".3f", True),
    "log densities at one observation, s": (lambda c: c["log_prob"]["median"], ".3f", True),
    "SBC, s": (lambda c: c["sbc"]["median"], ".3f", True),
    "C2ST": (lambda c: c["c2st"]["mean"], ".3f", False),
    "parameters": (lambda c: c["described"].get("parameters"), ".0f", True),
}


def text(task: str, result: Mapping[str, Any], ours: Sequence[str]) -> str:
    """One row a measure: each contestant's value, then ours over each peer's.

    Args:
        task: Name of the task.
        result: What `compare` gave.
        ours: Names of the contestants that the others are compared with.
    """
    target = result["target"]
    said = "none: no time to it" if target is None else f"that of {target['peer']}, converged"
    columns = _columns(result["contestants"], ours)
    return f"{task}; the target's loss is {said}\n{table(list(_ROWS), columns)}"


def markdown(result: Mapping[str, Any], ours: Sequence[str]) -> list[str]:
    """The same as the lines of a Markdown table."""
    columns = _columns(result["contestants"], ours)
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *cells] for name, *cells in zip(_ROWS, *columns.values(), strict=True)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _columns(contestants: Contestants, ours: Sequence[str]) -> dict[str, list[str]]:
    columns = {name: [_cell(c, row) for row in _ROWS] for name, c in contestants.items()}
    for own, name in itertools.product(ours, contestants):
        if name not in ours:
            ratios = [_ratio(contestants[own], contestants[name], row) for row in _ROWS]
            columns[f"{own} / {name}"] = ratios
    return columns


def _with_compilation(contestant: Mapping[str, Any]) -> float | None:
    seconds = (contestant["to_target"] or {}).get("seconds")
    return None if seconds is None else seconds + contestant["training"]["compilation_seconds"]


def _cell(contestant: Mapping[str, Any], row: str) -> str:
    value, form, _ = _ROWS[row]
    number = value(contestant)
    return "-" if number is None else format(number, form)


def _ratio(ours: Mapping[str, Any], other: Mapping[str, Any], row: str) -> str:
    value, _, meaningful = _ROWS[row]
    a, b = value(ours), value(other)
    return f"{a / b:.2f}" if meaningful and a is not None and b else "-"
