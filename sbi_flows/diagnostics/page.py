"""Parts of a self-contained HTML page: document, sections, tables and pictures.

The page loads no other file: it contains the style sheet and the pictures. Pictures are `img`
elements, so that text in a picture, such as a parameter's name, cannot run as code of the page.

Internal names: `document`, `section`, `html_table`, `picture`, `environment`, `write_text`.
"""

from __future__ import annotations

import base64
import io
import platform
import warnings
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from sbi_flows.core.files import atomic_file
from sbi_flows.core.versions import versions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PACKAGES = ("sbi-flows", "jax", "jaxlib", "flax", "numpyro", "numpy", "scipy", "matplotlib")

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


def document(title: str, body: Iterable[str]) -> str:
    """Return an HTML document.

    Args:
        title: Title as plain text.
        body: Parts of the body as HTML.
    """
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style></head>",
            "<body><main>",
            *body,
            "</main></body></html>\n",
        ]
    )


def section(title: str, explanation: str, content: str) -> str:
    """Return a section: a heading, an explanation as plain text, and content as HTML."""
    intro = f'<p class="soft">{escape(explanation)}</p>'
    return f"<section><h2>{title}</h2>\n{intro}\n{content}\n</section>"


def html_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], is_bad: Sequence[bool] | None = None
) -> str:
    """Return a table of plain text; rows with `is_bad` set are highlighted."""
    header = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    lines = []
    for i, row in enumerate(rows):
        mark = ' class="bad"' if is_bad is not None and is_bad[i] else ""
        lines.append("<tr>" + "".join(f"<td{mark}>{escape(c)}</td>" for c in row) + "</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table><thead><tr>{header}</tr></thead>\n<tbody>{body}</tbody>'
        "</table></div>"
    )


def picture(draw: Callable[[Axes], Axes], alt: str) -> str:
    """Return a figure as an HTML image in SVG format; the same input gives the same bytes.

    Args:
        draw: Function that draws on axes.
        alt: Alternative text, shown or read aloud if the image cannot be seen.
    """
    import matplotlib
    from matplotlib import style
    from matplotlib.figure import Figure

    # Names are drawn as plain text, without TeX, in a font of the reader's browser.
    settings = {"svg.hashsalt": alt, "svg.fonttype": "none", "text.parse_math": False}
    with matplotlib.rc_context(), style.context(["default", settings]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(5.4, 3.8), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue().encode()).decode()
    return f'<p><img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}"></p>\n'


def environment() -> dict[str, str]:
    """Return versions of Python and packages, the platform and the device, by name."""
    import jax

    names = versions(PACKAGES)
    device = jax.devices()[0]
    precision = "64" if jax.config.read("jax_enable_x64") else "32"
    names["platform"] = f"{platform.system()} on {platform.machine()}"
    names["device"] = f"{device.device_kind} ({device.platform}), {precision}-bit numbers"
    return names


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: an older file is replaced only when the new one is complete.

    Raises:
        ValueError: The folder does not exist, or the file cannot be written.
    """
    if not path.parent.is_dir():
        raise ValueError(f"path: expected a folder that exists, got {path.parent}")
    try:
        with atomic_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise ValueError(f"path: cannot write {path}: {error.strerror or error}") from None
