"""Sensitivity of a posterior to each entry of an observation.

Public names: `data_sensitivity`, `DataSensitivity`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from sbi_flows.core.checks import require_count, require_positive
from sbi_flows.core.errors import SbiFlowsError
from sbi_flows.core.frames import reorder_columns
from sbi_flows.core.tables import table
from sbi_flows.core.typing import Key, Obs, Simulator
from sbi_flows.diagnostics.predictive import MIN_DRAWS, simulate_at_draws
from sbi_flows.observations.batches import COMPLETE, Missing, as_batch
from sbi_flows.observations.standardise import (
    Standardiser,
    entry_count,
    entry_labels,
    fit_standardiser,
    rows_on_host,
)
from sbi_flows.plots.local import heat_map
from sbi_flows.posteriors.adapter import PosteriorLike, as_posterior, single_shape
from sbi_flows.posteriors.base import AbstractPosterior
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.simulations.simulations import observation_shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True, repr=False)
class DataSensitivity:
    """Result of `data_sensitivity`: the effect of each of C entries on each of D parameters.

    Each entry is changed alone, from `low` to `high`; all others keep their observed values.

    Attributes:
        parameters: Names of the D parameters.
        entries: Names of the C entries of the flattened observation.
        low: Lower value of each entry, in the units of the data, shape (C,).
        high: Upper value of each entry, in the units of the data, shape (C,).
        shift: Change of the posterior mean from `low` to `high`, in posterior standard deviations
            at the observation, shape (D, C).
        width: Posterior standard deviation at `high` divided by that at `low`, shape (D, C).
        distance: Sum of the Wasserstein distances of the marginal from `low` to the observation
            and from there to `high`, in posterior standard deviations, shape (D, C). It equals
            |shift| if the marginal only shifts in one direction; it is larger if the width or shape
            of the marginal changes, or if the direction reverses at the observation.
        step: Number of units that an entry is changed by, down and up.
        unit: Description of the unit.
        draws: Number of draws at each observation.
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
        """Positions of the entries by their largest `distance`, in descending order."""
        return np.argsort(-self.distance.max(axis=0), kind="stable")

    def most_influential(self, most: int = 3) -> dict[str, tuple[str, ...]]:
        """Return, for each parameter, the `most` entries with the largest distance."""
        order = np.argsort(-self.distance, axis=1, kind="stable")[:, :most]
        names = (tuple(self.entries[i] for i in row) for row in order)
        return dict(zip(self.parameters, names, strict=True))

    def __repr__(self) -> str:
        """Return the text of `summary`."""
        return self.summary()

    def summary(self, most: int = 10) -> str:
        """Return a table of shift and width for the `most` influential entries."""
        count = len(self.entries)
        lines = [
            f"sensitivity to the data: {count} {'entry' if count == 1 else 'entries'}, each moved "
            f"{self.step:g} down and up in units of {self.unit}",
            "shift of the mean in posterior sd, x change of the sd",
        ]
        rows = self.order[:most]
        columns: dict[str, list[str]] = {
            "from": [f"{self.low[i]:.4g}" for i in rows],
            "to": [f"{self.high[i]:.4g}" for i in rows],
        }
        for name, shift, width in zip(self.parameters, self.shift, self.width, strict=True):
            columns[name] = [f"{shift[i]:+.2f} x{width[i]:.2f}" for i in rows]
        lines.append(table([self.entries[i] for i in rows], columns))
        influential = self.most_influential(min(3, count)).items()
        lines += [f"{name} is moved most by {', '.join(entries)}" for name, entries in influential]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as JSON data, by parameter and entry."""
        return {
            **{name: self._by_name(getattr(self, name)) for name in ("shift", "width", "distance")},
            "low": dict(zip(self.entries, self.low.tolist(), strict=True)),
            "high": dict(zip(self.entries, self.high.tolist(), strict=True)),
            "step": self.step,
            "unit": self.unit,
            "draws": self.draws,
        }

    def _by_name(self, values: np.ndarray) -> dict[str, dict[str, float]]:
        """Return values (D, C) as nested dicts by parameter and entry."""
        rows = [dict(zip(self.entries, row, strict=True)) for row in values.tolist()]
        return dict(zip(self.parameters, rows, strict=True))

    def plot(self, most: int = 20, ax: Axes | None = None) -> Axes:
        """Plot the shifts by the `most` influential entries as a heat map."""
        columns = np.sort(self.order[:most])
        label = f"shift of the mean (posterior sd) from {self.step:g} below to {self.step:g} above"
        names = {"rows": self.parameters, "columns": [self.entries[i] for i in columns]}
        return heat_map(self.shift[:, columns], label=label, ax=ax, **names)


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
    """Change each entry of an observation, and measure how each parameter's posterior changes.

    All observations are sampled with the same random numbers, so that sampling noise mostly cancels
    in differences. An entry with a large effect and a doubtful value should be measured again. If
    an entry should have an effect but has none, the fit or the embedding may be wrong.

    Args:
        key: Random key.
        posterior: The posterior; it is sampled twice per entry.
        x: One observation.
        simulator: The simulator, `(key, theta) -> x`. With it, the unit of an entry is its standard
            deviation in simulations at posterior draws, about the scatter of a repeated
            measurement. Without it, the unit is the standard deviation in the training
            simulations, which may be far larger than an entry can change while all others stay.
        unit: Units of the entries, for example measurement errors, instead of the units above: a
            number, or arrays of the shape of x.
        step: Number of units that each entry is changed by, down and up. Positive, skewed data are
            changed by factors, because the posterior takes their logarithms. Integers change by
            integers, at least by 1, and non-negative ones stay non-negative. Booleans take both
            values.
        draws: Number of draws at each observation, at least 100.
        progress: Show a progress bar.

    Returns:
        The effects. Printing them shows a table; the method `plot` makes a figure.

    Raises:
        ValueError: x is a batch or does not fit the posterior, a number is not positive, both a
            simulator and units are given, or neither is given and the posterior has no
            standardiser.
        SimulationFailed: Fewer than half of the simulations succeeded, or fewer than 100.
        SbiFlowsError: The posterior gave draws that are not finite.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0, 1).expand([2])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 500)
        >>> quick = sf.Training(max_epochs=2)
        >>> posterior, _ = sf.NPE(prior, training=quick, members=1).fit(jax.random.key(1), sims)
        >>> result = sf.data_sensitivity(
        ...     jax.random.key(2), posterior, jax.numpy.array([0.3, -0.4]), unit=0.5, progress=False
        ... )
        >>> result.most_influential(1)
        {'theta[0]': ('x[0]',), 'theta[1]': ('x[1]',)}
    """
    require_count(MIN_DRAWS, draws=draws)
    require_positive(step=step)
    posterior = as_posterior(posterior, single_shape(x))
    standardiser = _standardiser_of(posterior)
    if simulator is not None and unit is not None:
        raise ValueError("unit: expected none beside a simulator, got both")
    if simulator is None and unit is None and standardiser is None:
        raise ValueError("unit: expected units or a simulator for this posterior, got neither")
    shapes = posterior.observation
    x = reorder_columns("x", x, posterior.columns)
    batch = _as_single(x, shapes, posterior.missing)
    scales = None if unit is None else _unit_of_entries(unit, shapes)

    draw_key, simulate_key = jax.random.split(key)
    samples = np.asarray(posterior.sample(draw_key, x, draws))
    if scales is not None:
        row, unit_text = rows_on_host(batch)[0], "the given units"
        low, high = row - step * scales, row + step * scales
    elif simulator is None:
        assert standardiser is not None  # checked above
        low, high = _standardised_steps(standardiser, batch, step)
        unit_text = "the training simulations' sd"
    else:
        valid = simulate_at_draws(simulate_key, posterior, simulator, samples, progress)
        low, high = _simulated_steps(valid.x, batch, step)
        unit_text = "the sd of simulations at draws"
    low, high = _representable(shapes, batch, low, high)

    effects = []
    present = np.flatnonzero(~np.isnan(rows_on_host(batch)[0]))
    for i in tqdm(present.tolist(), desc="move", disable=not progress):
        at_low, at_high = (
            np.asarray(posterior.sample(draw_key, changed, draws))[0]
            for changed in _with_entry(batch, i, (low[i], high[i]))
        )
        effects.append(_effects(samples, at_low, at_high))
    shift, width, distance = (np.stack(part, axis=1) for part in zip(*effects, strict=True))
    entries = entry_labels(shapes)
    return DataSensitivity(
        tuple(posterior.prior.labels),
        tuple(entries[i] for i in present.tolist()),
        low[present],
        high[present],
        shift,
        width,
        distance,
        float(step),
        unit_text,
        draws,
    )


def _standardiser_of(posterior: AbstractPosterior) -> Standardiser | None:
    """Return the standardiser of the posterior's training simulations, if it has one."""
    origin = posterior.origin
    return origin.standardiser if isinstance(origin, Posterior) else None


