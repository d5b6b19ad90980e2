"""Simulations and boxes of truncated rounds in a folder, so that finished rounds are not repeated.

Public names: `RoundFolder`.

The folder holds one store of simulations for each round, and the file `boxes.json`. This file
holds the settings of the rounds, and the truncated prior box after each finished round.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.core.files import atomic_file
from sbi_flows.core.record import to_json_data
from sbi_flows.core.typing import Key, Obs, Simulator
from sbi_flows.core.warn import warn_user
from sbi_flows.estimators.base import Estimator
from sbi_flows.prior.box import BoxPrior
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.executors import Executor
from sbi_flows.simulations.outputs import simulator_identity
from sbi_flows.simulations.simulate import simulate
from sbi_flows.simulations.simulations import Simulations
from sbi_flows.simulations.store import SimulationStore

FORMAT = 2

MAX_SHOWN = 3
"""Maximum number of differing settings that an error message lists."""

_LOCAL = {"prior", "devices"}
"""Settings that are not compared here. The stores of simulations compare the prior; the devices
do not affect the result."""


class RoundFolder:
    """Store of the simulations and boxes of finished rounds.

    Args:
        folder: Folder to write to; None stores nothing.
        estimator: Estimator that each round fits.
        simulator: The simulator, and the shape and dtype of one simulated observation.
        x: Observation at which the prior is truncated.
        simulations: Number of new simulations in a round.

    Raises:
        ValueError: The folder holds rounds of another estimator, simulator, observation or number
            of simulations; or its `boxes.json` cannot be read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        estimator: Estimator,
        simulator: tuple[Simulator, Any],
        x: Obs,
        simulations: int,
    ) -> None:
        """Read the boxes from the folder, if it holds any."""
        self._folder = None if folder is None else Path(folder)
        self._boxes: list[list[list[float]]] = []
        if self._folder is None:
            return
        self._document = {
            "format": FORMAT,
            "x": [np.asarray(leaf, float).ravel().tolist() for leaf in jax.tree.leaves(x)],
            "estimator": _without_local(to_json_data(estimator)),
            "simulator": _as_json(simulator_identity(*simulator)),
            "simulations": simulations,
        }
        if self._path.exists():
            self._boxes = self._read()

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / "boxes.json"

    def simulate(
        self,
        r: int,
        key: Key,
        prior: Prior,
        simulator: Simulator,
        n: int,
        *,
        executor: Executor | None,
        progress: bool,
    ) -> Simulations:
        """Return n simulations of round r; those in the folder are not simulated again."""
        settings: dict[str, Any] = {"executor": executor, "progress": progress}
        if self._folder is None:
            return simulate(key, prior, simulator, n, **settings)
        store = SimulationStore(self._folder / f"round-{r:03d}.zarr")
        return store.simulate(key, prior, simulator, n, **settings)

    def box(self, r: int, prior: Prior) -> BoxPrior | None:
        """Return the truncated prior box after round r; None if the round is not finished."""
        return BoxPrior(prior, *self._boxes[r]) if r < len(self._boxes) else None

    def save(self, r: int, box: BoxPrior) -> None:
        """Write the truncated prior box after round r."""
        if self._folder is None:
            return
        bounds = [np.asarray(bound).tolist() for bound in (box.low, box.high)]
        self._boxes = [*self._boxes[:r], bounds]
        with atomic_file(self._path) as file:
            file.write(json.dumps({**self._document, "boxes": self._boxes}).encode())

    def _read(self) -> list[list[list[float]]]:
        """Return the boxes in the folder; raise ValueError if they come from other settings."""
        try:
            saved = json.loads(self._path.read_text())
            boxes = saved["boxes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._path}: expected boxes of earlier rounds, got {error!r}"
            ) from None
        if "format" not in saved and saved.get("x") == self._document["x"]:
            warn_user(
                f"{self._path} was written by an earlier version, which did not save the "
                "estimator; its boxes are used. Remove the file if the estimator has changed",
                SbiFlowsWarning,
            )
            return boxes
        for name in ("x", "simulator", "simulations", "estimator"):
            differences = list(_differences(saved.get(name), self._document[name]))
            if differences:
                expected, got = zip(*differences[:MAX_SHOWN], strict=True)
                raise ValueError(
                    f"{name}: expected that of the rounds in {self._folder}, "
                    f"{', '.join(expected)}, got {', '.join(got)}; name another folder to start "
                    "anew"
                )
        return boxes


def _without_local(value: Any) -> Any:
    """Remove the settings that are not compared, at every level of nesting."""
    if isinstance(value, Mapping):
        return {k: _without_local(v) for k, v in value.items() if k not in _LOCAL}
    return [_without_local(v) for v in value] if isinstance(value, list) else value


def _as_json(value: Any) -> Any:
    """Convert a value to the form that reading it from JSON gives; tuples become lists."""
    return json.loads(json.dumps(value))


def _differences(saved: Any, present: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield each differing setting as two strings: its saved value and its present value."""
    if isinstance(saved, Mapping) and isinstance(present, Mapping):
        for key in {**saved, **present}:
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(saved.get(key), present.get(key), inner)
    elif _is_nested(saved) and _is_nested(present) and len(saved) == len(present):
        for i, (first, second) in enumerate(zip(saved, present, strict=True)):
            yield from _differences(first, second, f"{name}[{i}]")
    elif saved != present:
        prefix = f"{name}=" if name else ""
        yield f"{prefix}{saved!r:.60}", f"{prefix}{present!r:.60}"


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(v, dict | list) for v in value)
