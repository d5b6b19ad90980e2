"""Posterior predictive check: do simulations at posterior draws resemble the observation?

Public names: `predictive_check`, `Predictive`. Internal names: `simulate_at_draws`, `MIN_DRAWS`.

References:
    Gelman, Meng & Stern 1996, Posterior predictive assessment of model fitness via realized
    discrepancies, Statistica Sinica 6:733.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array

from sbi_flows import plots
from sbi_flows.core.checks import require_count
from sbi_flows.core.errors import SimulationFailed
from sbi_flows.core.frames import reorder_columns
from sbi_flows.core.tables import p_text, table
from sbi_flows.core.typing import Key, Obs, Simulator
from sbi_flows.diagnostics.discrepancies import (
    Discrepancies,
    Discrepancy,
    evaluate_discrepancies,
    trace_discrepancies,
    two_sided_p_values,
)
from sbi_flows.observations.batches import as_batch
from sbi_flows.observations.standardise import (
    entry_labels,
    fit_standardiser,
    flatten_rows,
    rows_on_host,
)
from sbi_flows.posteriors.adapter import PosteriorLike, as_posterior, single_shape
from sbi_flows.posteriors.base import AbstractPosterior
from sbi_flows.simulations.simulate import simulate_at
from sbi_flows.simulations.simulations import (
    Simulations,
    observation_shape,
    unchecked_simulations,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_DRAWS = 100
"""Minimum number of posterior draws, and of successful simulations at these draws."""


@dataclasses.dataclass(frozen=True, repr=False)
class Predictive:
    """Result of `predictive_check`. Small p-values: the model rarely produces similar data.

    The observation is used twice: for the posterior and for the check. The p-values of a correct
    model therefore concentrate around 0.5 instead of being uniform, and a small p-value is stronger
    evidence against the model than its value says.

    Attributes:
        labels: Names of the C entries of the flattened observation.
        entry_p: Two-sided p-value of each entry relative to the simulations, shape (C,).
        distance_p: P-value of the Mahalanobis distance over all entries: the share of simulations
            that are at least as far from the mean of the simulations as the observation.
        observed: Standardised observation, shape (C,): 0 is the median of the simulations, and the
            unit is their interquartile range / 1.349; absolute values above 3 are compressed by a
            logarithm.
        simulated: Simulations in the same units, shape (n, C).
        num_failed: Number of failed simulations that were left out.
        embedding_p: Like `distance_p`, but computed from the output of the posterior's embedding
            (first ensemble member); None without an embedding.
        discrepancies: Values and p-values of the user's discrepancies; None if there are none.
    """

    labels: tuple[str, ...]
    entry_p: np.ndarray
    distance_p: float
    observed: np.ndarray
    simulated: np.ndarray
    num_failed: int
    embedding_p: float | None = None
    discrepancies: Discrepancies | None = None

    @property
    def worst_p(self) -> float:
        """Smallest p-value of an entry, multiplied by the number of entries (Bonferroni)."""
        return min(1.0, float(self.entry_p.min()) * len(self.entry_p))

    def __repr__(self) -> str:
        """Return the text of `summary`."""
        return self.summary()

    def summary(self, most: int = 10) -> str:
        """Return the p-values, and a table of the `most` entries with the smallest p-values."""
        n = len(self.simulated)
        title = f"predictive check with {n} simulations: distance p {p_text(self.distance_p)}, "
        if self.embedding_p is not None:
            title += f"in the embedding {p_text(self.embedding_p)}, "
        title += f"worst of {len(self.labels)} entries p {p_text(self.worst_p)} (Bonferroni)"
        if self.num_failed:
            title += f"; {self.num_failed} simulations failed and were left out"
        order = np.argsort(self.entry_p, kind="stable")[:most]
        columns = {
            "p": [p_text(float(self.entry_p[i])) for i in order],
            "observed (sd)": [f"{self.observed[i]:+.2f}" for i in order],
        }
        text = f"{title}\n{table([self.labels[i] for i in order], columns)}"
        return text if self.discrepancies is None else f"{text}\n{self.discrepancies.summary()}"

    def to_dict(self) -> dict[str, Any]:
        """Return all p-values as JSON data, without the simulations."""
        discrepancies = self.discrepancies
        return {
            "entry_p": {m: float(p) for m, p in zip(self.labels, self.entry_p, strict=True)},
            "worst_p": self.worst_p,
            "distance_p": self.distance_p,
            "embedding_p": self.embedding_p,
            "discrepancies": None if discrepancies is None else discrepancies.to_dict(),
            "num_simulations": len(self.simulated),
            "num_failed": self.num_failed,
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the observation over quantile bands of the simulations, for each entry."""
        label = ["standardised"]
        options = {"time_label": "entry", "labels": label, "ax": ax}
        return plots.predictive(self.observed, self.simulated, **options)


