"""Do simulations at draws of the posterior look like the observation they were inferred from?

Public names: `predictive_check`, `Predictive`.

Source: Gelman, Meng & Stern 1996, "Posterior predictive assessment of model fitness via realized
discrepancies" (Statistica Sinica 6:733).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from sbi_flows.checks import require_count
from sbi_flows.data import observation_shape
from sbi_flows.diagnostics.ranks import PosteriorLike
from sbi_flows.diagnostics.tables import p_text, table
from sbi_flows.errors import SimulationFailed
from sbi_flows.posteriors import as_batch
from sbi_flows.simulating import simulate_at
from sbi_flows.standardise import entry_labels, fit_standardiser, flatten_rows
from sbi_flows.typing import Key, Obs, Simulator

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
    """

    labels: tuple[str, ...]
    entry_p: np.ndarray
    distance_p: float
    observed: np.ndarray
    simulated: np.ndarray
    num_failed: int

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
        head += f"worst of {len(self.labels)} entries p {p_text(self.worst_p)} (Bonferroni)"
        if self.num_failed:
            head += f"; {self.num_failed} simulations failed and were left out"
        order = np.argsort(self.entry_p, kind="stable")[:most]
        columns = {
            "p": [p_text(float(self.entry_p[i])) for i in order],
            "observed (sd)": [f"{self.observed[i]:+.2f}" for i in order],
        }
        return f"{head}\n{table([self.labels[i] for i in order], columns)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, fit for JSON; the simulations are left out."""
        return {
            "entry_p": {m: float(p) for m, p in zip(self.labels, self.entry_p, strict=True)},
            "worst_p": self.worst_p,
            "distance_p": self.distance_p,
            "num_simulations": len(self.simulated),
            "num_failed": self.num_failed,
        }

    def plot(self, ax: Any = None) -> Any:
        """Bands of the simulations with the observation over them, entry by entry; the axes."""
        from sbi_flows.plots import predictive

        label = ["standardised"]
        return predictive(self.observed, self.simulated, time_label="entry", labels=label, ax=ax)


def predictive_check(
    key: Key,
    posterior: PosteriorLike,
    simulator: Simulator,
    x: Obs,
    *,
    draws: int = 1_000,
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
        progress: Show a progress bar.

    Returns:
        The p-values; printing shows them.

    Raises:
        ValueError: x is a batch or has another shape than a simulation, or there are too few draws.
        SimulationFailed: Fewer than half of the simulations, or than 100, succeeded.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0, 1).expand([2])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 500)
        >>> quick = sf.Training(max_epochs=2)
        >>> posterior, _ = sf.NPE(prior, training=quick, members=1).fit(jax.random.key(1), sims)
        >>> found = sf.predictive_check(
        ...     jax.random.key(2), posterior, noisy, jax.numpy.array([0.3, -9.0])
        ... )
        >>> found.entry_p[0] > 0.05, found.entry_p[1] < 0.05, found.distance_p < 0.05
        (np.True_, np.True_, True)
    """
    require_count(MIN_DRAWS, draws=draws)
    draw_key, simulate_key = jax.random.split(key)
    theta = posterior.sample(draw_key, x, draws)
    if theta.ndim != 2:
        raise ValueError("x: expected one observation, got a batch")
    sims = simulate_at(simulate_key, posterior.prior, simulator, theta, progress=progress)
    valid = sims.only_valid()
    if len(valid) < max(MIN_DRAWS, draws // 2):
        raise SimulationFailed(
            f"{draws - len(valid)} of {draws} simulations at draws of the posterior failed: too "
            "few left to compare with"
        )
    batch, _ = as_batch(x, observation_shape(valid.x))
    return _compared(valid.x, batch, draws - len(valid))


def _compared(simulated: Obs, observed: Obs, num_failed: int) -> Predictive:
    """Compare simulations (n, *event) with a batch of one observation."""
    standardiser = fit_standardiser(simulated)
    rows, own = flatten_rows(simulated), flatten_rows(observed)
    below = np.mean(np.asarray(rows < own), axis=0) + np.mean(np.asarray(rows <= own), axis=0)
    # the middle of the ties, and never beyond what so many simulations can say
    position = (0.5 * below * len(rows) + 0.5) / (len(rows) + 1)
    features = np.asarray(standardiser(simulated))
    feature = np.asarray(standardiser(observed))[0]
    return Predictive(
        labels=entry_labels(observation_shape(observed)),
        entry_p=np.minimum(1.0, 2.0 * np.minimum(position, 1.0 - position)),
        distance_p=_distance_p(features, feature),
        observed=feature,
        simulated=features,
        num_failed=num_failed,
    )


def _distance_p(simulated: np.ndarray, observed: np.ndarray) -> float:
    """Share of one half of the rows that are as far as the observation, by the other's moments."""
    from sklearn.covariance import LedoitWolf

    half = len(simulated) // 2
    fitted, judged = simulated[:half], simulated[half:]
    model = LedoitWolf().fit(fitted)
    far = model.mahalanobis(np.concatenate([judged, observed[None]]))
    return float((1 + np.sum(far[:-1] >= far[-1])) / (1 + len(judged)))
