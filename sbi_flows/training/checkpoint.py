"""Checkpoint of a fit: a file from which a killed fit continues.

Public names: `Checkpoint`.

A checkpoint is a file in the safetensors format. During a fit it holds the losses of all epochs so
far and the present state of all members, for example weights and optimiser. After the fit it holds
the result. The metadata of the file hold a JSON document that identifies the fit, and a checksum of
the document and the arrays. A new file replaces the old file atomically, so that a complete file
exists at any time.
"""

from __future__ import annotations

import json
import math
import time
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
from sbi_flows.core.warn import warn_user
from sbi_flows.training.devices import from_first_process
from sbi_flows.training.fingerprint import differing
from sbi_flows.training.settings import Training

FORMAT = 2

MAX_TIME_SHARE = 0.01
"""Maximum fraction of the time of a fit for writing checkpoints, by default."""

_PARTS = {
    "versions": "those",
    "data": "those (and the prior)",
    "key": "that",
    "density": "that",
    "settings": "those",
}
"""Parts of a fingerprint in the order of comparison, with pronouns for error messages."""


class Checkpoint:
    """The checkpoint file of one fit.

    Args:
        training: Settings of the fit. Its field `checkpoint` is the folder of the file.
        name: Name of the file, without its extension.
        parts: Fingerprint of the fit, from `fingerprint.parts`.

    Raises:
        ValueError: The folder cannot be created, or files cannot be written to it.
    """

    def __init__(self, training: Training, name: str, parts: Mapping[str, Any]) -> None:
        """Create the folder. `read` reads the file later."""
        folder = writable_folder("checkpoint", Path(training.checkpoint or ""))
        self.path = folder / f"{name}.safetensors"
        self._parts, self._every = parts, training.checkpoint_every
        self._last_time, self._cost, self._has_warned = -math.inf, 0.0, False

    def read(self) -> dict[str, np.ndarray] | None:
        """Return a dict of the arrays in the file by name; None if there is no file.

        Raises:
            ValueError: The file belongs to another fit, or cannot be read.
            CheckpointSpoilt: The file is damaged.
        """
        raw = from_first_process(self._bytes())
        if raw is None:
            return None
        try:
            arrays, document = _parsed(raw)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise self._spoilt(f": {error}") from None
        self._require_same(document)
        return arrays

    def filled(self, like: Any, arrays: Mapping[str, np.ndarray]) -> Any:
        """Return a tree with the structure of `like` and the arrays of the file as leaves.

        Args:
            like: Tree of arrays with the expected shapes and dtypes.
            arrays: Arrays by name, as `read` returns them.

        Raises:
            CheckpointSpoilt: An array is missing or has another shape or dtype.
        """

        def leaf(path: Any, expected: Any) -> np.ndarray:
            array = arrays.get(_name(path))
            if array is not None and array.dtype != expected.dtype:
                array = array.view(expected.dtype) if _is_jax_only(expected) else None
            if array is None or array.shape != expected.shape:
                raise self._spoilt(f": {_name(path)} is missing or of another shape")
            return array

        return jax.tree_util.tree_map_with_path(leaf, like)

    def save(self, epoch: int, tree: Callable[[], Any]) -> None:
        """Write a checkpoint after an epoch, if a checkpoint is due.

        If the file cannot be written, a warning is given and the fit continues.

        Args:
            epoch: Number of the epoch.
            tree: Function that returns the tree of arrays to write.
        """
        if from_first_process(b"1" if self._is_due(epoch) else None):
            self.save_now(tree)

    def save_now(self, tree: Callable[[], Any]) -> None:
        """Write a checkpoint with the arrays that the function `tree` returns."""
        began = time.perf_counter()
        leaves = jax.tree_util.tree_leaves_with_path(tree())
        try:
            if jax.process_index() == 0:
                self._write({_name(path): _as_numpy_dtype(leaf) for path, leaf in leaves})
        except OSError as error:
            if not self._has_warned:
                warn_user(
                    f"checkpoint: cannot write to {self.path}: {error.strerror or error}; the fit "
                    "goes on",
                    SbiFlowsWarning,
                )
            self._has_warned = True
        self._last_time = time.perf_counter()
        self._cost = self._last_time - began

    def _is_due(self, epoch: int) -> bool:
        if self._every is not None:
            return epoch % self._every == 0
        return MAX_TIME_SHARE * (time.perf_counter() - self._last_time) >= self._cost

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
        """Raise ValueError if the document in the file describes another fit."""
        advice = "; remove it, or name another folder, to start anew"
        if document.get("format") != FORMAT:
            raise ValueError(
                f"{self.path}: expected a checkpoint of format {FORMAT}, got "
                f"{document.get('format')}{advice}"
            )
        for part, pronoun in _PARTS.items():
            saved, present = document[part], self._parts[part]
            names = differing(saved, present)
            if names:
                raise ValueError(
                    f"{part}: expected {pronoun} of the checkpoint {self.path}"
                    f"{_listed(', ', saved, names)}, got {_listed('', present, names) or 'others'}"
                    f"{advice}"
                )

    def _spoilt(self, reason: str) -> CheckpointSpoilt:
        return CheckpointSpoilt(
            f"{self.path} is not a checkpoint as it was written{reason}. Remove it to start the "
            "fit anew"
        )


def _parsed(raw: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and the document of a file; raise ValueError if its checksum is wrong."""
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    document, seal = (header["__metadata__"][name] for name in ("sbi_flows", "sha256"))
    arrays = safetensors.numpy.load(raw)
    if _seal(document, arrays) != seal:
        raise ValueError("its checksum is wrong")
    return arrays, json.loads(document)


def _seal(document: str, arrays: Mapping[str, np.ndarray]) -> str:
    return checksum({"": np.frombuffer(document.encode(), np.uint8), **arrays})


def _listed(before: str, values: Mapping[str, Any], names: list[str]) -> str:
    """Return `before` and "name=value" for each name; "" if a value is not a string."""
    if not all(isinstance(values.get(name), str) for name in names):
        return ""
    return before + ", ".join(f"{name}={values[name]}" for name in names)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_jax_only(value: Any) -> bool:
    """Return whether the array has a dtype that JAX adds to NumPy, such as bfloat16."""
    return value.dtype.kind not in "biuf"


def _as_numpy_dtype(value: np.ndarray) -> np.ndarray:
    value = np.ascontiguousarray(value)
    return value.view(f"u{value.dtype.itemsize}") if _is_jax_only(value) else value
