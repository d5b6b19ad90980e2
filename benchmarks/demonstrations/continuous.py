"""`python -m benchmarks continuous`: test the densities of continuous flows.

Each density must integrate to 1, and agree with draws of the same flow.

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
"""Constructor of each density, by name."""

CELLS_PER_SIDE, SUBCELLS_PER_SIDE = 40, 10
"""Number of grid cells per side of the prior's square, and of subcells per side of a cell.

Only the cells that contain draws, and their neighbours, are divided into subcells. The side of a
subcell is half the width of the crescents of the posterior.
"""

BANDWIDTH = 0.01
"""Standard deviation of the Gaussian kernel in theta, equal to the width of the crescents."""

SEED = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the study: the densities to fit, and the sizes.

    Attributes:
        results: Folder in which the record is written.
        densities: Names of the densities, keys of `DENSITIES`.
        budget: Number of simulations of each fit.
        observations: Number of observations at which the densities are integrated.
        draws: Number of draws for the kernel density estimate, and in each timed call.
        repeats: Number of timed calls for each density.
        peer_epochs: Maximum number of epochs for sbi's flow matching, whose draws are timed for
            comparison. With 0, sbi is not run.
    """

    results: Path = Path("results")
    densities: tuple[str, ...] = ("NSF", "FlowMatching", "Diffusion")
    budget: int = 10_000
    observations: int = 3
    draws: int = 10_000
    repeats: int = 5
    peer_epochs: int = 100

    def __post_init__(self) -> None:
        """Raise BadInput if a name is unknown or a number is too small."""
        if not self.densities or set(self.densities) - set(DENSITIES):
            got = ", ".join(self.densities)
            raise BadInput(f"--densities: expected names out of {', '.join(DENSITIES)}; got {got}")
        for name in ("budget", "observations", "draws", "repeats"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name}: expected at least 1, got {getattr(self, name)}")
        if self.peer_epochs < 0:
            raise BadInput(f"--peer-epochs: expected zero or more, got {self.peer_epochs}")


class Grid(NamedTuple):
    """Centres (M, 2) and areas (M,) of the squares that tile the prior's support (-1, 1)^2."""

    theta: np.ndarray
    area: np.ndarray


def run(settings: Settings) -> dict[str, Any]:
    """Fit each density to two_moons, test it, time its draws and those of sbi, and write a record.

    Args:
        settings: Densities and sizes.

    Returns:
        The record, also written as `continuous-<time>.json`.
    """
    folder = writable_folder(settings.results, "--results")
    task, clock = two_moons(), Clock()
    simulate_key, fit_key, study_key, draw_key = jax.random.split(jax.random.key(SEED), 4)
    sims = sf.simulate(simulate_key, task.prior, task.simulator, settings.budget, progress=False)
    studies, calls = {}, {}
    observed, n = task.observation(1), settings.draws
    for name in settings.densities:
        with clock(f"fit {name}"):
            posterior, _ = sf.NPE(task.prior, DENSITIES[name]()).fit(fit_key, sims)
            jax.block_until_ready(posterior.weights)
        with clock(f"study {name}"):
            studies[name] = density_study(
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
        "densities": studies,
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
    """Integrate a posterior's density on a grid, and compare kernel density estimates with it.

    The kernel density estimate is made from draws of the posterior. If the draws follow the
    density, the expectation of the estimate is the density convolved with the kernel. The estimate
    and the convolved density are compared at new draws of the posterior. The two differ if the
    draws do not follow the density, and because the number of draws is finite.

    Args:
        key: Random key.
        posterior: A posterior whose prior is uniform on the square (-1, 1)^2.
        task: Task that provides the observations.
        observations: Number of observations. The first ones of the task are used.
        draws: Number of draws for each kernel density estimate. The number of new draws is `draws`
            or 300, whichever is smaller.

    Returns:
        Lists with one entry per observation: `integral`, the integral of the density; `bias`, the
        mean of the log of the estimate minus the log of the convolved density; and `gap`, the mean
        absolute value of this difference. `bias` and `gap` are in nats.
    """
    study: dict[str, list[float]] = {"integral": [], "bias": [], "gap": []}
    for i in range(observations):
        x = task.observation(i + 1)
        kernel_key, point_key = jax.random.split(jax.random.fold_in(key, i))
        centres = np.asarray(posterior.sample(kernel_key, x, draws), np.float64)
        points = np.asarray(posterior.sample(point_key, x, min(draws, 300)), np.float64)
        grid = _grid(np.concatenate([centres, points]))
        mass = np.exp(np.asarray(posterior.log_prob(grid.theta, x), np.float64)) * grid.area
        estimate = _kernels(points, centres).mean(axis=1)
        difference = np.log(estimate) - np.log(_kernels(points, grid.theta) @ mass)
        study["integral"].append(float(mass.sum()))
        study["bias"].append(float(difference.mean()))
        study["gap"].append(float(np.abs(difference).mean()))
    return study


def markdown(record: dict[str, Any]) -> list[str]:
    """Format a Markdown table with a row per density and a row for sbi; return its lines.

    The columns "difference" and "absolute difference" compare the log of the kernel density
    estimate with the log of the convolved density. The columns contain means over draws, in nats.
    """
    n = record["settings"]["draws"]
    head = ("density", "integrals", "difference, nats", "absolute difference", f"{n:,} draws, s")
    lines = [list(head), ["---"] * len(head)]
    for name, timing in record["draws"].items():
        study = record["densities"].get(name)
        cells = ["-"] * 3
        if study is not None:
            bias, gap = (", ".join(f"{v:.3f}" for v in study[part]) for part in ("bias", "gap"))
            cells = [", ".join(f"{v:.4f}" for v in study["integral"]), bias, gap]
        label = f"`{name}`" if study is not None else name
        lines.append([label, *cells, f"{timing['median']:.2f}"])
    return [f"| {' | '.join(line)} |" for line in lines]


def _grid(draws: np.ndarray) -> Grid:
    """Divide (-1, 1)^2 into squares: small near the draws, large elsewhere."""
    width = 2.0 / CELLS_PER_SIDE
    cells = np.clip(((draws + 1.0) / width).astype(int), 0, CELLS_PER_SIDE - 1)
    near = np.zeros((CELLS_PER_SIDE, CELLS_PER_SIDE), bool)
    near[cells[:, 0], cells[:, 1]] = True
    near = ndimage.binary_dilation(near, np.ones((3, 3), bool))
    large = -1.0 + width * (np.argwhere(~near) + 0.5)
    steps = np.stack(np.meshgrid(*[np.arange(SUBCELLS_PER_SIDE)] * 2), -1).reshape(-1, 2)
    corners = -1.0 + width * np.argwhere(near)
    small = (corners[:, None] + width / SUBCELLS_PER_SIDE * (steps + 0.5)).reshape(-1, 2)
    area = [np.full(len(large), width**2), np.full(len(small), (width / SUBCELLS_PER_SIDE) ** 2)]
    return Grid(np.concatenate([large, small]), np.concatenate(area))


def _kernels(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Evaluate the Gaussian kernel of each centre (M, 2) at each point (n, 2), shape (n, M)."""
    squared = cdist(points, centres, "sqeuclidean") / BANDWIDTH**2
    return np.exp(-0.5 * squared) / (2.0 * np.pi * BANDWIDTH**2)
