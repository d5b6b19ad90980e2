"""Formatting of the report as Markdown and as one HTML page.

Public names: `Table`, `markdown`, `page`.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Table: TypeAlias = tuple[list[str], list[list[str]]]
"""Column headings and rows of a table."""


def markdown(tables: Mapping[str, Table], notes: Sequence[str]) -> str:
    """Format notes and tables as Markdown."""
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


def page(tables: Mapping[str, Table], notes: Sequence[str], picture: bytes) -> str:
    """Format notes, tables and a PNG picture as one HTML page without external files."""
    parts = [f"<p>{html.escape(note)}</p>" for note in notes]
    for heading, (columns, rows) in tables.items():
        if rows:
            parts.append(f"<h2>{html.escape(heading)}</h2>{_html_table(columns, rows)}")
    source = base64.b64encode(picture).decode()
    parts.append(
        "<h2>Accuracy against training time</h2>"
        f'<img alt="C2ST against the time of the fit" src="data:image/png;base64,{source}">'
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
