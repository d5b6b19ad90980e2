"""Which entries of an observation move its posterior, and how far?

Public names: `data_sensitivity`, `DataSensitivity`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from sbi_flows.core.checks import as_real_tree, require_count, require_positive
from sbi_flows.core.errors import SbiFlowsError
from sbi_flows.core.tables import table
from sbi_flows.core.typing import Key, Obs, Simulator
from sbi_flows.diagnostics.predictive import MIN_DRAWS, simulate_at_draws
from sbi_flows.observations.standardise import (
    Standardiser,
    entry_labels,
    fit_standardiser,
    flatten_rows,
)
from sbi_flows.posteriors.base import PosteriorLike, innermost
from sbi_flows.posteriors.direct import as_batch
from sbi_flows.simulations.simulations import observation_shape

_ENDS = ("min", "max")


@dataclasses.dataclass(frozen=True, repr=False)
class DataSensitivity:
    """What `data_sensitivity` found: how each of D parameters answers to each of C entries.

    Each entry was moved alone, from `low` to `high`, and all else left as it was observed.

    Attributes:
        parameters: Names of the parameters (D,).
        entries: Names of the entries of a flattened observation (C,).
        low: Value that each entry was moved down to, shape (C,).
        high: Value that each entry was moved up to, shape (C,).
        shift: How far the mean moves from `low` to `high`, in posterior standard deviations at the
            observation itself, shape (D, C).
        width: Ratio of the standard deviations at `high` and at `low`, shape (D, C).
        distance: How far the marginal moves from `low` through the observation to `high`, as
            Wasserstein distances in those units, shape (D, C): |shift| where it is moved as it is,
            more where its width or shape changes or it turns back.
        step: Units that an entry was moved by, down and up.
        unit: What the unit is, in words.
        draws: Draws at each observation.
    """

    parameters: tuple[str, ...]
    entries: tuple[str, ...]
    low: np.ndarray
    high: np.ndarray
    shift: np.ndarray
    width: np.ndarray
    distance: np.ndarray
    step: float
    unit: str
    draws: int

    @property
    def order(self) -> np.ndarray:
        """Places of the entries, the one first that moves any parameter the farthest."""
        return np.argsort(-self.distance.max(axis=0), kind="stable")

    def most_influential(self, most: int = 3) -> dict[str, tuple[str, ...]]:
        """The entries that move each parameter the farthest, at most so many."""
        order = np.argsort(-self.distance, axis=1, kind="stable")[:, :most]
        named = (tuple(self.entries[i] for i in row) for row in order)
        return dict(zip(self.parameters, named, strict=True))

    def __repr__(self) -> str:
        """The text of `summary`."""
        return self.summary()

    def summary(self, most: int = 10) -> str:
        """What moves each parameter most, and shift and width by entry, at most so many."""
        count = len(self.entries)
        lines = [
            f"sensitivity to the data: {count} {'entry' if count == 1 else 'entries'}, each moved "
            f"{self.step:g} down and up in units of {self.unit}",
            "shift of the mean in posterior sd, x change of the sd",
        ]
        at = self.order[:most]
        columns: dict[str, list[str]] = {
            "from": [f"{self.low[i]:.4g}" for i in at],
            "to": [f"{self.high[i]:.4g}" for i in at],
        }
        for name, shift, width in zip(self.parameters, self.shift, self.width, strict=True):
            columns[name] = [f"{shift[i]:+.2f} x{width[i]:.2f}" for i in at]
        lines.append(table([self.entries[i] for i in at], columns))
        named = self.most_influential(min(3, count)).items()
        lines += [f"{name} is moved most by {', '.join(entries)}" for name, entries in named]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, fit for JSON: by parameter, then by entry."""

        def by_name(values: np.ndarray) -> dict[str, dict[str, float]]:
            rows = [dict(zip(self.entries, row, strict=True)) for row in values.tolist()]
            return dict(zip(self.parameters, rows, strict=True))

        return {
            **{name: by_name(getattr(self, name)) for name in ("shift", "width", "distance")},
            "low": dict(zip(self.entries, self.low.tolist(), strict=True)),
            "high": dict(zip(self.entries, self.high.tolist(), strict=True)),
            "step": self.step,
            "unit": self.unit,
            "draws": self.draws,
        }

    def plot(self, most: int = 20, ax: Any = None) -> Any:
        """Shifts as a heat map of parameters and of the most influential entries; the axes."""
        from sbi_flows.plots.local import heat_map

        at = np.sort(self.order[:most])
        label = f"shift of the mean (posterior sd) from {self.step:g} below to {self.step:g} above"
        names = [self.entries[i] for i in at]
        return heat_map(self.shift[:, at], rows=self.parameters, columns=names, label=label, ax=ax)


