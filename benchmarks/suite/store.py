"""One file a run: a finished run is found again, a spoilt file is set aside.

Public names: `Run`, `Store`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.suite.records import SCHEMA, BadInput, plain, write_json

MOST_SHOWN = 60
"""Characters of a value in a message."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What tells one run from another: task, method, number of simulations and seed."""

    task: str
    method: str
    budget: int
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, {self.method}, {self.budget:,} simulations, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Store:
    """Records in a folder.

    Attributes:
        folder: Where they are.
        settings: What every record must have been made with, besides its run.
    """

    folder: Path
    settings: Mapping[str, Any]

    def path(self, run: Run) -> Path:
        """File of a run.

        Example:
            >>> Store(Path("results"), {}).path(Run("slcp", "npe", 1000, 1)).name
            'run-slcp-npe-1000-seed1.json'
        """
        return self.folder / f"run-{run.task}-{run.method}-{run.budget}-seed{run.seed}.json"

    def find(self, run: Run, made_of: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of a finished run; None where there is none, or none that can be read.

        A file that cannot be read is named on stderr and renamed to end in `.corrupt`.

        Args:
            run: The run.
            made_of: Further fields that the record must have, with these values.

        Raises:
            BadInput: The run was made with other settings or of something else; it is not
                overwritten.
        """
        path = self.path(run)
        if not path.exists():
            return None
        record = _read(path, run)
        if record is None:
            aside = path.with_suffix(".corrupt")
            path.replace(aside)
            print(
                f"{path.name}: not a record of this run; set aside as {aside.name}", file=sys.stderr
            )
            return None
        wanted = {**plain(self.settings), **plain(made_of)}
        made = {**record["settings"], **{name: record.get(name) for name in made_of}}
        other = sorted(k for k in wanted.keys() | made.keys() if wanted.get(k) != made.get(k))
        if other:
            values = (str(values.get(other[0])) for values in (made, wanted))
            before, now = (v if len(v) < MOST_SHOWN else f"{v[:MOST_SHOWN]}..." for v in values)
            raise BadInput(
                f"--results: {path} was made with another {other[0]} ({before}, now {now}); choose "
                "another folder, or remove it"
            )
        return record

    def write(self, run: Run, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write a finished run, whole or not at all; the record as it reads back."""
        whole = {**record, "kind": "run", **dataclasses.asdict(run), "settings": self.settings}
        write_json(self.path(run), whole)
        return plain(whole)


def _read(path: Path, run: Run) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
        fits = record["schema"] == SCHEMA and isinstance(record["settings"], dict)
        same = all(record[name] == value for name, value in dataclasses.asdict(run).items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if fits and same else None
