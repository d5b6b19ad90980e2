"""Test whether an observation is typical of the training simulations; find its unusual entries.

Public names: `Misspecification`, `Anomalies`, `test_one`, `test_many`, `require_level`.

Source: Schmitt et al. 2021, "Detecting Model Misspecification in Amortized Bayesian Inference with
Neural Networks" (arXiv:2112.08866).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import ndtr

from sbi_flows.core.labels import first_names
from sbi_flows.core.tables import p_text, table
from sbi_flows.observations.typicality import Typicality
from sbi_flows.plots.typicality import entries


@dataclasses.dataclass(frozen=True, repr=False)
class Misspecification:
    """Result of the typicality test for one observation.

    The p-value is computed from the rank of the observation among reference simulations. Reference
    simulations were not used to compute means, covariances and ranks, but they were used to train
    the standardiser and the embedding. If an observation comes from the simulator, it is flagged
    with probability `level`. An observation that is not flagged may still come from another
    simulator.

    Attributes:
        p_value: Joint p-value of all tests.
        tests: P-value of each test, by name. The statistics of the tests are: the most extreme
            entry; the largest residual of an entry from its prediction by the other entries; the
            Mahalanobis distance and the maximum mean discrepancy (MMD) of the observation; and, if
            there is an embedding, the Mahalanobis distance and the MMD of the embedding's output.
        labels: Names of the C entries of the flattened observation.
        off: Names of the unusual entries, most extreme first. An entry is unusual if it is more
            extreme than a limit. At most about a fraction `level` of the simulations has any entry
            beyond its limit.
        z: Entries in standard deviations from the mean of the simulations, shape (C,). Positive,
            skewed data are replaced by their logarithms first. Values beyond three are compressed.
        entry_p: Two-sided tail probability of each entry among the simulations, shape (C,).
        conditional_z: Residual of each entry from its linear prediction by the other entries, in
            units of the prediction's standard error, shape (C,).
        conditional_p: Two-sided tail probability of `conditional_z`, shape (C,).
        level: Significance level.
        least_p: Smallest p-value that the number of simulations allows. If it is above `level`, no
            observation can be flagged.
        bands: Quantiles of z in the simulations, at 0.5, 5, 50, 95 and 99.5%, shape (5, C).
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
        """Whether the observation is atypical: its p-value is at most `level`."""
        return self.p_value <= self.level

    def __repr__(self) -> str:
        """Return the text of `summary`."""
        return self.summary()

    @property
    def verdict(self) -> str:
        """Result of the test in one sentence."""
        if self.least_p > self.level:
            result = "too few simulations to flag an observation"
            return f"{result} at a level of {self.level:g}: no p-value is below {self.least_p:.2g}"
        where = f": {first_names(self.off)}" if self.off else ""
        result = f"not typical of the simulations{where}" if self.flagged else "typical"
        return f"{result} (p {p_text(self.p_value)}, level {self.level:g})"

    def summary(self, most: int = 10) -> str:
        """Return the verdict, the tests, and a table of the `most` most extreme entries."""
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
        """Indices of the entries: first the unusual ones, then the others, sorted by p-value."""
        size = np.maximum(np.abs(self.z), np.abs(self.conditional_z))
        off = np.isin(self.labels, self.off)
        return np.lexsort((-size, np.minimum(self.entry_p, self.conditional_p), ~off))

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a dict of numbers and strings, which can be written as JSON."""
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
        """Plot the `most` most extreme entries together with quantiles of the simulations."""
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
    """Result of the typicality test for each of many observations.

    Attributes:
        p_value: P-value as in `Misspecification`, shape (B,), at least 1 / (R + 1) for R reference
            simulations.
        score: Largest of the scaled test statistics, shape (B,). Each statistic is scaled so that
            in the simulations its median is 0 and its 95% quantile is 1. The score orders
            observations that have equal p-values; it has no upper limit.
        tests: P-value of each test, by name, shape (B,).
    """

    p_value: np.ndarray
    score: np.ndarray
    tests: Mapping[str, np.ndarray]

    def flagged(self, level: float = 0.05) -> np.ndarray:
        """Return whether each observation is atypical at this level, bool of shape (B,)."""
        require_level(level)
        return self.p_value <= level

    def __repr__(self) -> str:
        """Show the number of flagged observations, and the number expected by chance."""
        count, flagged = len(self.p_value), int(np.sum(self.flagged()))
        chance = f"{0.05 * count:.3g} expected by chance"
        return f"Anomalies({flagged} of {count} flagged at .05, {chance})"


def test_one(
    typicality: Typicality, values: Sequence[np.ndarray], labels: tuple[str, ...], level: float
) -> Misspecification:
    """Test one observation.

    Args:
        typicality: Distribution of the training simulations.
        values: Features (1, C) and, if there is an embedding, the embedding's output (1, F).
        labels: Names of the features, length C.
        level: Significance level of the test.

    References:
        Detecting Model Misspecification, arXiv:2112.08866.
    """
    require_level(level)
    result, space = typicality.test(values), typicality.spaces[0]
    z = space.standard(values[0])
    errors = space.errors(z)[1]
    scores = space.marginal_scores(z)[0], space.conditional_scores(errors)[0]
    unusual = np.flatnonzero(typicality.unusual(values[0], level)[0])
    largest = np.maximum(*map(np.abs, scores))[unusual]
    least = 1.0 / (1 + len(space.rows))
    entry_p, conditional_p = (np.maximum(2.0 * ndtr(-np.abs(s)), least) for s in scores)
    return Misspecification(
        p_value=float(result.p_value[0]),
        tests={name: float(p[0]) for name, p in result.tests.items()},
        labels=labels,
        off=tuple(labels[i] for i in unusual[np.argsort(-largest)]),
        z=z[0],
        entry_p=entry_p,
        conditional_z=errors[0],
        conditional_p=conditional_p,
        level=level,
        least_p=typicality.least_p,
        bands=np.quantile(space.rows, (0.005, 0.05, 0.5, 0.95, 0.995), axis=0),
    )


def test_many(
    typicality: Typicality, values: Sequence[np.ndarray], present: np.ndarray | None = None
) -> Anomalies:
    """Test each observation of a batch.

    Args:
        typicality: Distribution of the training simulations.
        values: Features (B, C) and, if there is an embedding, the embedding's output (B, F).
        present: Fraction of entries that each observation has, shape (B,), or None.
    """
    result = typicality.test(values, present)
    return Anomalies(p_value=result.p_value, score=result.score, tests=result.tests)


def require_level(level: float) -> None:
    """Raise ValueError unless the level is a number between 0 and 1."""
    if not isinstance(level, int | float | np.number) or not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
