"""Is an observation one that the simulator could have made? If not, which of its entries are off?

Public names: `misspecification`, `Misspecification`, `anomalies`, `Anomalies`.

Source: Schmitt et al. 2021, "Detecting Model Misspecification in Amortized Bayesian Inference with
Neural Networks" (arXiv:2112.08866).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import ndtr

from sbi_flows.core.checks import require_object
from sbi_flows.core.tables import p_text, table
from sbi_flows.core.typing import Obs
from sbi_flows.observations.standardise import entry_labels
from sbi_flows.observations.typicality import Typicality
from sbi_flows.posteriors.direct import Posterior


@dataclasses.dataclass(frozen=True, repr=False)
class Misspecification:
    """How typical one observation is of the training simulations.

    A p-value is the rank of the observation among simulations that nothing was fitted to, whatever
    their distribution: of observations that the simulator makes, a share of `level` is flagged. An
    observation that is not flagged may still come from another simulator.

    Attributes:
        p_value: Of all tests together.
        tests: P-value of each test alone: the entry that is farthest out; the one that is farthest
            from what the others predict; the Mahalanobis distance and the maximum mean discrepancy
            of the whole, and these two in the output of an embedding.
        labels: Names of the entries of a flattened observation (C,).
        off: Names of the entries that are off, the worst first: farther out than any entry is in
            all but a share of about `level` of the simulations.
        z: Entries in standard deviations from the mean of the simulations, shape (C,): those of
            positive, skew data as logarithms, those beyond three standard deviations compressed.
        entry_p: Two-sided tail probability of each entry among simulations, shape (C,).
        conditional_z: Entries less what the others predict them to be, in units of the error of
            that prediction (a linear one), shape (C,).
        conditional_p: Two-sided tail probability of that.
        level: Probability of flagging an observation that the simulator made.
        least_p: The smallest p-value that the number of simulations allows; there is nothing to
            flag where it is above `level`.
        bands: Quantiles at 0.5, 5, 50, 95 and 99.5% of the simulations' z, shape (5, C).
    """

    p_value: float
    tests: Mapping[str, float]
    labels: tuple[str, ...]
    off: tuple[str, ...]
    z: np.ndarray
    entry_p: np.ndarray
    conditional_z: np.ndarray
    conditional_p: np.ndarray
    level: float
    least_p: float
    bands: np.ndarray

    @property
    def flagged(self) -> bool:
        """Whether the observation is not typical at the level."""
        return self.p_value <= self.level

    def __repr__(self) -> str:
        """The text of `summary`."""
        return self.summary()

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.least_p > self.level:
            said = "too few simulations to flag an observation"
            return f"{said} at a level of {self.level:g}: no p-value is below {self.least_p:.2g}"
        where = f": {_some(self.off)}" if self.off else ""
        said = f"not typical of the simulations{where}" if self.flagged else "typical"
        return f"{said} (p {p_text(self.p_value)}, level {self.level:g})"

    def summary(self, most: int = 10) -> str:
        """The verdict, each test, and the entries that are farthest out, at most so many."""
        tests = "; ".join(f"{name} p {p_text(p)}" for name, p in self.tests.items())
        order = self.order[:most]
        columns = {
            "z": [f"{self.z[i]:+.2f}" for i in order],
            "p": [p_text(float(self.entry_p[i])) for i in order],
            "z given others": [f"{self.conditional_z[i]:+.2f}" for i in order],
            "p ": [p_text(float(self.conditional_p[i])) for i in order],
            "": ["off" if self.labels[i] in self.off else "" for i in order],
        }
        return f"{self.verdict}\n{tests}\n{table([self.labels[i] for i in order], columns)}"

    @property
    def order(self) -> np.ndarray:
        """Places of the entries, the farthest out first: those that are off, then by p-value."""
        size = np.maximum(np.abs(self.z), np.abs(self.conditional_z))
        off = np.isin(self.labels, self.off)
        return np.lexsort((-size, np.minimum(self.entry_p, self.conditional_p), ~off))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, fit for JSON."""
        entries = ("z", "entry_p", "conditional_z", "conditional_p")
        arrays = [getattr(self, name).tolist() for name in entries]
        named = [dict(zip(self.labels, values, strict=True)) for values in arrays]
        return {
            "verdict": self.verdict,
            "flagged": self.flagged,
            "p_value": self.p_value,
            "tests": dict(self.tests),
            "off": list(self.off),
            "level": self.level,
            "least_p": self.least_p,
            **dict(zip(entries, named, strict=True)),
        }

    def plot(self, most: int = 20) -> Any:
        """The entries that are farthest out over the bulk of the simulations; a figure."""
        from sbi_flows.plots.typicality import entries

        at = self.order[:most]
        return entries(
            [self.labels[i] for i in at],
            {"marginal": self.z[at], "given the others": self.conditional_z[at]},
            bands=self.bands[:, at],
            off=np.isin(self.labels, self.off)[at],
            title=self.verdict,
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Anomalies:
    """How typical each of many observations is of the training simulations.

    Attributes:
        p_value: As of `Misspecification`, shape (B,): of observations that the simulator makes, a
            share of p is below p. None is below one over the number of simulations they rank among.
        score: Where the worst test's statistic lies, shape (B,): 0 at its median over the
            simulations, 1 at their 95% point, without an upper end. It orders what p-values tie.
        tests: P-value of each test alone, shape (B,).
    """

    p_value: np.ndarray
    score: np.ndarray
    tests: Mapping[str, np.ndarray]

    def flagged(self, level: float = 0.05) -> np.ndarray:
        """Which observations are not typical at a level, shape (B,)."""
        _check_level(level)
        return self.p_value <= level

    def __repr__(self) -> str:
        """How many are flagged, and how many would be by chance."""
        count, found = len(self.p_value), int(np.sum(self.flagged()))
        chance = f"{0.05 * count:.3g} expected by chance"
        return f"Anomalies({found} of {count} flagged at .05, {chance})"


def misspecification(posterior: Posterior, x: Obs, *, level: float = 0.05) -> Misspecification:
    """What `Posterior.misspecification` gives.

    Args:
        posterior: The posterior.
        x: One observation.
        level: Probability of flagging an observation that the simulator made.

    Raises:
        ValueError: x is a batch or does not fit, the level is not between 0 and 1, or the posterior
            was made without its training simulations.

    References:
        Detecting Model Misspecification, arXiv:2112.08866.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0.0, 1.0).expand([2])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 1000, progress=False)
        >>> npe = sf.NPE(prior, sf.MAF(), training=sf.Training(max_epochs=1), members=1)
        >>> posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
        >>> found = posterior.misspecification(jax.numpy.array([0.3, 6.0]))
        >>> found.flagged, found.off
        (True, ('x[1]',))
    """
    known = _known(posterior, level)
    if not posterior.is_single(x):
        raise ValueError("x: expected one observation, got a batch; sf.anomalies takes batches")
    values = posterior.spaces(x)
    judged, space = known.judged(values), known.spaces[0]
    z = space.standard(values[0])
    errors = space.errors(z)[1]
    scores = space.marginal_scores(z)[0], space.conditional_scores(errors)[0]
    labels = entry_labels(posterior.observation)
    places = np.flatnonzero(known.off(values[0], level)[0])
    worst = np.maximum(*map(np.abs, scores))[places]
    least = 1.0 / (1 + len(space.rows))
    entry_p, conditional_p = (np.maximum(2.0 * ndtr(-np.abs(s)), least) for s in scores)
    return Misspecification(
        p_value=float(judged.p_value[0]),
        tests={name: float(p[0]) for name, p in judged.tests.items()},
        labels=labels,
        off=tuple(labels[i] for i in places[np.argsort(-worst)]),
        z=z[0],
        entry_p=entry_p,
        conditional_z=errors[0],
        conditional_p=conditional_p,
        level=level,
        least_p=known.least_p,
        bands=np.quantile(space.rows, (0.005, 0.05, 0.5, 0.95, 0.995), axis=0),
    )


def anomalies(posterior: Posterior, xs: Obs) -> Anomalies:
    """Judge many observations at once by how typical they are of the training simulations.

    Args:
        posterior: The posterior.
        xs: A batch of observations (B, *event).

    Returns:
        P-values and scores; printing says how many are flagged.

    Raises:
        ValueError: xs is a single observation or does not fit, or the posterior was made without
            its training simulations.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0.0, 1.0).expand([2])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 1000, progress=False)
        >>> npe = sf.NPE(prior, sf.MAF(), training=sf.Training(max_epochs=1), members=1)
        >>> posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
        >>> sf.anomalies(posterior, jax.numpy.array([[0.3, 0.5], [0.3, 6.0]])).flagged()
        array([False,  True])
    """
    known = _known(posterior, 0.5)
    if posterior.is_single(xs):
        raise ValueError("xs: expected a batch, got one observation; see misspecification")
    judged = known.judged(posterior.spaces(xs))
    return Anomalies(p_value=judged.p_value, score=judged.score, tests=judged.tests)


def _known(posterior: Posterior, level: float) -> Typicality:
    require_object("posterior", posterior, Posterior, "an sf.Posterior")
    _check_level(level)
    if posterior.typicality is None:
        raise ValueError("posterior: expected one that knows its simulations, got none")
    return posterior.typicality


def _check_level(level: float) -> None:
    if not isinstance(level, int | float | np.number) or not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
