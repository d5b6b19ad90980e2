"""Store of simulations on disk. It is written in chunks; a killed process loses no complete chunk.

A store is a zarr group. Its subgroup `rows` contains one group for each chunk of rows. The name of
this group is the row number of the first row; it holds the parameters, the observations and the
validity of the rows. A seal (a checksum and the reasons of failures) is written at the end. A chunk
without a seal is incomplete and is simulated again.

Public names: `SimulationStore`.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from sbi_flows.core.checks import as_random_key, require_count, require_flag, require_object
from sbi_flows.core.checksums import checksum
from sbi_flows.core.errors import StoreBusy, StoreSpoilt
from sbi_flows.core.typing import Key, Simulator
from sbi_flows.prior.prior import Prior, PriorLike, as_prior
from sbi_flows.simulations.arrays import usable_rows
from sbi_flows.simulations.batching import plan_store_calls, with_current_state
from sbi_flows.simulations.chunks import (
    Column,
    SealedChunk,
    open_chunks,
    read_array,
    sealed_chunks,
    spoilt_on_error,
)
from sbi_flows.simulations.constants import warn_constant
from sbi_flows.simulations.executors import Executor, External
from sbi_flows.simulations.extension import (
    StoredLayout,
    as_extension,
    extension_chunks,
    unknown_origin,
)
from sbi_flows.simulations.failures import Failures, report_failures
from sbi_flows.simulations.numbered import Chunk, simulate_ranges
from sbi_flows.simulations.outputs import (
    check_executor,
    check_outputs,
    row_outputs,
    simulator_identity,
)
from sbi_flows.simulations.schema import (
    FORMAT,
    checked_schema,
    prior_identity,
    require_same_origin,
    versions,
)
from sbi_flows.simulations.simulations import Simulations
from sbi_flows.simulations.worker import from_named

MAX_NAME_BYTES = 200
"""Maximum length of the name of an observation array in bytes. The name becomes a folder name."""


class SimulationStore:
    """Simulations of one prior and one simulator, on disk.

    Args:
        path: A folder, created if it is missing, or an address that fsspec supports, such as
            `s3://...`.
        chunk: Number of rows in a new chunk. A chunk is written when all of its rows are finished:
            if the process is killed, the rows of unfinished chunks are lost. One compiled call of a
            JAX simulator simulates at least 256 rows, which may be several small chunks. Chunks
            that are already in the store may have another size.
        missing: Whether NaN in x marks a missing entry; otherwise it marks a failed simulation.

    Attributes:
        path: The folder or address.
        chunk: Number of rows in a new chunk.
        missing: Whether NaN in x marks a missing entry.

    Raises:
        ValueError: `chunk` is not positive, the folder is neither empty nor a store, or the store
            was made with another value of `missing`.

    Example:
        >>> import jax, tempfile, numpyro.distributions as dist
        >>> noisy = lambda key, theta: theta + jax.random.normal(key)
        >>> store = SimulationStore(tempfile.mkdtemp() + "/noisy.zarr")
        >>> sims = store.simulate(jax.random.key(0), dist.Normal(0, 1), noisy, 100, progress=False)
        >>> len(sims), sims.on_disk, len(SimulationStore(store.path))
        (100, True, 100)
    """

    def __init__(
        self, path: str | os.PathLike[str], *, chunk: int = 1024, missing: bool = False
    ) -> None:
        """Open the store and read its schema."""
        import zarr

        require_count(1, chunk=chunk)
        require_flag(missing=missing)
        if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
            raise ValueError(f"path: expected a path, got {type(path).__name__}")
        if not os.fspath(path):
            raise ValueError("path: expected the path of a folder, got an empty string")
        self.path, self.chunk, self.missing = os.fspath(path), chunk, bool(missing)
        try:
            # `Any` avoids narrowing zarr's types at every use. Only zarr format 3 is accepted,
            # because codecs of format 2 may run code.
            self._root: Any = zarr.open_group(self.path, mode="a", zarr_format=3)
            self._rows: Any = self._root.require_group("rows")
            schema = self._schema()
        except Exception as error:
            raise ValueError(f"path: expected a store or none, got {self.path}: {error}") from error
        stored = self.missing if schema is None else schema.get("missing", False)
        if stored != self.missing:
            raise ValueError(f"missing: expected {stored} as in the store, got {self.missing}")

    def _schema(self) -> Mapping[str, Any] | None:
        """Return the schema of the store; None for a new store.

        Raises:
            ValueError: The schema is invalid, or the store has another format version.
        """
        return checked_schema(self._root.attrs.get("sbi_flows"))

    def __len__(self) -> int:
        """Number of finished rows."""
        return sum(chunk.count for chunk in self._sealed())

    def __repr__(self) -> str:
        """Show the path and the number of rows."""
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
        """Simulate the missing rows among the first n rows, and write them to the store.

        Row i depends only on the key and on i; it is the same for all chunk sizes and executors.

        Args:
            key: Random key. Use the same key in every call for a store.
            prior: A prior, or anything that `as_prior` accepts.
            simulator: As for `sf.simulate`.
            n: Number of rows.
            executor: As for `sf.simulate`.
            progress: Show a progress bar.

        Returns:
            All rows of the store (n rows, or more from earlier calls), with observations on disk.

        Raises:
            ValueError: The store was made with another key, prior or simulator, n is not positive,
                or the simulator is not accepted (see `sf.simulate`).
            StoreBusy: Another process is simulating into the store.
        """
        require_count(1, n=n)
        key, prior = as_random_key("key", key), as_prior(prior)
        check_executor(simulator, executor)
        run: Simulator | External = simulator
        if isinstance(simulator, External):
            outputs = row_outputs(simulator, prior)
        else:
            run = with_current_state(simulator)
            outputs = check_outputs(key, prior, run, plan_store_calls(self.chunk))
        with self._locked():
            self._require_same(key, prior, simulator_identity(simulator, outputs))
            missing = list(_gaps(self._sealed(), n))
            chunks = simulate_ranges(key, prior, run, missing, self.chunk, executor)
            self._write_all(chunks, sum(stop - start for start, stop in missing), progress)
            sealed = self._sealed()
        sims = self._open(sealed)
        reasons = (reason for chunk in sealed for reason in chunk.failed.values())
        report_failures(sims, reasons, stacklevel=3)
        warn_constant(sims.theta, sims.x, sims.valid)
        return sims

    def extend(self, simulations: Simulations) -> Simulations:
        """Add simulations that were made elsewhere, for example on another machine.

        The rows follow those of the store. If the process is killed, the store is as it was before.
        A later call of `simulate` counts these rows as finished. A store without rows takes its
        layout from the simulations; `simulate` then accepts any key, and any prior and simulator
        with the same names, shapes and dtypes.

        Args:
            simulations: Draws from the prior of the store and simulations of its simulator. Columns
                of theta with names are matched with the parameters of the store, others are taken
                in their order. Invalid rows stay invalid; the reasons of failures are not known.

        Returns:
            All rows of the store, with observations on disk.

        Raises:
            ValueError: Names, shapes or dtypes differ from those of the store; x is neither an
                array nor a dict of arrays; or the simulations are of sequential rounds.
            StoreBusy: Another process is simulating into the store.
            StoreSpoilt: A file is damaged or was changed.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> store = SimulationStore(tempfile.mkdtemp() + "/joined.zarr")
            >>> for first in (0.0, 10.0):
            ...     sims = store.extend(Simulations(first + np.ones((5, 1)), np.zeros((5, 3))))
            >>> sims
            Simulations(N=10, D=1, x=float32[3], invalid=0)
        """
        require_object("simulations", simulations, Simulations, "Simulations")
        if simulations.missing != self.missing:
            raise ValueError(
                f"simulations: expected missing={self.missing} as in the store, got "
                f"missing={simulations.missing}"
            )
        with self._locked():
            sealed, schema = self._sealed(), self._schema()
            if schema is None or (not sealed and schema["key"] is None):
                extension = as_extension(simulations, StoredLayout())
                origin = {"format": FORMAT, **unknown_origin(extension)}
                self._write_schema(origin)
            else:
                extension = as_extension(simulations, self._stored_layout(schema, sealed))
            start = max((chunk.start + chunk.count for chunk in sealed), default=0)
            record = {"name": uuid.uuid4().hex, "rows": len(simulations)}
            for chunk in extension_chunks(extension, start, self.chunk):
                self._write(chunk, record)
            return self._open(self._sealed())

    def _stored_layout(self, schema: Mapping[str, Any], sealed: list[SealedChunk]) -> StoredLayout:
        """Return the layout of the rows, from the chunks, or from the schema if there are none."""
        labels = list(schema["prior"]["labels"])
        if not sealed:
            with spoilt_on_error(self.path, "a schema"):
                outputs = dict(schema["simulator"]["outputs"]).items()
                arrays = {n: (tuple(shape), np.dtype(dtype)) for n, (shape, dtype) in outputs}
            return StoredLayout(labels, arrays)
        chunks = open_chunks(self.path, sealed)
        arrays = {
            name[2:]: (tuple(array.shape[1:]), np.dtype(array.dtype))
            for name, array in chunks[0].arrays.items()
            if name.startswith("x.")
        }
        theta = np.concatenate([read_array(self.path, chunk, "theta") for chunk in chunks])
        return StoredLayout(labels, arrays, theta)

    def _write_all(self, chunks: Iterable[Chunk], total: int, progress: bool) -> None:
        """Write each chunk when it is finished, and show a progress bar of `total` rows."""
        with tqdm(total=total, desc="simulate", disable=not progress or not total) as bar:
            for chunk in chunks:
                self._write(chunk)
                bar.update(len(chunk.theta))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Context manager that locks the store against other writers, if the folder is local."""
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
        """Return all finished rows; the observations stay on disk.

        Raises:
            ValueError: The store has no rows.
            StoreSpoilt: A file is damaged or was changed.
        """
        return self._open(self._sealed())

    def _open(self, sealed: list[SealedChunk]) -> Simulations:
        if not sealed:
            raise ValueError(f"{self.path}: expected a store with rows, got none")
        chunks = open_chunks(self.path, sealed)
        names = [name for name in chunks[0].arrays if name.startswith("x.")]
        x = {n[2:]: Column(self.path, chunks, n) for n in names}
        theta, valid = (
            np.concatenate([read_array(self.path, c, n) for c in chunks])
            for n in ("theta", "valid")
        )
        with spoilt_on_error(self.path, "rows"):
            return Simulations(theta, from_named(x), valid=valid, missing=self.missing)

    def failures(self) -> Failures:
        """Return the failed rows, the reasons of the failures, and the parameters of all rows.

        Raises:
            ValueError: The store has no rows.
            StoreSpoilt: A file is damaged or was changed.
        """
        sealed = self._sealed()
        sims, reason_at, first = self._open(sealed), {}, 0
        for chunk in sealed:
            reason_at |= {first + row - chunk.start: why for row, why in chunk.failed.items()}
            first += chunk.count
        failed = np.flatnonzero(~np.asarray(sims.valid))
        reasons = tuple(reason_at.get(int(i), "gave NaN or infinity") for i in failed)
        schema = self._schema()
        labels = () if schema is None else tuple(schema["prior"]["labels"])
        if len(labels) != sims.theta.shape[1]:
            raise StoreSpoilt(
                f"{self.path}: expected a label for each of {sims.theta.shape[1]} parameters, "
                f"got {len(labels)}"
            )
        return Failures(labels, np.asarray(sims.theta), failed, reasons)

    def verify(self) -> None:
        """Read all chunks, and compare their content with their checksums.

        Raises:
            StoreSpoilt: The content of a chunk does not match its checksum.
        """
        sealed = self._sealed()
        for seal, chunk in zip(sealed, open_chunks(self.path, sealed), strict=True):
            arrays = {name: read_array(self.path, chunk, name) for name in chunk.arrays}
            if checksum(arrays) != seal.checksum:
                what = "have them made" if seal.extension is None else "add the simulations"
                raise StoreSpoilt(
                    f"{self.path}: the rows from {seal.start} on are not those that were written; "
                    f"remove rows/{seal.start:012d} to {what} again"
                )

    def _write(self, chunk: Chunk, extension: Mapping[str, Any] | None = None) -> None:
        """Write a chunk, and then its seal, with the extension that the chunk belongs to."""
        for name in chunk.x:
            # names of arrays become names of folders
            has_slash = bool(set(name) & set("/\\"))
            if not name.isprintable() or has_slash or len(name.encode()) > MAX_NAME_BYTES:
                raise ValueError(
                    f"x: expected names without slashes of at most {MAX_NAME_BYTES} bytes, got "
                    f"{name!r:.80}"
                )
        group = self._rows.create_group(f"{chunk.start:012d}", overwrite=True)
        arrays = {"theta": chunk.theta, **{f"x.{name}": a for name, a in chunk.x.items()}}
        arrays["valid"] = usable_rows(chunk.x, missing=self.missing)
        arrays["valid"][[row - chunk.start for row in chunk.reasons]] = False
        for name, array in arrays.items():
            group.create_array(name, data=array, chunks=array.shape)
        failed = {str(row): reason for row, reason in chunk.reasons.items()}
        count = len(chunk.theta)
        seal = {"rows": count, "sha256": checksum(arrays), "failed": failed}
        group.attrs["seal"] = seal if extension is None else {**seal, "extension": extension}

    def _sealed(self) -> list[SealedChunk]:
        """Return complete chunks in the order of their rows."""
        return sealed_chunks(self.path, self._rows)

    def _require_same(self, key: Key, prior: Prior, identity: dict[str, Any]) -> None:
        """Write the schema of a new store, or compare it with the schema of an existing store.

        Raises:
            ValueError: The store was made with another key, prior or simulator.
        """
        schema = {
            "format": FORMAT,
            "key": np.asarray(jax.random.key_data(key)).tolist(),
            "prior": prior_identity(prior),
            "simulator": identity,
        }
        stored = self._schema()
        if stored is not None:
            require_same_origin(self.path, stored, schema)
        if stored is None or stored["key"] is None:
            self._write_schema(schema)

    def _write_schema(self, schema: Mapping[str, Any]) -> None:
        missing = {"missing": True} if self.missing else {}  # written only if it is needed
        self._root.attrs["sbi_flows"] = {**schema, **missing, "versions": versions()}


def _gaps(chunks: list[SealedChunk], n: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of row numbers below n that no chunk contains."""
    start = 0
    for chunk in [*chunks, SealedChunk(n, 0, "", {}, None)]:
        if start < min(chunk.start, n):
            yield start, min(chunk.start, n)
        start = max(start, chunk.start + chunk.count)
