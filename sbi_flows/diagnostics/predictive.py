"""Do simulations at draws of the posterior look like the observation they were inferred from?

Public names: `predictive_check`, `Predictive`, `simulated_at`.

Source: Gelman, Meng & Stern 1996, "Posterior predictive assessment of model fitness via realized
discrepancies" (Statistica Sinica 6:733).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

from sbi_flows.core.checks import require_count
from sbi_flows.core.errors import SimulationFailed
from sbi_flows.core.tables import p_text, table
from sbi_flows.core.typing import Key, Obs, Simulator
from sbi_flows.diagnostics.discrepancies import (
    Discrepancies,
    Discrepancy,
    checked,
    judged,
    two_sided,
)
from sbi_flows.observations.standardise import entry_labels, fit_standardiser, flatten_rows
from sbi_flows.posteriors.base import PosteriorLike, innermost
from sbi_flows.posteriors.direct import Posterior, as_batch
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.simulate import simulate_at
from sbi_flows.simulations.simulations import Simulations, observation_shape

MIN_DRAWS = 100


@dataclasses.dataclass(frozen=True, repr=False)
class Predictive:
    """What `predictive_check` found. Small p-values say that the model does not make such data.

    The data were used twice, for the posterior and for its check: p-values of a correct model crowd
    around one half rather than being uniform, so a small one says more than its size.

    Attributes:
        labels: Names of the entries of a flattened observation (C,).
        entry_p: Two-sided tail probability of each entry among the simulated ones, shape (C,).
        distance_p: Share of simulations at least as far from their bulk as the observation is, by
            the Mahalanobis distance of all entries together.
        observed: The observation in units of the simulations, shape (C,): their median is 0, their
            interquartile range over 1.349 is 1, and values beyond 3 are on a logarithmic scale.
        simulated: The simulations, likewise, shape (n, C).
        num_failed: Simulations left out because they failed.
        embedding_p: As `distance_p`, in the output of the posterior's embedding (of the first
            member); None without one.
        discrepancies: What the user's own discrepancies say; None without any.
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
        """The least of the entries' p-values, times their number: Bonferroni's correction."""
        return min(1.0, float(self.entry_p.min()) * len(self.entry_p))

    def __repr__(self) -> str:
        """The text of `summary`."""
        return self.summary()

    def summary(self, most: int = 10) -> str:
        """Both p-values, and the entries that fit worst, at most so many."""
        n = len(self.simulated)
        head = f"predictive check with {n} simulations: distance p {p_text(self.distance_p)}, "
        if self.embedding_p is not None:
            head += f"in the embedding {p_text(self.embedding_p)}, "
        head += f"worst of {len(self.labels)} entries p {p_text(self.worst_p)} (Bonferroni)"
        if self.num_failed:
            head += f"; {self.num_failed} simulations failed and were left out"
        order = np.argsort(self.entry_p, kind="stable")[:most]
        columns = {
            "p": [p_text(float(self.entry_p[i])) for i in order],
            "observed (sd)": [f"{self.observed[i]:+.2f}" for i in order],
        }
        text = f"{head}\n{table([self.labels[i] for i in order], columns)}"
        return text if self.discrepancies is None else f"{text}\n{self.discrepancies.summary()}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, fit for JSON; the simulations are left out."""
        tests = self.discrepancies
        return {
            "entry_p": {m: float(p) for m, p in zip(self.labels, self.entry_p, strict=True)},
            "worst_p": self.worst_p,
            "distance_p": self.distance_p,
            "embedding_p": self.embedding_p,
            "discrepancies": None if tests is None else tests.to_dict(),
            "num_simulations": len(self.simulated),
            "num_failed": self.num_failed,
        }

    def plot(self, ax: Any = None) -> Any:
        """Bands of the simulations with the observation over them, entry by entry; the axes."""
        from sbi_flows.plots.posterior import predictive

        label = ["standardised"]
        return predictive(self.observed, self.simulated, time_label="entry", labels=label, ax=ax)


