"""The state of a fit in a file, from which a fit that was killed goes on.

Public names: `Checkpoint`.

A file is a safetensors one: what epochs change, of all members, and the losses so far; its metadata
are a JSON document, which says what the fit is made of, and a checksum of everything. A new file
takes the place of the old one at once, so that there is always a whole one.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from sbi_flows.core.checks import writable_folder
from sbi_flows.core.checksums import checksum
from sbi_flows.core.errors import CheckpointSpoilt, SbiFlowsWarning
from sbi_flows.core.files import atomic_file
from sbi_flows.training.devices import of_first
from sbi_flows.training.fingerprint import unlike
from sbi_flows.training.settings import Training

FORMAT = 1

SHARE = 0.01
"""Share of a fit's time that goes into its checkpoints, by default, after the first one."""

_NAMES = {
    "versions": "those",
    "data": "those (and the prior)",
    "key": "that",
    "density": "that",
    "settings": "those",
}
"""What a fit is made of, in the order in which it is compared."""


class Checkpoint:
    """The file of one fit.

    Args:
        training: Settings of the fit, with a `checkpoint`.
        name: Name of the fit in that folder.
        parts: What `fingerprint.parts` says that the fit is made of.

    Raises:
        ValueError: The folder cannot be made or written to.
    """

    def __init__(self, training: Training, name: str, parts: Mapping[str, Any]) -> None:
        """Make the folder; nothing is read yet."""
        folder = writable_folder("checkpoint", Path(training.checkpoint or ""))
        self.path = folder / f"{name}.safetensors"
        self._parts, self._every = parts, training.checkpoint_every
        self._written, self._cost, self._warned = -math.inf, 0.0, False

    def read(self) -> dict[str, np.ndarray] | None:
        """What is there, by name; None where nothing is.

        Raises:
            ValueError: It belongs to another fit, or cannot be read.
            CheckpointSpoilt: It is not what was written.
        """
        raw = of_first(self._bytes())
        if raw is None:
            return None
        try:
            arrays, document = _parsed(raw)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise self._spoilt(f": {error}") from None
        self._require_same(document)
        return arrays

    def filled(self, like: Any, arrays: Mapping[str, np.ndarray]) -> Any:
        """A tree such as this one, of the arrays that are there.

        Raises:
            CheckpointSpoilt: They do not fit it.
        """

        def leaf(path: Any, wanted: np.ndarray) -> np.ndarray:
            found = arrays.get(_name(path))
            if found is not None and found.dtype != wanted.dtype:
                found = found.view(wanted.dtype) if _is_odd(wanted) else None
            if found is None or found.shape != wanted.shape:
                raise self._spoilt(f": {_name(path)} is missing or of another shape")
            return found

        return jax.tree_util.tree_map_with_path(leaf, like)

    def keep(self, epoch: int, tree: Callable[[], Any], *, last: bool) -> None:
        """Write the arrays of a tree after an epoch, if it is time to, or the last one.

        A fit does not end because its state cannot be written: there is a warning.
        """
        if not last and not of_first(b"1" if self._due(epoch) else None):
            return
        began = time.perf_counter()
        arrays = {_name(p): a for p, a in jax.tree_util.tree_leaves_with_path(tree())}
        try:
            if jax.process_index() == 0:
                self._write({name: _plain(value) for name, value in arrays.items()})
        except OSError as error:
            if not self._warned:
                said = f"checkpoint: cannot write to {self.path}: {error.strerror or error}"
                warnings.warn(f"{said}; the fit goes on", SbiFlowsWarning, stacklevel=3)
            self._warned = True
        self._written = time.perf_counter()
        self._cost = self._written - began

    def _due(self, epoch: int) -> bool:
        if self._every is not None:
            return epoch % self._every == 0
        return SHARE * (time.perf_counter() - self._written) >= self._cost

    def _bytes(self) -> bytes | None:
        try:
            return self.path.read_bytes() if jax.process_index() == 0 else None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ValueError(f"checkpoint: cannot read {self.path}: {error.strerror}") from None

    def _write(self, arrays: Mapping[str, np.ndarray]) -> None:
        document = json.dumps({"format": FORMAT, **self._parts})
        seal = {"sbi_flows": document, "sha256": _seal(document, arrays)}
        raw = safetensors.numpy.save(dict(arrays), seal)
        with atomic_file(self.path) as file:
            file.write(raw)

    def _require_same(self, document: Mapping[str, Any]) -> None:
        advice = "; remove it, or name another folder, to start anew"
        if document.get("format") != FORMAT:
            raise ValueError(
                f"{self.path}: expected a checkpoint of format {FORMAT}, got "
                f"{document.get('format')}{advice}"
            )
        for part, words in _NAMES.items():
            there, mine = document[part], self._parts[part]
            names = unlike(there, mine)
            if names:
                raise ValueError(
                    f"{part}: expected {words} of the checkpoint {self.path}"
                    f"{_said(', ', there, names)}, got {_said('', mine, names) or 'others'}{advice}"
                )

    def _spoilt(self, why: str) -> CheckpointSpoilt:
        said = f"{self.path} is not a checkpoint as it was written{why}"
        return CheckpointSpoilt(f"{said}. Remove it to start the fit anew")


def _parsed(raw: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the document of a file, if it is whole."""
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    document, seal = (header["__metadata__"][name] for name in ("sbi_flows", "sha256"))
    arrays = safetensors.numpy.load(raw)
    if _seal(document, arrays) != seal:
        raise ValueError("its checksum is another one")
    return arrays, json.loads(document)


def _seal(document: str, arrays: Mapping[str, np.ndarray]) -> str:
    return checksum({"": np.frombuffer(document.encode(), np.uint8), **arrays})


def _said(before: str, values: Mapping[str, Any], names: list[str]) -> str:
    """The values of these names, where all of them are words."""
    if not all(isinstance(values.get(name), str) for name in names):
        return ""
    return before + ", ".join(f"{name}={values[name]}" for name in names)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_odd(value: np.ndarray) -> bool:
    """Whether it is of a type that NumPy knows from JAX alone, such as bfloat16."""
    return value.dtype.kind not in "biuf"


def _plain(value: np.ndarray) -> np.ndarray:
    value = np.ascontiguousarray(value)
    return value.view(f"u{value.dtype.itemsize}") if _is_odd(value) else value