def predictive_check(
    key: Key,
    posterior: PosteriorLike,
    x: Obs | Simulator,
    simulator: Simulator | Obs,
    *,
    draws: int = 1_000,
    discrepancies: Mapping[str, Discrepancy] | None = None,
    progress: bool = True,
) -> Predictive:
    """Simulate at posterior draws, and compare the simulations with the observation.

    This check tests whether the model can produce data like the observation. `check`, in contrast,
    tests whether the posterior is correct for data that the model produces.

    Args:
        key: Random key.
        posterior: The posterior.
        x: One observation.
        simulator: The simulator, `(key, theta) -> x`. Calls in the earlier order, with the
            simulator before x, are still accepted.
        draws: Number of posterior draws, with one simulation each; at least 100.
        discrepancies: Additional quantities to compare, by name: a number computed from one
            observation, `lambda x: x.max()`, or from an observation and parameters in the form the
            simulator receives, `lambda x, theta: ...`. With parameters, simulation and observation
            are compared at the same draw. JAX must be able to trace the functions.
        progress: Show a progress bar.

    Returns:
        The p-values; printing the result shows them.

    Raises:
        ValueError: x is a batch or has another shape than a simulation, there are too few draws,
            or a discrepancy is not a function of one or two arguments that returns one real
            number.
        SimulationFailed: Fewer than half of the simulations succeeded, or fewer than 100.
        SbiFlowsError: A discrepancy is NaN.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0, 1).expand([2])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 500)
        >>> quick = sf.Training(max_epochs=2)
        >>> posterior, _ = sf.NPE(prior, training=quick, members=1).fit(jax.random.key(1), sims)
        >>> result = sf.predictive_check(
        ...     jax.random.key(2), posterior, jax.numpy.array([0.3, -9.0]), noisy,
        ...     discrepancies={"range": lambda x: x.max() - x.min()},
        ... )
        >>> result.entry_p[0] > 0.05, result.entry_p[1] < 0.05, result.distance_p < 0.05
        (np.True_, np.True_, True)
        >>> float(result.discrepancies.p[0]) < 0.05
        True
    """
    require_count(MIN_DRAWS, draws=draws)
    if callable(x):
        x, simulator = simulator, x
    if not callable(simulator):
        raise ValueError("simulator: expected a function, got none among the arguments")
    posterior = as_posterior(posterior, single_shape(x))
    traced = trace_discrepancies(discrepancies, posterior.prior, x)
    draw_key, simulate_key = jax.random.split(key)
    theta = posterior.sample(draw_key, x, draws)
    if theta.ndim != 2:
        raise ValueError("x: expected one observation, got a batch")
    valid = simulate_at_draws(simulate_key, posterior, simulator, theta, progress)
    columns = reorder_columns("x", x, posterior.columns)
    batch, _ = as_batch(columns, observation_shape(valid.x), posterior.missing)
    if posterior.missing.can_miss is not None:
        lacking = jax.tree.map(_lacking_as, valid.x, batch)
        valid = unchecked_simulations(valid.theta, lacking, valid.valid, missing=True)
    return dataclasses.replace(
        _compare(valid.x, batch, draws - len(valid)),
        embedding_p=_embedding_p(posterior, valid.x, batch),
        discrepancies=evaluate_discrepancies(traced, posterior.prior, valid, batch),
    )


