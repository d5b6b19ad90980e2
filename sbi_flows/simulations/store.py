"""Simulations on disk, written as they are made: whatever is killed, what was finished is kept.

Public names: `SimulationStore`.

A store is a zarr group: `rows` holds one group for each chunk of rows, named by its first row, with
the parameters, the observations and whether they are valid. The last thing written of a chunk is
its seal, a checksum and the reasons of failures; one without is made again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from sbi_flows.core.checks import require_count
from sbi_flows.core.checksums import checksum
from sbi_flows.core.errors import StoreBusy, StoreSpoilt
from sbi_flows.core.typing import Key, Simulator
from sbi_flows.prior.prior import Prior, PriorLike, as_prior
from sbi_flows.simulations.chunks import Column, Sealed, opened, read, reading, sealed
from sbi_flows.simulations.executors import Executor
from sbi_flows.simulations.failures import Failures
from sbi_flows.simulations.simulate import (
    check_simulator,
    identity,
    report_failures,
    simulated_rows,
)
from sbi_flows.simulations.simulations import Simulations
from sbi_flows.simulations.worker import bare

FORMAT = 1

MOST_NAME = 200
"""Bytes of the name of an array of observations."""


class SimulationStore:
    """Simulations of one prior and one simulator, on disk.

    Args:
        path: A folder, which is made if there is none, or the address of one that fsspec knows,
            `s3://...` say.
        chunk: Rows of a chunk, which is written when all of them are finished: what is lost when
            the process is killed are the rows of chunks that are not. A JAX simulator makes
            several small ones at a time, 256 rows or more. Those of a store that is there may
            differ.

    Raises:
        ValueError: `chunk` is not positive, or the folder holds something else.

    Example:
        >>> import jax, tempfile, numpyro.distributions as dist
        >>> noisy = lambda key, theta: theta + jax.random.normal(key)
        >>> store = SimulationStore(tempfile.mkdtemp() + "/noisy.zarr")
        >>> sims = store.simulate(jax.random.key(0), dist.Normal(0, 1), noisy, 100, progress=False)
        >>> len(sims), sims.on_disk, len(SimulationStore(store.path))
        (100, True, 100)
    """

    def __init__(self, path: str | os.PathLike[str], *, chunk: int = 1024) -> None:
        """Open the store; nothing is read yet but its schema."""
        import zarr

        require_count(1, chunk=chunk)
        if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
            raise ValueError(f"path: expected a path, got {type(path).__name__}")
        if not os.fspath(path):
            raise ValueError("path: expected that of a folder, got an empty one")
        self.path, self.chunk = os.fspath(path), chunk
        try:
            # what zarr says of its types would have to be narrowed at every use; codecs of the
            # second version of its format may run code
            self._root: Any = zarr.open_group(self.path, mode="a", zarr_format=3)
            self._rows: Any = self._root.require_group("rows")
            self._schema()
        except Exception as error:
            raise ValueError(f"path: expected a store or none, got {self.path}: {error}") from error

    def _schema(self) -> Mapping[str, Any] | None:
        """What the store says of itself; None of a new one.

        Raises:
            ValueError: It is of no format that is known.
        """
        schema = self._root.attrs.get("sbi_flows")
        if schema is None:
            return None
        keys = {"format", "key", "prior", "simulator"}
        if not isinstance(schema, Mapping) or schema.get("format", FORMAT) != FORMAT:
            got = schema.get("format") if isinstance(schema, Mapping) else type(schema).__name__
            raise ValueError(f"expected a store of format {FORMAT}, got {got!r:.80}")
        prior = schema.get("prior")
        labels = prior.get("labels") if isinstance(prior, Mapping) else None
        if not keys <= schema.keys() or not isinstance(labels, list):
            raise ValueError(f"expected a schema of {sorted(keys)}, got {sorted(schema)!r:.200}")
        if not labels or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"expected labels of parameters, got {labels!r:.200}")
        return schema

    def __len__(self) -> int:
        """Number of finished rows."""
        return sum(sealed.count for sealed in self._sealed())

    def __repr__(self) -> str:
        """Where it is and how much it holds."""
        return f"SimulationStore({self.path!r}, N={len(self)})"

    def simulate(
        self,
        key: Key,
        prior: PriorLike,
        simulator: Simulator,
        n: int,
        *,
        executor: Executor | None = None,
        progress: bool = True,
    ) -> Simulations:
        """Simulate until there are n rows; those that are there are not made again.

        Row i depends on the key and on i alone, whatever the chunks and the executor.

        Args:
            key: Random key, the same at every call.
            prior: What `as_prior` takes.
            simulator: As for `sf.simulate`.
            n: Number of rows.
            executor: As for `sf.simulate`.
            progress: Show a progress bar.

        Returns:
            The first n rows at least, on disk.

        Raises:
            ValueError: The store was made with another key, prior or simulator, or what is given
                does not fit.
            StoreBusy: Another process is simulating into it.
        """
        require_count(1, n=n)
        prior = as_prior(prior)
        check_simulator(prior, simulator, executor)
        with self._locked():
            self._require_same(key, prior, simulator)
            self._make(key, prior, simulator, n, executor, progress=progress)
            chunks = self._sealed()
        sims = self._opened(chunks)
        report_failures(sims, (reason for chunk in chunks for reason in chunk.failed.values()), 3)
        return sims

    def _make(
        self,
        key: Key,
        prior: Prior,
        simulator: Simulator,
        n: int,
        executor: Executor | None,
        *,
        progress: bool,
    ) -> None:
        """Simulate the rows below n that are missing, and write them."""
        missing = list(_gaps(self._sealed(), n))
        total = sum(stop - start for start, stop in missing)
        bar = tqdm(total=total, desc="simulate", disable=not progress or not total)
        with bar:
            rows = simulated_rows(key, prior, simulator, missing, self.chunk, executor)
            for start, theta, x, reasons in rows:
                self._write(start, theta, x, reasons)
                bar.update(len(theta))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from writing; where locks are known, which is in local folders."""
        if "://" in self.path:
            yield
            return
        import fcntl

        with open(os.path.join(self.path, ".lock"), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreBusy(f"{self.path}: another process is simulating into it") from None
            yield

    def simulations(self) -> Simulations:
        """All finished rows, with observations that stay on disk.

        Raises:
            ValueError: There is none.
        """
        return self._opened(self._sealed())

    def _opened(self, chunks: list[Sealed]) -> Simulations:
        if not chunks:
            raise ValueError(f"{self.path}: expected a store with rows, got none")
        there = opened(self.path, chunks)
        names = [name for name in there[0].arrays if name.startswith("x.")]
        x = {n[2:]: Column(self.path, there, n) for n in names}
        theta, valid = (
            np.concatenate([read(self.path, c, n) for c in there]) for n in ("theta", "valid")
        )
        with reading(self.path, "rows"):
            return Simulations(theta, bare(x), valid=valid)

    def failures(self) -> Failures:
        """Rows that failed, with their parameters and reasons, beside all others."""
        chunks = self._sealed()
        sims, reasons, first = self._opened(chunks), {}, 0
        for chunk in chunks:
            reasons |= {first + row - chunk.start: why for row, why in chunk.failed.items()}
            first += chunk.count
        failed = np.flatnonzero(~np.asarray(sims.valid))
        said = tuple(reasons.get(int(i), "gave NaN or infinity") for i in failed)
        schema = self._schema()
        labels = () if schema is None else tuple(schema["prior"]["labels"])
        if len(labels) != sims.theta.shape[1]:
            raise StoreSpoilt(
                f"{self.path}: expected a label for each of {sims.theta.shape[1]} parameters, "
                f"got {len(labels)}"
            )
        return Failures(labels, np.asarray(sims.theta), failed, said)

    def verify(self) -> None:
        """Read everything and compare it with its checksums.

        Raises:
            StoreSpoilt: A chunk is not what was written.
        """
        chunks = self._sealed()
        for chunk, there in zip(chunks, opened(self.path, chunks), strict=True):
            arrays = {name: read(self.path, there, name) for name in there.arrays}
            if checksum(arrays) != chunk.checksum:
                raise StoreSpoilt(
                    f"{self.path}: the rows from {chunk.start} on are not those that were written; "
                    f"remove rows/{chunk.start:012d} to have them made again"
                )

    def _write(
        self, start: int, theta: np.ndarray, x: dict[str, np.ndarray], reasons: dict[int, str]
    ) -> None:
        """Write a chunk, its seal last."""
        for name in x:
            # names become those of folders
            if not name.isprintable() or set(name) & set("/\\") or len(name.encode()) > MOST_NAME:
                raise ValueError(
                    f"x: expected names without slashes of at most {MOST_NAME} bytes, got "
                    f"{name!r:.80}"
                )
        group = self._rows.create_group(f"{start:012d}", overwrite=True)
        arrays = {"theta": theta, **{f"x.{name}": value for name, value in x.items()}}
        finite = [np.isfinite(v.reshape(len(v), -1)).all(axis=1) for v in x.values()]
        arrays["valid"] = np.all(finite, axis=0)
        arrays["valid"][[row - start for row in reasons]] = False
        for name, value in arrays.items():
            group.create_array(name, data=value, chunks=value.shape)
        failed = {str(row): reason for row, reason in reasons.items()}
        group.attrs["seal"] = {"rows": len(theta), "sha256": checksum(arrays), "failed": failed}

    def _sealed(self) -> list[Sealed]:
        """Finished chunks in the order of their rows."""
        return sealed(self.path, self._rows)

    def _require_same(self, key: Key, prior: Prior, simulator: Simulator) -> None:
        """Write the schema of a new store; refuse another prior, simulator or key."""
        mine = {
            "format": FORMAT,
            "key": np.asarray(jax.random.key_data(key)).tolist(),
            "prior": _described(prior),
            "simulator": identity(simulator, prior),
        }
        there = self._schema()
        if there is None:
            self._root.attrs["sbi_flows"] = {**mine, "versions": _versions()}
            return
        for name in ("prior", "simulator", "key"):
            if not _alike(there[name], mine[name]):
                raise ValueError(
                    f"{name}: expected that of the store {self.path}, {_short(there[name])}, got "
                    f"{_short(mine[name])}"
                )


def _gaps(chunks: list[Sealed], n: int) -> Iterator[tuple[int, int]]:
    """Rows below n that are in no chunk."""
    start = 0
    for chunk in [*chunks, Sealed(n, 0, "", {}, None)]:
        if start < min(chunk.start, n):
            yield start, min(chunk.start, n)
        start = max(start, chunk.start + chunk.count)


def _described(prior: Prior) -> dict[str, Any]:
    """What tells a prior from others: its labels, and some draws."""
    draws = np.asarray(prior.sample(jax.random.key(0), 4), float)
    return {"labels": list(prior.labels), "draws": draws.tolist()}


def _alike(there: Any, mine: Any) -> bool:
    """Whether two descriptions are the same, draws up to rounding."""
    if not isinstance(mine, Mapping) or "draws" not in mine:
        return there == mine
    try:
        first, second = (np.asarray(each["draws"], float) for each in (there, mine))
    except (TypeError, ValueError, KeyError, OverflowError):
        return False
    if there["labels"] != mine["labels"] or first.shape != second.shape:
        return False
    return bool(np.all(np.abs(first - second) <= 1e-3 * first.std(axis=0)))


def _short(description: Any) -> str:
    if isinstance(description, Mapping) and "labels" in description:
        return f"of {', '.join(description['labels'])}"
    return f"{json.dumps(description):.200}"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("sbi-flows", "jax", "numpy", "numpyro", "zarr")}
