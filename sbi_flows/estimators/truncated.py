"""Truncated sequential neural posterior estimation: simulate again in a box around the posterior.

Public names: `truncated_rounds`, `Round`.

Source: Deistler, Goncalves & Macke 2022, "Truncated proposals for scalable and hassle-free
simulation-based inference" (arXiv:2210.04815). They truncate the prior to a region of highest
density. Here the prior is truncated to a box in its standard coordinates. Drawing from this
truncated prior needs no rejection. Both the next round and `sf.check` draw from it.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, TypedDict, Unpack

import jax
import numpy as np

from sbi_flows.core.checks import require_count, require_object, require_positive
from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.core.typing import Key, Obs, Simulator
from sbi_flows.core.warn import warn_user
from sbi_flows.estimators.base import Estimator, FitHistory
from sbi_flows.estimators.round_folder import RoundFolder
from sbi_flows.estimators.rows import contains
from sbi_flows.observations.batches import as_batch
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.prior.box import BoxPrior
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.executors import Executor
from sbi_flows.simulations.outputs import row_outputs
from sbi_flows.simulations.simulations import Simulations

NUM_DRAWS = 10_000
"""Number of posterior draws from which the next box is computed."""

TAIL = 5e-3
"""Fraction of the draws in each tail of a parameter that are ignored when the next box is computed.

Draws of an early round contain a few outliers, which would enlarge the box.
"""

MARGIN = 0.25
"""Margin added to the range of the draws on each side, as a fraction of that range."""

EDGE_WIDTH, MAX_EDGE_FRACTION = 0.05, 0.02
"""Limits of the warning that a box may have cut off a part of the posterior.

`EDGE_WIDTH` is the width of the edge zone on each side, as a fraction of the width of the box.
`MAX_EDGE_FRACTION` is the maximum fraction of the draws in an edge zone without a warning.
"""


class RoundOptions(TypedDict, total=False):
    """Optional keyword arguments of `truncated_rounds`."""

    executor: Executor | None
    progress: bool
    paying: float


@dataclasses.dataclass(frozen=True)
class Round:
    """Result of one round.

    Attributes:
        prior: Prior of this round: the full prior in the first round, truncated to a box later.
        simulations: Number of new simulations.
        rows: Number of rows in the fit: the new simulations, and the simulations of earlier rounds
            that lie in the box.
        history: History of the fit.
        near_edges: Sides of the box with many posterior draws close to them, each with the fraction
            of the draws there. The box may have cut off a part of the posterior at these sides.
    """

    prior: Prior
    simulations: int
    rows: int
    history: FitHistory
    near_edges: tuple[str, ...] = ()

    @property
    def mass(self) -> float:
        """Probability of the box under the full prior."""
        return self.prior.mass

    @property
    def pressed(self) -> tuple[str, ...]:
        """Old name of `near_edges`."""
        return self.near_edges


def truncated_rounds(
    key: Key,
    estimator: Estimator,
    simulator: Simulator,
    x: Obs,
    *,
    simulations: int,
    rounds: int = 10,
    shrink_below: float = 0.7,
    folder: str | os.PathLike[str] | None = None,
    **options: Unpack[RoundOptions],
) -> tuple[Posterior, list[Round]]:
    """Fit a posterior for one observation x in rounds, with a prior truncated to a shrinking box.

    Each round draws parameters from the prior within a box, simulates, and fits the posterior to
    all simulations in the box. The next box is the range of the posterior draws at x plus a margin.
    Within a box, the simulations of all rounds follow the truncated prior, so that no correction of
    the posterior is needed. If an early round misses a mode of the posterior, later rounds cannot
    find it. `Round.mass` is the prior probability of a round's box. A warning names the
    sides of a box that have many posterior draws close to them.

    Args:
        key: Random key.
        estimator: An `NPE`, a `Stack`, or any other `sbi_flows.estimators.base.Estimator`.
        simulator: As for `sf.simulate`.
        x: One observation.
        simulations: Number of new simulations in each round.
        rounds: Maximum number of rounds.
        shrink_below: Stop if the prior mass of the next box divided by that of the present box is
            above this number. With 1, all rounds take place: they add simulations even if the box
            hardly shrinks.
        folder: Folder in which the simulations and the boxes are stored. A call with the folder of
            an interrupted call continues after its last finished round. None stores nothing.
        **options: `executor`, as for `sf.simulate`; `progress=False` hides the progress bars;
            `paying` is the old name of `shrink_below`.

    Returns:
        The posterior of the last round, and the rounds that were fitted in this call. The posterior
        is valid only for observations similar to x. Its prior is truncated to the last box, and
        `sf.check` draws from that prior.

    Raises:
        ValueError: A number is out of range; `estimator` is not an `Estimator`; x does not
            have the shape of the simulator's output; the folder belongs to a call with other
            settings; or the parameters of the prior are not independent.
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
    shrink_below, simulate_settings = _options(shrink_below, options)
    require_count(1, simulations=simulations, rounds=rounds)
    current = estimator.prior
    prior = current.base if isinstance(current, BoxPrior) else current
    # raises ValueError for a prior that cannot be truncated
    BoxPrior(prior, np.full(prior.standard_dim, -1.0), np.full(prior.standard_dim, 1.0))
    outputs = row_outputs(simulator, prior)
    if any(map(_has_nan, jax.tree.leaves(x))):
        raise ValueError(
            "x: expected a complete observation, as rounds know no missing entries, got NaN; fit "
            "one posterior to simulations from the prior, sf.NPE(prior, missing=...)"
        )
    if not as_batch(x, outputs)[1]:
        raise ValueError("x: expected one observation, got a batch")
    saved = RoundFolder(folder, estimator, (simulator, outputs), x, simulations)
    parts: list[Simulations] = []
    done: list[Round] = []
    for r in range(rounds):
        simulate_key, fit_key, draw_key = jax.random.split(jax.random.fold_in(key, r), 3)
        arguments = (r, simulate_key, current, simulator, simulations)
        parts.append(saved.simulate(*arguments, **simulate_settings))
        is_last = r == rounds - 1
        box = saved.box(r, prior)
        if box is not None and not is_last:
            # an earlier call finished this round: only its box is needed
            current = box
            continue
        rows = _inside(current, parts)
        fitter = _of_round(estimator, r, current)
        posterior, history = fitter.fit(fit_key, rows, progress=simulate_settings["progress"])
        y = np.asarray(prior.to_standard(posterior.sample(draw_key, x, NUM_DRAWS)), float)
        near_edges = _near_edges(current, y)
        _warn_of_edges(near_edges, r)
        done.append(Round(current, simulations, len(rows), history, near_edges))
        box = _next_box(prior, current, y)
        if is_last or box.mass > shrink_below * current.mass:
            return posterior, done
        saved.save(r, box)
        current = box
    raise AssertionError("the last round returns")