def predictive_check(
    key: Key,
    posterior: PosteriorLike,
    simulator: Simulator,
    x: Obs,
    *,
    draws: int = 1_000,
    discrepancies: Mapping[str, Discrepancy] | None = None,
    progress: bool = True,
) -> Predictive:
    """Simulate at draws of the posterior, and compare with the observation.

    It asks whether the model can make such data at all, where `check` asks whether the posterior is
    right for data that the model makes.

    Args:
        key: Random key.
        posterior: The posterior.
        simulator: `(key, theta) -> x`.
        x: One observation.
        draws: Number of draws, one simulation each; at least 100.
        discrepancies: What to compare beside the entries, by name: a number of one observation,
            `lambda x: x.max()`, or of an observation and the parameters as the simulator gets them,
            `lambda x, theta: ...`, which is compared draw by draw. JAX has to be able to trace it.
        progress: Show a progress bar.

    Returns:
        The p-values; printing shows them.

    Raises:
        ValueError: x is a batch or has another shape than a simulation, or there are too few draws;
            or a discrepancy is no function of one or two arguments that gives one real number.
        SimulationFailed: Fewer than half of the simulations, or than 100, succeeded.
        SbiFlowsError: A discrepancy gave NaN.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0, 1).expand([2])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 500)
        >>> quick = sf.Training(max_epochs=2)
        >>> posterior, _ = sf.NPE(prior, training=quick, members=1).fit(jax.random.key(1), sims)
        >>> found = sf.predictive_check(
        ...     jax.random.key(2), posterior, noisy, jax.numpy.array([0.3, -9.0]),
        ...     discrepancies={"range": lambda x: x.max() - x.min()},
        ... )
        >>> found.entry_p[0] > 0.05, found.entry_p[1] < 0.05, found.distance_p < 0.05
        (np.True_, np.True_, True)
        >>> float(found.discrepancies.p[0]) < 0.05
        True
    """
    require_count(MIN_DRAWS, draws=draws)
    tests = checked(discrepancies, posterior.prior, x)
    draw_key, simulate_key = jax.random.split(key)
    theta = posterior.sample(draw_key, x, draws)
    if theta.ndim != 2:
        raise ValueError("x: expected one observation, got a batch")
    valid = simulated_at(simulate_key, posterior.prior, simulator, theta, progress)
    batch, _ = as_batch(x, observation_shape(valid.x))
    found = _compared(valid.x, batch, draws - len(valid))
    return dataclasses.replace(
        found,
        embedding_p=_embedding_p(posterior, valid.x, batch),
        discrepancies=judged(tests, posterior.prior, valid, batch),
    )


def simulated_at(
    key: Key, prior: Prior, simulator: Simulator, theta: Array, progress: bool
) -> Simulations:
    """The simulations at draws of a posterior (n, D) that succeeded.

    Raises:
        SimulationFailed: Fewer than half of them, or than 100.
    """
    draws = len(theta)
    valid = simulate_at(key, prior, simulator, theta, progress=progress).only_valid()
    if len(valid) < max(MIN_DRAWS, draws // 2):
        raise SimulationFailed(
            f"{draws - len(valid)} of {draws} simulations at draws of the posterior failed: too "
            "few left to compare with"
        )
    return valid


def _compared(simulated: Obs, observed: Obs, num_failed: int) -> Predictive:
    """Compare simulations (n, *event) with a batch of one observation."""
    standardiser = fit_standardiser(simulated)
    rows, own = flatten_rows(simulated), flatten_rows(observed)
    features = np.asarray(standardiser(simulated))
    feature = np.asarray(standardiser(observed))[0]
    return Predictive(
        labels=entry_labels(observation_shape(observed)),
        entry_p=two_sided(np.asarray(rows), np.asarray(own)),
        distance_p=_distance_p(features, feature),
        observed=feature,
        simulated=features,
        num_failed=num_failed,
    )


def _embedding_p(posterior: PosteriorLike, simulated: Obs, observed: Obs) -> float | None:
    """`_distance_p` in the output of the embedding, where the posterior has one."""
    posterior = innermost(posterior)
    if not isinstance(posterior, Posterior) or posterior.blueprints[0].embedding is None:
        return None
    sets = (posterior.spaces(x)[1] for x in (simulated, observed))
    simulations, (own,) = (np.asarray(rows, float) for rows in sets)
    return _distance_p(simulations, own)


def _distance_p(simulated: np.ndarray, observed: np.ndarray) -> float:
    """Share of one half of the rows that are as far as the observation, by the other's moments."""
    from sklearn.covariance import LedoitWolf

    half = len(simulated) // 2
    fitted, judged = simulated[:half], simulated[half:]
    model = LedoitWolf().fit(fitted)
    far = model.mahalanobis(np.concatenate([judged, observed[None]]))
    return float((1 + np.sum(far[:-1] >= far[-1])) / (1 + len(judged)))
