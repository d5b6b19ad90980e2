"""Typicality: distance between observations and the training simulations.

Public names: `Typicality`, `TypicalityTest`, `fit_typicality`.

The training rows are split into three parts. Means and covariances are computed from the first
part, ranks and kernels from the second part. The third part is the reference: it gives the
distribution of each statistic for observations from the simulator. The p-value of an observation
follows from its rank among the reference rows, so it is exact for any distribution of the features.
The standardiser and the embedding were fitted to all training rows, including the reference rows.
If the embedding over-fits strongly, the p-values of the two tests of its output may be too small.

Source: Schmitt et al. 2021, "Detecting Model Misspecification in Amortized Bayesian Inference with
Neural Networks" (arXiv:2112.08866); Vovk, Gammerman & Shafer 2005, "Algorithmic Learning in a
Random World", for p-values by rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from sbi_flows.core.typing import Key
from sbi_flows.observations.spaces import Moments, Space, fit_space
from sbi_flows.observations.standardise import Standardiser

MAX_REFERENCE_ROWS, MAX_RANK_ROWS, MAX_MOMENT_ROWS = 2_000, 2_000, 4_000
"""Maximum number of rows in each of the three parts of the training rows."""

MAX_PART_ENTRIES = 2**20
"""Maximum number of entries (rows times features) in each part; a few rows are always allowed."""

NEIGHBOURS = 400
"""Number of reference rows with which an observation is compared if entries can be missing."""

MAX_LOADED_ENTRIES = 2**26
"""Maximum number of entries of features in all parts; a thousand rows are always allowed."""

MIN_RELATIVE_SCALE = 1e-5
"""Minimum standard deviation relative to a feature's magnitude; below it, rounding dominates."""

BATCH_ROWS = 256
"""Number of observations that are tested together."""

Summarise = Callable[[np.ndarray], tuple[np.ndarray, ...]]
"""Function that takes features (B, C) and returns the values in each space.

The values are the features, or the fixed summaries of an embedding, and, if the embedding has a
network, its output (B, F).
"""


