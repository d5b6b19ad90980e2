"""Tables of a comparison, for the terminal and in Markdown.

Public names: `text`, `markdown`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sbi_flows.core.tables import table

Contestants = Mapping[str, Mapping[str, Any]]

_ROWS: dict[str, tuple[Callable[[Mapping[str, Any]], float | None], str, bool]] = {
    # for each row: its value, its format, and whether a ratio of contestants is meaningful
    "training steps per second": (lambda c: c["training"]["median"], ".1f", True),
    "compilation and set-up, s": (lambda c: c["training"]["compilation_seconds"], ".1f", False),
    "converged held-out loss, nats": (lambda c: c["fit"]["held_out_loss"], ".3f", False),
    "steps until convergence": (lambda c: c["fit"]["steps"], ".0f", True),
    "steps to the target loss": (lambda c: (c["to_target"] or {}).get("steps"), ".0f", True),
    "time to the target loss, s": (lambda c: (c["to_target"] or {}).get("seconds"), ".1f", True),
    "this time with compilation, s": (lambda c: _with_compilation(c), ".1f", True),
    "draws at one observation, s": (lambda c: c["sample"]["median"], ".3f", True),
    "log densities at one observation, s": (lambda c: c["log_prob"]["median"], ".3f", True),
    "SBC, s": (lambda c: c["sbc"]["median"], ".3f", True),
    "C2ST": (lambda c: c["c2st"]["mean"], ".3f", False),
    "parameters": (lambda c: c["described"].get("parameters"), ".0f", True),
}


def text(task: str, result: Mapping[str, Any], ours: Sequence[str]) -> str:
    """Format a table for the terminal, with a row per measurement.

    The columns are the values of each contestant, and the ratio of each value of this library to
    the value of each peer.

    Args:
        task: Name of the task.
        result: Result of `compare`.
        ours: Names of this library's contestants.
    """
    target = result["target"]
    columns = _columns(result["contestants"], ours)
    if target is None:
        note = "no target loss"
    else:
        note = f"the target loss is the converged held-out loss of {target['peer']}"
    return f"{task}; {note}\n{table(list(_ROWS), columns)}"


def markdown(result: Mapping[str, Any], ours: Sequence[str]) -> list[str]:
    """Format the table of `text` in Markdown; return its lines."""
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
