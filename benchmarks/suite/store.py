"""Folder of records, with one JSON file per finished run.

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

MAX_SHOWN_CHARACTERS = 60
"""Maximum number of characters of a value in an error message."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Task, method, budget (number of simulations) and seed, which identify a run."""

    task: str
    method: str
    budget: int
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, {self.method}, {self.budget:,} simulations, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Store:
    """Folder of records that were all made with the same settings.

    Attributes:
        folder: Path of the folder.
        settings: Settings that all runs share, such as the number of draws.
    """

    folder: Path
    settings: Mapping[str, Any]

    def path(self, run: Run) -> Path:
        """Return the path of the file for a run.

        Example:
            >>> Store(Path("results"), {}).path(Run("slcp", "npe", 1000, 1)).name
            'run-slcp-npe-1000-seed1.json'
        """
        return self.folder / f"run-{run.task}-{run.method}-{run.budget}-seed{run.seed}.json"

    def find(self, run: Run, required: Mapping[str, Any]) -> dict[str, Any] | None:
        """Read the record of a finished run.

        If the file is unreadable, rename it to end in `.corrupt` and print a message to stderr.

        Args:
            run: The run.
            required: Fields and values that the record must contain in addition to the settings.

        Returns:
            The record, or None if there is no readable file.

        Raises:
            BadInput: The record was made with other settings, or its fields differ from `required`.
                The file is not changed.
        """
        path = self.path(run)
        if not path.exists():
            return None
        record = _read(path, run)
        if record is None:
            renamed = path.with_suffix(".corrupt")
            path.replace(renamed)
            print(
                f"{path.name}: not a record of this run; renamed to {renamed.name}", file=sys.stderr
            )
            return None
        expected = {**plain(self.settings), **plain(required)}
        actual = {**record["settings"], **{name: record.get(name) for name in required}}
        names = expected.keys() | actual.keys()
        different = sorted(name for name in names if expected.get(name) != actual.get(name))
        if different:
            name = different[0]
            before, now = (_shortened(values.get(name)) for values in (actual, expected))
            raise BadInput(
                f"--results: {path} was made with another {name} ({before}, now {now}); choose "
                "another folder, or remove the file"
            )
        return record

    def write(self, run: Run, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write a finished run's record atomically; return the record as `find` would read it."""
        full = {**record, "kind": "run", **dataclasses.asdict(run), "settings": self.settings}
        write_json(self.path(run), full)
        return plain(full)


def _shortened(value: Any) -> str:
    """Convert a value to a string of limited length."""
    text = str(value)
    return text if len(text) < MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def _read(path: Path, run: Run) -> dict[str, Any] | None:
    """Read the record in a file; return None if it is not a record of this run."""
    try:
        record = json.loads(path.read_text())
        is_record = record["schema"] == SCHEMA and isinstance(record["settings"], dict)
        is_run = all(record[name] == value for name, value in dataclasses.asdict(run).items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if is_record and is_run else None
