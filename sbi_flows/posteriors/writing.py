"""Save a posterior to a file.

The file contains no code. `sbi_flows.artefact.container` describes its format.

Public names: `Savable`, `content_of`, `save`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sbi_flows.artefact.container import pack
from sbi_flows.artefact.distributions import Tensors
from sbi_flows.artefact.layers import SavedPosterior, write_layers
from sbi_flows.core.files import atomic_file
from sbi_flows.core.record import to_json_data
from sbi_flows.core.typing import CheckReport
from sbi_flows.core.versions import versions

DIRECT_FORMAT = 1
"""Version of the file format for a direct posterior; derived posteriors may need later versions."""


@runtime_checkable
class Savable(Protocol):
    """Protocol of a posterior that can be saved to a file."""

    def to_saved(self) -> SavedPosterior:
        """Return the data that `save` writes to the file.

        Raises:
            ValueError: A part of the posterior cannot be saved.
        """
        ...


def content_of(posterior: object) -> SavedPosterior:
    """Return the data that a file stores about a base posterior.

    Raises:
        ValueError: The base posterior cannot be saved.
    """
    if not isinstance(posterior, Savable):
        raise ValueError(
            "posterior: expected an sf.Posterior, or what conformal or recalibrate made of one, "
            f"got {type(posterior).__name__}, which cannot be saved"
        )
    return posterior.to_saved()


def save(posterior: Savable, path: str | os.PathLike[str], *, report: object = None) -> None:
    """Write a posterior to a file; see `Posterior.save`."""
    path = Path(path)
    content = posterior.to_saved()
    if report is not None:
        content = content.add_to_record(check=_check_record(report))
    data = pack(*_document(content))
    with atomic_file(path) as file:
        file.write(data)


def _document(content: SavedPosterior) -> tuple[dict[str, Any], Tensors]:
    """Return the JSON document and the tensors of a file.

    The file uses the oldest version of the format that can store the content. Older versions of the
    library can then read the file if they know that format.
    """
    tensors = dict(content.tensors)
    document: dict[str, Any] = {
        "format": max([DIRECT_FORMAT, *(layer.codec.file_format for layer in content.layers)]),
        "written_by": versions(),
        **content.fields,
        "record": dict(content.record),
    }
    if content.layers:
        dim = len(content.fields["prior"]["bounded"])
        document["corrections"] = write_layers(content.layers, dim, tensors)
    return document, tensors


def _check_record(report: object) -> Any:
    """Convert a report to plain JSON data."""
    if not isinstance(report, CheckReport):
        raise ValueError(f"report: expected an sf.Report, got {type(report).__name__}")
    return to_json_data(report.to_dict())