def _as_single(x: Obs, shapes: Obs, missing: Missing) -> Obs:
    """Return a batch of the one observation in the dtypes of training observations.

    Args:
        x: One observation.
        shapes: Shapes and dtypes of a training observation.
        missing: Entries that may be missing.

    Raises:
        ValueError: x is a batch, or has another shape.
    """
    batch, is_single = as_batch(x, shapes, missing)
    if not is_single:
        raise ValueError("x: expected one observation, got a batch")
    if missing.can_miss is not None:  # integers cannot hold NaN
        return jax.tree.map(np.array, batch)
    return jax.tree.map(lambda a, b: np.asarray(a).astype(b.dtype), batch, shapes)


def _unit_of_entries(unit: Obs, shapes: Obs) -> np.ndarray:
    """Return the user's unit of each entry of the flattened observation, shape (C,).

    Raises:
        ValueError: The units have another shape than an observation, or are not positive.
    """
    size = entry_count(shapes)
    if np.ndim(unit) == 0 and not isinstance(unit, dict):
        scales = np.full(size, float(unit))
    else:
        try:
            batch, is_single = as_batch(unit, shapes)
        except ValueError as error:
            raise ValueError(f"unit: {str(error).removeprefix('x: ')}") from None
        if not is_single:
            raise ValueError("unit: expected the shape of one observation, got a batch")
        scales = rows_on_host(batch)[0]
    if not np.all(np.isfinite(scales) & (scales > 0)):
        raise ValueError(f"unit: expected positive numbers, got {unit}")
    return scales


