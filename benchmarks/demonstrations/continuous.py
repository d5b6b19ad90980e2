"""Densities that an ODE gives: do they integrate to one, and do the draws fall where they say?

Public names: `DENSITIES`, `Settings`, `run`, `density_study`, `markdown`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import ndimage
from scipy.spatial.distance import cdist

import sbi_flows as sf
from benchmarks.peers.measure import interleaved
from benchmarks.peers.sbi_npe import fmpe_sampler
from benchmarks.peers.table import choose
from benchmarks.suite.records import BadInput, Clock, provenance, writable_folder, write_json
from simulators import Task, two_moons

DENSITIES: dict[str, Callable[[], Any]] = {
    "NSF": sf.NSF,
    "FlowMatching": sf.FlowMatching,
    "Diffusion": sf.Diffusion,
    "CNF": sf.CNF,
}
"""Densities by name."""

SIDE, FINER = 40, 10
"""Cells a side over the square of the prior; those with draws, and their neighbours, are cut into
squares of a tenth of their side, half the width of the posterior's crescents."""

BANDWIDTH = 0.01
"""Standard deviation of the kernel, in units of theta: that of the crescents."""

SEED = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to fit, and how large.

    Attributes:
        results: Folder of the record.
        densities: Names of `DENSITIES`.
        budget: Simulations of each fit.
        observations: Observations to integrate at.
        draws: Draws of the kernel estimate, and those that are timed.
        repeats: Timings of the draws.
        peer_epochs: Most epochs of sbi's fit, whose draws are timed; zero to leave it out.
    """

    results: Path = Path("results")
    densities: tuple[str, ...] = ("NSF", "FlowMatching", "Diffusion")
    budget: int = 10_000
    observations: int = 3
    draws: int = 10_000
    repeats: int = 5
    peer_epochs: int = 100

    def __post_init__(self) -> None:
        """Refuse names that are none, and numbers that cannot be."""
        if not self.densities or set(self.densities) - set(DENSITIES):
            got = ", ".join(self.densities)
            raise BadInput(f"--densities: expected names out of {', '.join(DENSITIES)}; got {got}")
        for name in ("budget", "observations", "draws", "repeats"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name}: expected at least 1, got {getattr(self, name)}")
        if self.peer_epochs < 0:
            raise BadInput(f"--peer-epochs: expected zero or more, got {self.peer_epochs}")


class Grid(NamedTuple):
    """Centres (M, 2) of squares that cover the prior's, and their areas (M,)."""

    theta: np.ndarray
    area: np.ndarray


