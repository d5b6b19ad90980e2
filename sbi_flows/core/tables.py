"""Text of reports: tables with aligned columns, and p-values.

Public names: `table`, `p_text`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def table(rows: Sequence[str], columns: Mapping[str, Iterable[str]]) -> str:
    """Format a table with right-aligned columns.

    Args:
        rows: Names of the rows.
        columns: Cells of each column, by the name of the column.

    Example:
        >>> print(table(["a", "rate"], {"p": ["0.5", "1e-09"]}))
                  p
        a       0.5
        rate  1e-09
    """
    cells = [["", *rows], *([name, *values] for name, values in columns.items())]
    widths = [max(map(len, column)) for column in cells]
    lines = zip(*cells, strict=True)
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def p_text(p: float) -> str:
    """Format a p-value in about five characters.

    Example:
        >>> p_text(0.0312), p_text(3.2e-9), p_text(0.0)
        ('0.031', '3e-09', '<1e-99')
    """
    if p < 1e-99:
        return "<1e-99"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"
