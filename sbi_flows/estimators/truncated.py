"""Truncated sequential neural posterior estimation: simulate again where the posterior may be.

Public names: `truncated_rounds`, `Round`.

Source: Deistler, Goncalves & Macke 2022, "Truncated proposals for scalable and hassle-free
simulation-based inference" (arXiv:2210.04815). The region is a box in the prior's standard
coordinates instead of the highest densities: nothing has to be rejected, and the posterior of a
round is that of a prior, which `sf.check` draws from.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.core.checks import require_count, require_object, require_positive
from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.core.typing import Key, Obs, Simulator
from sbi_flows.estimators.base import Estimator
from sbi_flows.observations.batches import as_batch
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.prior.box import BoxPrior
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.executors import Executor
from sbi_flows.simulations.outputs import row_outputs
from sbi_flows.simulations.simulate import simulate
from sbi_flows.simulations.simulations import Simulations
from sbi_flows.simulations.store import SimulationStore

DRAWS = 10_000
"""Draws of a posterior whose extent is the next box."""

TAIL = 5e-3
"""Share of the draws on either side of a parameter that is no part of their extent: an early fit
puts a few anywhere."""

MARGIN = 0.25
"""Share of their extent by which a box is wider than the draws, on either side."""

EDGE, PRESSED = 0.05, 0.02
"""Of a box that holds its posterior, hardly any draws lie in this share of its width next to a
side, inside the margin; more than this share of them are a sign that something was cut off."""


@dataclasses.dataclass(frozen=True)
class Round:
    """What happened in a round.

    Attributes:
        prior: The prior that was simulated from, cut to a box after the first round.
        simulations: Number of new simulations.
        rows: Number of rows that the posterior was fitted to: new ones, and those of earlier
            rounds that lie in the box.
        history: Of the fit.
        pressed: Sides of the box that more of the posterior's draws lie next to than should, and
            how many: an earlier round may have cut off what the posterior has beyond.
    """

    prior: Prior
    simulations: int
    rows: int
    history: Any
    pressed: tuple[str, ...] = ()

    @property
    def mass(self) -> float:
        """Share of the prior that the box holds."""
        return self.prior.mass


def truncated_rounds(
    key: Key,
    estimator: Estimator,
    simulator: Simulator,
    x: Obs,
    *,
    simulations: int,
    rounds: int = 10,
    paying: float = 0.7,
    folder: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    progress: bool = True,
) -> tuple[Posterior, list[Round]]:
    """Fit to simulations from a prior that is cut, in rounds, to where the posterior at x may be.

    Each round simulates from the prior within a box, fits to all simulations in it, and cuts the
    box to what its posterior's draws at x fill, and a margin. In a box the simulations of all
    rounds are distributed as the prior is: no correction is needed, and none is made. A posterior
    that misses a mode in an early round never sees it again; `Round.mass` says how much was cut,
    and a posterior that presses against a side of its box is warned of.

    Args:
        key: Random key.
        estimator: An `NPE`, or a `Stack` of these.
        simulator: As for `sf.simulate`.
        x: The observation, one.
        simulations: New simulations of a round.
        rounds: Most rounds.
        paying: The rounds end when the next box would hold more than this share of the present
            one; at 1 none is left out, and later ones add simulations in a box that hardly shrinks.
        folder: Where the simulations and the boxes are kept, so that rounds which are finished are
            not repeated after an interrupt; None keeps nothing.
        executor: As for `sf.simulate`.
        progress: Show progress bars.

    Returns:
        The posterior, whose prior is the last box, so that `sf.check` draws from there, and what
        happened in each round that was fitted in this call. It is a posterior for observations such
        as x alone.

    Raises:
        ValueError: A number is out of range, the estimator is of another kind, x is no observation
            of the simulator or another one than that of the folder, or parameters of the prior
            depend on each other.
        SimulationFailed: All simulations of a round failed.

    References:
        Truncated proposals, arXiv:2210.04815.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Uniform(-10.0, 10.0).expand([1])
        >>> noisy = lambda key, theta: theta + 0.1 * jax.random.normal(key, (1,))
        >>> small = sf.NPE(prior, sf.MAF(transforms=1, hidden=(8,)), members=1)
        >>> key, x = jax.random.key(0), jax.numpy.ones(1)
        >>> posterior, rounds = truncated_rounds(key, small, noisy, x, simulations=200, rounds=2)
        >>> rounds[1].mass < 0.5
        True
    """
    require_object("estimator", estimator, Estimator, "an estimator such as sf.NPE")
    require_count(1, simulations=simulations, rounds=rounds)
    require_positive(paying=paying)
    if paying > 1:
        raise ValueError(f"paying: expected a number in (0, 1], got {paying!r}")
    current = estimator.prior
    prior = current.base if isinstance(current, BoxPrior) else current
    # refuses priors that cannot be cut
    BoxPrior(prior, np.full(prior.standard_dim, -1.0), np.full(prior.standard_dim, 1.0))
    _check_observation(simulator, prior, x)
    kept, parts, done = _Kept(folder, x), [], []
    for r in range(rounds):
        simulate_key, fit_key, draw_key = jax.random.split(jax.random.fold_in(key, r), 3)
        settings = {"executor": executor, "progress": progress}
        parts.append(kept.simulate(r, simulate_key, current, simulator, simulations, settings))
        last = r == rounds - 1
        box = kept.box(r, prior)
        if box is not None and not last:
            # a round that was finished before: its box is all that the next one needs
            current = box
            continue
        rows = _inside(current, parts)
        own = _of_round(estimator, r, current)
        posterior, history = own.fit(fit_key, rows, progress=progress)
        y = np.asarray(prior.to_standard(posterior.sample(draw_key, x, DRAWS)), float)
        pressed = _pressed(current, y)
        _warn_of(pressed, r)
        done.append(Round(current, simulations, len(rows), history, pressed))
        box = _box(prior, current, y)
        if last or box.mass > paying * current.mass:
            return posterior, done
        kept.keep(r, box)
        current = box
    raise AssertionError("the last round returns")


def _check_observation(simulator: Simulator, prior: Prior, x: Obs) -> None:
    """Refuse what is not one observation of this simulator."""
    if not as_batch(x, row_outputs(simulator, prior))[1]:
        raise ValueError("x: expected one observation, got a batch")


def _of_round(estimator: Estimator, r: int, prior: Prior) -> Estimator:
    """Return the estimator with the prior of a round, and with a folder of its own for checkpoints.

    Each round trains on other rows than the round before.
    """
    return estimator.with_checkpoint_folder(f"round-{r:03d}").with_prior(prior)


def _pressed(current: Prior, y: np.ndarray) -> tuple[str, ...]:
    """Sides that the posterior's draws, in the prior's standard coordinates, press against."""
    near = current.near_sides(y, EDGE) if isinstance(current, BoxPrior) else {}
    return tuple(f"{side} ({share:.0%})" for side, share in near.items() if share > PRESSED)


def _warn_of(pressed: tuple[str, ...], r: int) -> None:
    if pressed:
        warnings.warn(
            f"round {r + 1}: draws of the posterior lie next to sides of the box that an earlier "
            f"round left: {', '.join(pressed)}; it may have cut off a part of the posterior. Give "
            "each round more simulations, or the posterior summary statistics",
            SbiFlowsWarning,
            stacklevel=3,
        )


def _box(prior: Prior, current: Prior, y: np.ndarray) -> BoxPrior:
    """What the draws fill, in standard coordinates, and a margin, within the present box."""
    low, high = np.quantile(y, (TAIL, 1.0 - TAIL), axis=0)
    margin = MARGIN * (high - low)
    low, high = low - margin, high + margin
    if isinstance(current, BoxPrior):
        low, high = np.maximum(low, current.low), np.minimum(high, current.high)
    return BoxPrior(prior, low, high)


def _inside(prior: Prior, parts: list[Simulations]) -> Simulations:
    """The rows of all rounds that lie in the present box."""
    chosen = [part[np.flatnonzero(prior.contains(part.theta))] for part in parts]
    rounds = np.concatenate([np.full(len(part), r) for r, part in enumerate(chosen)])
    x = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(part.x for part in chosen))
    theta, valid = (jnp.concatenate([getattr(p, n) for p in chosen]) for n in ("theta", "valid"))
    return Simulations(theta, x, valid=valid, round=rounds)


class _Kept:
    """Simulations and boxes of finished rounds, in a folder or nowhere."""

    def __init__(self, folder: str | os.PathLike[str] | None, x: Obs) -> None:
        self._folder = None if folder is None else Path(folder)
        self._boxes: list[list[list[float]]] = []
        self._x = [np.asarray(leaf, float).ravel().tolist() for leaf in jax.tree.leaves(x)]
        if self._folder is not None and self._path.exists():
            there = json.loads(self._path.read_text())
            if there["x"] != self._x:
                raise ValueError(f"x: expected the observation of the rounds in {folder}, another")
            self._boxes = there["boxes"]

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / "boxes.json"

    def simulate(
        self, r: int, key: Key, prior: Prior, simulator: Simulator, n: int, settings: dict[str, Any]
    ) -> Simulations:
        """The simulations of a round, those that are there already included."""
        if self._folder is None:
            return simulate(key, prior, simulator, n, **settings)
        store = SimulationStore(self._folder / f"round-{r:03d}.zarr")
        return store.simulate(key, prior, simulator, n, **settings)

    def box(self, r: int, prior: Prior) -> BoxPrior | None:
        """The box that a finished round left."""
        return BoxPrior(prior, *self._boxes[r]) if r < len(self._boxes) else None

    def keep(self, r: int, box: BoxPrior) -> None:
        """Write the box that a round leaves."""
        if self._folder is None:
            return
        self._boxes = [*self._boxes[:r], [box.low.tolist(), box.high.tolist()]]
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"x": self._x, "boxes": self._boxes}))
        partial.replace(self._path)