def run(settings: Settings) -> dict[str, Any]:
    """Fit each density to two_moons, study it, time its draws beside sbi's, and keep a record.

    Args:
        settings: What to fit, and how large.

    Returns:
        The record.
    """
    folder = writable_folder(settings.results, "--results")
    task, clock = two_moons(), Clock()
    simulate_key, fit_key, study_key, draw_key = jax.random.split(jax.random.key(SEED), 4)
    sims = sf.simulate(simulate_key, task.prior, task.simulator, settings.budget, progress=False)
    found, calls = {}, {}
    observed, n = task.observation(1), settings.draws
    for name in settings.densities:
        with clock(f"fit {name}"):
            posterior, _ = sf.NPE(task.prior, DENSITIES[name]()).fit(fit_key, sims)
            jax.block_until_ready(posterior.weights)
        with clock(f"study {name}"):
            found[name] = density_study(
                study_key, posterior, task, observations=settings.observations, draws=n
            )
        calls[name] = lambda posterior=posterior: jax.block_until_ready(
            posterior.sample(draw_key, observed, n)
        )
    if settings.peer_epochs and choose(("sbi",)):
        with clock("fit sbi"):
            theta, x = np.asarray(sims.theta), np.asarray(sims.x)
            draw = fmpe_sampler(posterior.prior, theta, x, seed=SEED, epochs=settings.peer_epochs)
        calls["sbi FMPE"] = lambda: draw(observed, n)
    timings = interleaved(calls, settings.repeats, "draws")
    record = {
        **provenance(),
        "kind": "continuous",
        "settings": {**dataclasses.asdict(settings), "results": None},
        "densities": found,
        "draws": {name: timing.record() for name, timing in timings.items()},
        "seconds": dict(clock.seconds),
    }
    print("\n".join(markdown(record)), flush=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    write_json(folder / f"continuous-{stamp}.json", record)
    return record


def density_study(
    key: jax.Array,
    posterior: sf.Posterior,
    task: Task,
    *,
    observations: int,
    draws: int,
) -> dict[str, list[float]]:
    """Integrals of a posterior's density on a grid, and its gap to a kernel estimate of its draws.

    A kernel estimate has the density convolved with the kernel as its mean, which is what it is
    compared with: the gap is an error of density or draws, and the noise of so many draws.

    Args:
        key: Random key.
        posterior: A posterior whose prior is uniform on the square (-1, 1)^2.
        task: Where the observations come from.
        observations: Number of them, from the first on.
        draws: Draws of each kernel estimate; as many again, at most 300, are where it is looked
            at.

    Returns:
        For each observation `integral`; `bias` and `gap`, the mean and the mean absolute difference
        of the two log densities at the posterior's draws, in nats.
    """
    found: dict[str, list[float]] = {"integral": [], "bias": [], "gap": []}
    for i in range(observations):
        x = task.observation(i + 1)
        kernel_key, place_key = jax.random.split(jax.random.fold_in(key, i))
        sample = np.asarray(posterior.sample(kernel_key, x, draws), np.float64)
        places = np.asarray(posterior.sample(place_key, x, min(draws, 300)), np.float64)
        grid = _grid(np.concatenate([sample, places]))
        mass = np.exp(np.asarray(posterior.log_prob(grid.theta, x), np.float64)) * grid.area
        estimate = _kernels(places, sample).mean(axis=1)
        difference = np.log(estimate) - np.log(_kernels(places, grid.theta) @ mass)
        found["integral"].append(float(mass.sum()))
        found["bias"].append(float(difference.mean()))
        found["gap"].append(float(np.abs(difference).mean()))
    return found


def markdown(record: dict[str, Any]) -> list[str]:
    """Lines of a table: a row for each density, and one for sbi's draws."""
    n = record["settings"]["draws"]
    head = ("density", "integrals", "kernel estimate, mean", "mean absolute", f"{n:,} draws, s")
    lines = [list(head), ["---"] * len(head)]
    for name, timing in record["draws"].items():
        found = record["densities"].get(name)
        cells = ["-"] * 3
        if found is not None:
            bias, gap = (", ".join(f"{v:.3f}" for v in found[part]) for part in ("bias", "gap"))
            cells = [", ".join(f"{v:.4f}" for v in found["integral"]), bias, gap]
        called = f"`{name}`" if found is not None else name
        lines.append([called, *cells, f"{timing['median']:.2f}"])
    return [f"| {' | '.join(line)} |" for line in lines]


def _grid(draws: np.ndarray) -> Grid:
    """Squares over (-1, 1)^2, small ones where the draws are and around."""
    width = 2.0 / SIDE
    cells = np.clip(((draws + 1.0) / width).astype(int), 0, SIDE - 1)
    near = np.zeros((SIDE, SIDE), bool)
    near[cells[:, 0], cells[:, 1]] = True
    near = ndimage.binary_dilation(near, np.ones((3, 3), bool))
    large = -1.0 + width * (np.argwhere(~near) + 0.5)
    steps = np.stack(np.meshgrid(*[np.arange(FINER)] * 2), -1).reshape(-1, 2)
    corners = -1.0 + width * np.argwhere(near)
    small = (corners[:, None] + width / FINER * (steps + 0.5)).reshape(-1, 2)
    area = [np.full(len(large), width**2), np.full(len(small), (width / FINER) ** 2)]
    return Grid(np.concatenate([large, small]), np.concatenate(area))


def _kernels(places: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Gaussian kernels around the centres (M, 2), at places (n, 2): shape (n, M)."""
    squared = cdist(places, centres, "sqeuclidean") / BANDWIDTH**2
    return np.exp(-0.5 * squared) / (2.0 * np.pi * BANDWIDTH**2)