def _has_nan(leaf: Any) -> bool:
    array = np.asarray(leaf)
    return array.dtype.kind == "f" and bool(np.isnan(array).any())


def _options(shrink_below: float, options: RoundOptions) -> tuple[float, dict[str, Any]]:
    """Check the options; return `shrink_below` and the settings of the simulations."""
    settings = {"executor": None, "progress": True, **options}
    if "paying" in settings:
        warn_user("paying: the name is now shrink_below", DeprecationWarning)
        shrink_below = settings.pop("paying")
    unknown = sorted(settings.keys() - {"executor", "progress"})
    if unknown:
        raise TypeError(f"truncated_rounds: got unexpected arguments {', '.join(unknown)}")
    require_positive(shrink_below=shrink_below)
    if shrink_below > 1:
        raise ValueError(f"shrink_below: expected a number in (0, 1], got {shrink_below!r}")
    return shrink_below, settings


def _of_round(estimator: Estimator, r: int, prior: Prior) -> Estimator:
    """Return the estimator with the prior of a round, and with a checkpoint subfolder of the round.

    Rounds cannot share checkpoints, because each round trains on different rows.
    """
    return estimator.with_checkpoint_folder(f"round-{r:03d}").with_prior(prior)


def _near_edges(current: Prior, y: np.ndarray) -> tuple[str, ...]:
    """Return the sides of the box with many draws close to them, and the fraction of draws there.

    Args:
        current: Prior of the round.
        y: Posterior draws in standard coordinates of the full prior, shape (n, d).
    """
    fractions = current.near_sides(y, EDGE_WIDTH) if isinstance(current, BoxPrior) else {}
    return tuple(
        f"{side} ({fraction:.0%})"
        for side, fraction in fractions.items()
        if fraction > MAX_EDGE_FRACTION
    )


def _warn_of_edges(near_edges: tuple[str, ...], r: int) -> None:
    if near_edges:
        warn_user(
            f"round {r + 1}: many draws of the posterior lie next to sides of the box that an "
            f"earlier round left: {', '.join(near_edges)}. The box may have cut off a part of the "
            "posterior. Use more simulations in each round, or summary statistics",
            SbiFlowsWarning,
        )


def _next_box(prior: Prior, current: Prior, y: np.ndarray) -> BoxPrior:
    """Return the full prior truncated to the range of the draws plus a margin.

    The new box lies within the present one.

    Args:
        prior: Full prior.
        current: Prior of the round, truncated to the present box.
        y: Posterior draws in standard coordinates of the full prior, shape (n, d).
    """
    low, high = np.quantile(y, (TAIL, 1.0 - TAIL), axis=0)
    margin = MARGIN * (high - low)
    low, high = low - margin, high + margin
    if isinstance(current, BoxPrior):
        low, high = np.maximum(low, current.low), np.minimum(high, current.high)
    return BoxPrior(prior, low, high)


def _inside(prior: Prior, parts: list[Simulations]) -> Simulations:
    """Return the rows of all rounds that lie in the present box.

    The selection uses NumPy, because JAX would compile a new program for each number of rows.
    """
    places = [np.flatnonzero(contains(prior, prior.subtract_offset(part.theta))) for part in parts]
    rounds = np.concatenate([np.full(len(p), r) for r, p in enumerate(places)])

    def joined(*leaves: Any) -> np.ndarray:
        return np.concatenate([_rows(leaf, p) for leaf, p in zip(leaves, places, strict=True)])

    x = jax.tree.map(joined, *(part.x for part in parts))
    theta, valid = (joined(*(getattr(part, name) for part in parts)) for name in ("theta", "valid"))
    return Simulations(theta, x, valid=valid, round=rounds)


def _rows(leaf: Any, places: np.ndarray) -> np.ndarray:
    """Return the rows `places` of an array, which may be in memory or on disk."""
    return np.asarray(leaf)[places] if isinstance(leaf, jax.Array) else np.asarray(leaf[places])