class TypicalityTest(NamedTuple):
    """Result of the tests for a batch of observations.

    Attributes:
        p_value: Joint p-value of all statistics, shape (B,).
        tests: P-value of each statistic, by name, shape (B,).
        score: Largest of the scaled statistics, shape (B,). Each statistic is scaled so that in the
            simulations its median is 0 and its 95% quantile is 1.
    """

    p_value: np.ndarray
    tests: Mapping[str, np.ndarray]
    score: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Typicality:
    """Distribution of the training simulations, with which observations are compared.

    Attributes:
        spaces: The feature space and, if there is an embedding, the space of the embedding's
            output. If there are several embeddings, the one of the first member is used.
        reference: The S statistics of each of the R reference rows, shape (R, S).
        present: Fraction of entries that each reference row has, shape (R,); None if observations
            must be complete. An observation is compared with the reference rows whose fractions
            are nearest to its own, because the statistics depend on how much is missing.
    """

    spaces: tuple[Space, ...]
    reference: np.ndarray
    present: np.ndarray | None = None

    @property
    def least_p(self) -> float:
        """Smallest possible p-value, 1 / (R + 1) for R rows that observations are compared with."""
        count = len(self.reference)
        return 1.0 / (1 + (count if self.present is None else min(count, NEIGHBOURS)))

    def given(self, present: float) -> Typicality:
        """Return the distribution for observations that have this fraction of their entries."""
        if self.present is None:
            return self
        nearest = np.argsort(np.abs(self.present - present), kind="stable")[:NEIGHBOURS]
        return Typicality(self.spaces, self.reference[nearest])

    def test(self, values: Sequence[Any], present: np.ndarray | None = None) -> TypicalityTest:
        """Test a batch of observations.

        Args:
            values: Features (B, C) and, if there is an embedding, the embedding's output (B, F).
            present: Fraction of entries that each observation has, shape (B,); None if observations
                must be complete.
        """
        found = statistics(self.spaces, values)
        if present is None or self.present is None:
            return self._compare(found)
        fractions, group = np.unique(present, return_inverse=True)
        order = [np.flatnonzero(group == i) for i in range(len(fractions))]
        parts = [
            self.given(f)._compare(found[rows]) for f, rows in zip(fractions, order, strict=True)
        ]
        back = np.argsort(np.concatenate(order))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays)[back], *parts)

    def unusual(self, features: Any, level: float = 0.05) -> np.ndarray:
        """Return whether each feature is unusual, bool of shape (B, C).

        A feature is unusual if it is more extreme than a limit. The limit is set so that at most
        a fraction `level` of the reference rows has any unusual feature.
        """
        space = self.spaces[0]
        z = space.standard(features)
        scores = space.marginal_scores(z), space.conditional_scores(space.errors(z)[1])
        # marginal and conditional scores are two tests: each uses half of the level
        ends = np.quantile(self.reference[:, :2], 1.0 - level / 2, axis=0)
        return (np.abs(scores[0]) > ends[0]) | (np.abs(scores[1]) > ends[1])

    def _compare(self, found: np.ndarray) -> TypicalityTest:
        """Test observations with statistics (B, S), ranked among those of the reference rows."""
        ordered, total = np.sort(self.reference, axis=0), len(self.reference)
        p = (1 + _count_as_large(self.reference, found)) / (1 + total)
        middle, end = ordered[total // 2], np.quantile(ordered, 0.95, axis=0)
        spread = np.maximum(end - middle, 1e-12 * (1.0 + np.abs(end)))
        return TypicalityTest(
            p_value=_joint_p_value(self.reference, found, p),
            tests=dict(zip(NAMES[: p.shape[1]], p.T, strict=True)),
            score=np.max((found - middle) / spread, axis=1),
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return all attributes as named arrays."""
        arrays = {"reference": self.reference}
        if self.present is not None:
            arrays["present"] = self.present
        for i, space in enumerate(self.spaces):
            parts = {**space.moments._asdict(), "rows": space.rows}
            arrays |= {f"{i}.{name}": part for name, part in parts.items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Typicality:
        """Rebuild a `Typicality` from the arrays that `to_arrays` returned."""
        count = sum(name.endswith(".rows") for name in arrays)
        spaces = [
            Space(Moments(*(arrays[f"{i}.{m}"] for m in Moments._fields)), arrays[f"{i}.rows"])
            for i in range(count)
        ]
        return cls(tuple(spaces), arrays["reference"], arrays.get("present"))


NAMES = (
    "largest feature",
    "largest given the others",
    "Mahalanobis distance",
    "MMD",
    "Mahalanobis distance, embedded",
    "MMD, embedded",
)
"""Names of the statistics; the last two exist only if there is an embedding."""


def statistics(spaces: Sequence[Space], values: Sequence[Any]) -> np.ndarray:
    """Compute the statistics (B, S) of observations; a large value means an atypical observation.

    References:
        arXiv:2112.08866, equation 6, for the MMD in the space of the embedding's output.
    """
    given = [np.asarray(v) for v in values]
    starts = range(0, len(given[0]), BATCH_ROWS)
    parts = [_statistics(spaces, [v[s : s + BATCH_ROWS] for v in given]) for s in starts]
    return np.concatenate(parts)


def _statistics(spaces: Sequence[Space], values: Sequence[np.ndarray]) -> np.ndarray:
    columns = []
    for i, (space, own) in enumerate(zip(spaces, values, strict=True)):
        z = space.standard(own)
        distance, errors = space.errors(z)
        if i == 0:
            scores = space.marginal_scores(z), space.conditional_scores(errors)
            columns += [np.max(np.abs(s), axis=1) for s in scores]
        columns += [distance, space.discrepancy(z)]
    return np.stack(columns, axis=1)


def fit_typicality(
    key: Key,
    summarise: Summarise,
    standardiser: Standardiser | None,
    features: Array | np.ndarray,
    present: np.ndarray | None = None,
) -> Typicality:
    """Fit the distribution of the training simulations.

    Args:
        key: Random key, which determines how the rows are split into parts.
        summarise: Function of features (B, C) that returns the values in each space.
        standardiser: Standardiser from which the features were computed; None if the first space
            has summaries in place of features.
        features: Features of all training rows, shape (N, C); N must be at least 4.
        present: Fraction of entries that each training row has, shape (N,); None if observations
            must be complete.
    """
    rng = np.random.default_rng([*np.asarray(jax.random.key_data(key)).ravel(), 8])
    width = summarise(np.asarray(features[:1]))[0].shape[1]
    count = min(len(features), max(1_000, MAX_LOADED_ENTRIES // features.shape[1]))
    references, ranks, moments = _part_sizes(count, width)
    rows = rng.permutation(len(features))[: references + ranks + moments]
    values = summarise(np.asarray(features)[rows])
    spaces = []
    for i, part in enumerate(values):
        part = np.asarray(part, float)
        size = np.ones(part.shape[1])
        if i == 0 and standardiser is not None:
            size += np.abs(np.asarray(standardiser.center, float) / np.asarray(standardiser.scale))
        least = MIN_RELATIVE_SCALE * size
        spaces.append(fit_space(part[references + ranks :], part[references:][:ranks], least))
    reference = statistics(spaces, [part[:references] for part in values])
    known = None if present is None else np.asarray(present, np.float64)[rows[:references]]
    return Typicality(tuple(spaces), reference, known)


def _part_sizes(n: int, width: int) -> tuple[int, int, int]:
    """Return the numbers of rows in the three parts (reference, ranks, moments) of n rows."""
    references = min(MAX_REFERENCE_ROWS, n // 2, max(500, MAX_PART_ENTRIES // width))
    ranks = min(MAX_RANK_ROWS, (n - references) // 3, max(16, MAX_PART_ENTRIES // width))
    moments = min(MAX_MOMENT_ROWS, n - references - ranks, max(64, MAX_PART_ENTRIES // width))
    return references, max(ranks, 1), moments


def _joint_p_value(reference: np.ndarray, found: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Combine the p-values (B, S) of the statistics into one joint p-value (B,).

    The smallest of an observation's S p-values is ranked among the smallest p-values of the
    reference rows. An observation from the simulator is exchangeable with the reference rows.
    Each reference row is therefore ranked among the other reference rows and the observation, to
    give its own p-values. This test has more power than a Bonferroni correction, because it
    accounts for the dependence between the statistics.
    """
    total, own = len(reference), _count_as_large(reference, reference)
    out = np.empty(len(found))
    for start in range(0, len(found), BATCH_ROWS):
        part = slice(start, start + BATCH_ROWS)
        least = np.min(own + (found[part, None, :] >= reference), axis=2) / (1 + total)
        out[part] = (1 + np.sum(least <= np.min(p[part], axis=1)[:, None], axis=1)) / (1 + total)
    return out


def _count_as_large(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Count the reference rows with at least as large a value, for each statistic in `found`.

    `reference` has shape (R, S), `found` and the result have shape (B, S).
    """
    ordered = np.sort(reference, axis=0)
    parts = zip(ordered.T, found.T, strict=True)
    below = [np.searchsorted(own, f, side="left") for own, f in parts]
    return len(reference) - np.stack(below, axis=1)