def data_sensitivity(
    key: Key,
    posterior: PosteriorLike,
    x: Obs,
    *,
    simulator: Simulator | None = None,
    unit: Obs | None = None,
    step: float = 0.5,
    draws: int = 1_000,
    progress: bool = True,
) -> DataSensitivity:
    """Move each entry of an observation a little, and see how far each parameter's posterior moves.

    All observations get the same random numbers, so that differences of draws are those of the
    observations: the noise of sampling mostly cancels. An entry that matters much and that nobody
    would vouch for is what to measure again; one that should matter and does not is a fault of the
    fit, or of the embedding.

    Args:
        key: Random key.
        posterior: The posterior. It is sampled twice for each entry.
        x: One observation.
        simulator: `(key, theta) -> x`. With it an entry is moved in units of its standard deviation
            in simulations at draws of the posterior, about what another measurement would differ
            by. Without it, in those of the training simulations, which may be far more than an
            entry can differ by while all others stay.
        unit: Units of the user's own instead, errors of measurement say: a number, or arrays of the
            shape of x.
        step: Units that each entry is moved by, down and up. Positive, skew data move by factors,
            as the posterior takes their logarithms; whole numbers move by whole numbers, at least
            by 1 and not below 0 from above; of booleans both values are taken.
        draws: Draws at each observation.
        progress: Show a progress bar.

    Returns:
        The shifts; printing shows them, `.plot()` draws them.

    Raises:
        ValueError: x is a batch or does not fit, a number is not positive, both a simulator and
            units are given, or neither to a posterior that was not made by this library.
        SimulationFailed: Fewer than half of the simulations, or than 100, succeeded.
        SbiFlowsError: The posterior gave draws that are not finite.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0, 1).expand([2])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 500)
        >>> quick = sf.Training(max_epochs=2)
        >>> posterior, _ = sf.NPE(prior, training=quick, members=1).fit(jax.random.key(1), sims)
        >>> found = sf.data_sensitivity(
        ...     jax.random.key(2), posterior, jax.numpy.array([0.3, -0.4]), unit=0.5, progress=False
        ... )
        >>> found.most_influential(1)
        {'theta[0]': ('x[0]',), 'theta[1]': ('x[1]',)}
    """
    require_count(MIN_DRAWS, draws=draws)
    require_positive(step=step)
    base = innermost(posterior)
    own: Any = getattr(base, "standardiser", None)
    if simulator is not None and unit is not None:
        raise ValueError("unit: expected none beside a simulator, got both")
    if simulator is None and unit is None and own is None:
        raise ValueError("unit: expected units or a simulator for this posterior, got neither")
    batch, like = _one(x, getattr(base, "observation", None))
    scales = None if unit is None else _scales(unit, like)

    draw_key, simulate_key = jax.random.split(key)
    at = np.asarray(posterior.sample(draw_key, x, draws))
    if scales is not None:
        row, said = np.asarray(flatten_rows(batch), float)[0], "the given units"
        ends = row - step * scales, row + step * scales
    elif simulator is None:
        ends, said = _standard_ends(own, batch, step), "the training simulations' sd"
    else:
        theta = jnp.asarray(at)
        valid = simulate_at_draws(simulate_key, posterior.prior, simulator, theta, progress)
        ends, said = _simulated_ends(valid.x, batch, step), "the sd of simulations at draws"
    low, high = _possible(like, batch, *ends)

    found = []
    for i in tqdm(range(len(low)), desc="move", disable=not progress):
        sides = [
            np.asarray(posterior.sample(draw_key, moved, draws))[0]
            for moved in _moved(batch, i, (low[i], high[i]))
        ]
        found.append(_compared(at, *sides))
    shift, width, distance = (np.stack(part, axis=1) for part in zip(*found, strict=True))
    names = tuple(posterior.prior.labels), entry_labels(like)
    return DataSensitivity(*names, low, high, shift, width, distance, float(step), said, draws)