def _lacking_as(simulated: Any, observed: Any) -> Any:
    """Hide the entries of simulations (n, *event) that an observation (1, *event) lacks."""
    missing = np.isnan(np.asarray(observed, float))
    return np.where(missing, np.nan, np.asarray(simulated)) if missing.any() else simulated


def simulate_at_draws(
    key: Key,
    posterior: AbstractPosterior,
    simulator: Simulator,
    theta: Array | np.ndarray,
    progress: bool,
) -> Simulations:
    """Simulate at posterior draws (n, D); return the simulations that succeeded.

    Raises:
        SimulationFailed: Fewer than half of the simulations succeeded, or fewer than 100.
    """
    draws = len(theta)
    valid = simulate_at(
        key,
        posterior.prior,
        simulator,
        theta,
        missing=posterior.missing.simulates_gaps,
        progress=progress,
    ).only_valid()
    if len(valid) < max(MIN_DRAWS, draws // 2):
        raise SimulationFailed(
            f"{draws - len(valid)} of {draws} simulations at draws of the posterior failed: too "
            "few left to compare with"
        )
    return valid


def _compare(simulated: Obs, observed: Obs, num_failed: int) -> Predictive:
    """Compare one observation (1, *event) with simulations (n, *event)."""
    present = ~np.isnan(rows_on_host(observed)[0])
    if not present.any():
        raise ValueError("x: expected at least one entry that is present, got none")
    has_missing = bool(np.isnan(rows_on_host(simulated)).any())
    standardiser = fit_standardiser(simulated, has_missing=has_missing)
    # a common offset and scale do not change the ranks
    simulated = standardiser.subtract_origin(simulated)
    observed = standardiser.subtract_origin(observed)
    standardiser = standardiser._replace(origin=None)
    simulated_rows, observed_row = map(np.asarray, map(flatten_rows, (simulated, observed)))
    # an entry that a simulation lacks counts half as below and half as above
    simulated_rows = np.where(np.isnan(simulated_rows), observed_row, simulated_rows)
    features = _filled(np.asarray(standardiser(simulated)), present)
    observed_features = np.asarray(standardiser(observed))[0, : len(present)][present]
    names = entry_labels(observation_shape(observed))
    return Predictive(
        labels=tuple(names[int(i)] for i in np.flatnonzero(present)),
        entry_p=two_sided_p_values(simulated_rows[:, present], observed_row[:, present]),
        distance_p=_distance_p(features, observed_features),
        observed=observed_features,
        simulated=features,
        num_failed=num_failed,
    )


def _filled(features: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Return the features of the entries that the observation has, shape (n, P).

    A feature that a simulation lacks is that of another simulation, so that its spread is right.
    """
    values, masks = features[:, : len(present)], features[:, len(present) :]
    if not masks.shape[1]:
        return values[:, present]
    filled = values.copy()
    for column in np.flatnonzero(present & (masks == 0.0).any(axis=0)):
        lacks = masks[:, column] == 0.0
        others = values[~lacks, column]
        filled[lacks, column] = np.resize(others, lacks.sum()) if len(others) else 0.0
    return filled[:, present]


def _embedding_p(posterior: AbstractPosterior, simulated: Obs, observed: Obs) -> float | None:
    """Return `_distance_p` of the embedding's output; None if there is no embedding."""
    spaces = posterior.spaces(observed)
    # In a composed posterior, a data set is several observations, each with its own output.
    if len(spaces) < 2 or len(spaces[1]) != 1:
        return None
    simulations = np.asarray(posterior.spaces(simulated)[1], float)
    return _distance_p(simulations, np.asarray(spaces[1][0], float))


def _distance_p(simulated: np.ndarray, observed: np.ndarray) -> float:
    """Return the share of simulations at least as far from the mean as the observation.

    The first half of the simulations (n, C) gives mean and covariance; the second half gives the
    distances that the observation is compared with.
    """
    from sklearn.covariance import LedoitWolf

    half = len(simulated) // 2
    model = LedoitWolf().fit(simulated[:half])
    distances = model.mahalanobis(np.concatenate([simulated[half:], observed[None]]))
    return float((1 + np.sum(distances[:-1] >= distances[-1])) / len(distances))