def _standardised_steps(
    standardiser: Standardiser, batch: Obs, step: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return a lower and an upper value of each entry, shape (C,) each.

    The values lie `step` standardised units below and above the observed entry.
    """
    features, mask = jnp.split(standardiser(batch), [len(standardiser.center)], axis=-1)
    ends = (
        standardiser.inverse(jnp.concatenate([features + sign * step, mask], axis=-1))
        for sign in (-1.0, 1.0)
    )
    low, high = (np.asarray(rows, float)[0] for rows in ends)
    return low, high


def _simulated_steps(simulated: Obs, batch: Obs, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a lower and an upper value of each entry, shape (C,) each.

    The values lie `step` units below and above the observed entry; the unit is the scatter of the
    simulations (n, *event). Entries that are equal in all simulations do not change.
    """
    missing = bool(np.isnan(rows_on_host(simulated)).any() or np.isnan(rows_on_host(batch)).any())
    allowed = Missing(np.ones(rows_on_host(batch).shape[1], bool)) if missing else COMPLETE
    as_batch(batch, observation_shape(simulated), allowed)  # raises if the shapes differ
    low, high = _standardised_steps(fit_standardiser(simulated, has_missing=missing), batch, step)
    rows, row = (rows_on_host(x) for x in (simulated, batch))
    is_constant = rows.min(axis=0) == rows.max(axis=0)
    return np.where(is_constant, row[0], low), np.where(is_constant, row[0], high)


def _representable(
    shapes: Obs, batch: Obs, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Round low and high values (C,) of integer and boolean entries to values they can take."""
    row = rows_on_host(batch)[0]
    dtypes = [d for s in jax.tree.leaves(shapes) for d in [s.dtype] * math.prod(s.shape)]
    is_bool = np.array([jnp.issubdtype(d, jnp.bool_) for d in dtypes])
    is_integer = np.array([jnp.issubdtype(d, jnp.integer) for d in dtypes])
    down = np.minimum(np.round(low), row - (low < row))
    down = np.where(row >= 0, np.maximum(down, 0.0), down)
    up = np.maximum(np.round(high), row + (high > row))
    # Beyond the limits of their dtype, integers would wrap around.
    limits = [jnp.iinfo(d) if i else None for d, i in zip(dtypes, is_integer, strict=True)]
    down = np.maximum(down, np.array([info.min if info else 0 for info in limits], float))
    up = np.minimum(up, np.array([info.max if info else 0 for info in limits], float))
    low = np.where(is_bool, 0.0, np.where(is_integer, down, low))
    return low, np.where(is_bool, 1.0, np.where(is_integer, up, high))


def _with_entry(batch: Obs, position: int, values: tuple[float, float]) -> Iterator[Obs]:
    """Yield copies of a batch of one observation with one flattened entry set to each value."""
    leaves, tree = jax.tree.flatten(batch)
    ends = np.cumsum([leaf.size for leaf in leaves])
    leaf_index = int(np.searchsorted(ends, position, side="right"))
    for value in values:
        copies = [leaf.copy() for leaf in leaves]
        copies[leaf_index].reshape(-1)[position - ends[leaf_index]] = value
        yield jax.tree.unflatten(tree, copies)


def _effects(
    samples: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute shift, width ratio and distance (D,) from draws (n, D) at three observations.

    Raises:
        SbiFlowsError: A draw is not finite.
    """
    if not all(np.all(np.isfinite(draws)) for draws in (samples, low, high)):
        raise SbiFlowsError("the posterior gave draws that are not finite")
    center, low, high = (
        np.sort(np.asarray(draws, np.float64), axis=0) for draws in (samples, low, high)
    )
    sd = center.std(axis=0)
    path = np.abs(center - low).mean(axis=0) + np.abs(high - center).mean(axis=0)
    shift = (high.mean(axis=0) - low.mean(axis=0)) / sd
    return shift, high.std(axis=0) / low.std(axis=0), path / sd