def _one(x: Obs, like: Obs | None) -> tuple[Obs, Obs]:
    """A batch of one observation, in the dtypes of the training rows, and what these are like."""
    if like is None:
        arrays = jax.tree.map(jnp.asarray, as_real_tree("x", x))
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    batch, single = as_batch(x, like)
    if not single:
        raise ValueError("x: expected one observation, got a batch")
    return jax.tree.map(lambda a, b: np.asarray(a).astype(b.dtype), batch, like), like


def _scales(unit: Obs, like: Obs) -> np.ndarray:
    """Units of the entries of a flattened observation, shape (C,)."""
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(like))
    if np.ndim(unit) == 0 and not isinstance(unit, dict):
        scales = np.full(size, float(unit))
    else:
        try:
            batch, single = as_batch(unit, like)
        except ValueError as error:
            raise ValueError(f"unit: {str(error).removeprefix('x: ')}") from None
        if not single:
            raise ValueError("unit: expected the shape of one observation, got a batch")
        scales = np.asarray(flatten_rows(batch), float)[0]
    if not np.all(np.isfinite(scales) & (scales > 0)):
        raise ValueError(f"unit: expected positive numbers, got {unit}")
    return scales


def _standard_ends(
    standardiser: Standardiser, batch: Obs, step: float
) -> tuple[np.ndarray, np.ndarray]:
    """Entries so many standardised units down and up, shape (C,) both."""
    features = standardiser(batch)
    ends = (standardiser.inverse(features + sign * step) for sign in (-1.0, 1.0))
    low, high = (np.asarray(rows, float)[0] for rows in ends)
    return low, high


def _simulated_ends(simulated: Obs, batch: Obs, step: float) -> tuple[np.ndarray, np.ndarray]:
    """The same in units of simulations (n, *event); entries that never vary are not moved."""
    as_batch(batch, observation_shape(simulated))
    low, high = _standard_ends(fit_standardiser(simulated), batch, step)
    rows, row = (np.asarray(flatten_rows(x), float) for x in (simulated, batch))
    same = rows.min(axis=0) == rows.max(axis=0)
    return np.where(same, row[0], low), np.where(same, row[0], high)


def _possible(
    like: Obs, batch: Obs, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ends (C,) that whole numbers and booleans can take, where the entries are such."""
    row = np.asarray(flatten_rows(batch), float)[0]
    dtypes = [d for s in jax.tree.leaves(like) for d in [s.dtype] * math.prod(s.shape)]
    truth = np.array([jnp.issubdtype(d, jnp.bool_) for d in dtypes])
    whole = np.array([jnp.issubdtype(d, jnp.integer) for d in dtypes])
    down = np.minimum(np.round(low), row - (low < row))
    down = np.where(row >= 0, np.maximum(down, 0.0), down)
    up = np.maximum(np.round(high), row + (high > row))
    # beyond what the dtype holds they would wrap round
    kinds = [jnp.iinfo(d) if w else None for d, w in zip(dtypes, whole, strict=True)]
    least, most = (np.array([getattr(k, m) if k else 0 for k in kinds], float) for m in _ENDS)
    down, up = np.maximum(down, least), np.minimum(up, most)
    low = np.where(truth, 0.0, np.where(whole, down, low))
    return low, np.where(truth, 1.0, np.where(whole, up, high))


def _moved(batch: Obs, place: int, values: tuple[float, float]) -> Iterator[Obs]:
    """Batches of one observation, with one entry at each of the values."""
    leaves, tree = jax.tree.flatten(batch)
    ends = np.cumsum([leaf.size for leaf in leaves])
    number = int(np.searchsorted(ends, place, side="right"))
    for value in values:
        copies = [leaf.copy() for leaf in leaves]
        copies[number].reshape(-1)[place - ends[number]] = value
        yield jax.tree.unflatten(tree, copies)


def _compared(at: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, ...]:
    """Shift, change of width and distance (D,) of three sets of draws (n, D)."""
    if not all(np.all(np.isfinite(draws)) for draws in (at, low, high)):
        raise SbiFlowsError("the posterior gave draws that are not finite")
    at, low, high = (np.sort(np.asarray(draws, np.float64), axis=0) for draws in (at, low, high))
    unit = at.std(axis=0)
    way = np.abs(at - low).mean(axis=0) + np.abs(high - at).mean(axis=0)
    return (
        (high.mean(axis=0) - low.mean(axis=0)) / unit,
        high.std(axis=0) / low.std(axis=0),
        (way / unit),
    )
