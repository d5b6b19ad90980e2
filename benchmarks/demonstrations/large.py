"""`python -m benchmarks large`: memory and time of fits to long observations on disk.

Public names: `run`, `CASES`, `Case`.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist
from tqdm.auto import tqdm

import sbi_flows as sf
from benchmarks.suite.memory import drop_programs, forget_peak_memory, peak_memory_gib
from benchmarks.suite.records import provenance, writable_folder, write_json
from sbi_flows.networks.embeddings import EmbeddingSettings

SEED = 256
BLOCK = 50
"""Number of rows that are simulated at once."""

PRIOR = {"log_scale": dist.Normal(0.0, 0.5), "slope": dist.Uniform(0.5, 3.5)}


@dataclasses.dataclass(frozen=True)
class Case:
    """Kind of data, its size, and the network that reads it.

    Attributes:
        shape: Shape of an observation.
        rows: Number of simulations.
        epochs: Number of epochs.
        embedding: Settings of the network.
    """

    shape: tuple[int, ...]
    rows: int
    epochs: int
    embedding: EmbeddingSettings


CASES = {
    "images of 256 x 256": Case((256, 256), 20_000, 2, sf.ConvNet(width=8)),
    "series of 100,000 points": Case((100_000,), 5_000, 2, sf.SeriesNet()),
}


def run(folder: Path, cases: dict[str, Case] | None = None) -> dict[str, Any]:
    """Write Gaussian fields with power-law spectra to disk, fit to them, and write `large.json`.

    Args:
        folder: Folder of the record.
        cases: The cases; None for all.

    Returns:
        The record.

    Raises:
        BadInput: The folder is not writable.
    """
    path = writable_folder(folder, "--results") / "large.json"
    results: dict[str, Any] = {}
    for name, case in (cases or CASES).items():
        with tempfile.TemporaryDirectory() as scratch:
            results[name] = _measured(case, Path(scratch))
        print(f"{name}: {results[name]}", flush=True)
    record = {**provenance(), "kind": "large", "cases": results}
    write_json(path, record)
    return record


def _measured(case: Case, scratch: Path) -> dict[str, Any]:
    """Simulate to a file, fit to it, and return memory, time and losses."""
    keys = jax.random.split(jax.random.key(SEED), 3)
    prior = sf.as_prior(PRIOR)
    theta = np.asarray(prior.sample(keys[0], case.rows), np.float64)
    stored = np.lib.format.open_memmap(
        scratch / "x.npy", "w+", np.float32, (case.rows, *case.shape)
    )
    random = np.random.default_rng(np.asarray(jax.random.key_data(keys[1])))
    for start in tqdm(range(0, case.rows, BLOCK), desc="simulate"):
        rows = slice(start, start + BLOCK)
        stored[rows] = _fields(random, theta[rows], case.shape)
    stored.flush()
    gib = stored.nbytes / 2**30
    del stored
    sims = sf.Simulations(theta, np.load(scratch / "x.npy", mmap_mode="r"))
    training = sf.Training(max_epochs=case.epochs)
    npe = sf.NPE(prior, sf.MAF(), embedding=case.embedding, members=1, training=training)
    drop_programs()
    forget_peak_memory()
    began = time.perf_counter()
    _, history = npe.fit(keys[2], sims)
    return {
        "rows": case.rows,
        "data_gib": gib,
        "peak_memory_gib": peak_memory_gib(),
        "seconds": time.perf_counter() - began,
        "epochs": history.epochs,
        "linear_start_loss": float(np.mean(history.start_loss)),
        "held_out_loss": float(np.mean(np.min(history.validation_loss, axis=0))),
    }


def _fields(random: np.random.Generator, theta: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Draw periodic Gaussian fields whose amplitude falls with frequency as a power, and noise.

    Args:
        random: Source of random numbers.
        theta: Logarithm of the scale, and slope of the power spectrum, shape (n, 2).
        shape: Shape of one field.
    """
    axes = tuple(range(1, len(shape) + 1))
    white = random.standard_normal((len(theta), *shape), np.float32)
    modes = np.fft.rfftn(white, axes=axes)
    grids = [np.fft.fftfreq(n) for n in shape[:-1]] + [np.fft.rfftfreq(shape[-1])]
    squares: np.ndarray = np.zeros(())
    for grid in grids:
        squares = np.add.outer(squares, grid**2)
    log_frequency = 0.5 * np.log(np.maximum(squares * max(shape) ** 2, 1.0))
    scale, slope = (column.reshape(-1, *[1] * len(shape)) for column in theta.T)
    modes *= np.exp(scale - 0.5 * slope * log_frequency)
    field = np.fft.irfftn(modes, s=shape, axes=axes)
    return (field + 0.1 * random.standard_normal(field.shape)).astype(np.float32)
