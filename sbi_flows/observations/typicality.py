"""What the training simulations look like, kept with a posterior, and how far from them data lie.

Public names: `Typicality`, `fit_typicality`, `spaces_of`, `widths`, `LEVEL`.

The rows of a fit are split in three: moments come from the first part, ranks and kernels from the
second, and the third says how large each statistic is when nothing is wrong. A p-value is the
rank of an observation among that third part, so that it is exact whatever the distribution is.

Source: Schmitt et al. 2021, "Detecting Model Misspecification in Amortized Bayesian Inference with
Neural Networks" (arXiv:2112.08866); Vovk, Gammerman & Shafer 2005, "Algorithmic Learning in a
Random World", for p-values by rank.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key
from sbi_flows.densities.conditional import Blueprint, Weights, graph_of
from sbi_flows.observations.spaces import Moments, Space, fit_space
from sbi_flows.observations.standardise import Standardiser

LEVEL = 0.01
"""P-value at which a draw or a density warns; so many observations of a correct model do."""

JUDGED, KEPT, FITTED = 2_000, 2_000, 4_000
"""Most rows of the reference, of those that are kept and of those that moments are taken of."""

ENTRIES = 2**20
"""Entries of each of these parts, unless they are very few rows then."""

ROUNDING = 1e-5
"""Least standard deviation, in units of a feature's size: a constant has rounding errors."""

SEEN = 1_000
"""Observations that are remembered as judged, after which all are forgotten."""

CHUNK = 256
"""Observations that are judged together."""


class Judged(NamedTuple):
    """What the tests say of a batch of observations.

    Attributes:
        p_value: Of all statistics together, shape (B,).
        tests: P-value of each statistic alone, by name, shape (B,).
        score: How far out the worst statistic is, shape (B,): 0 at its median over the simulations,
            1 at their 95% point, and with no upper end.
    """

    p_value: np.ndarray
    tests: Mapping[str, np.ndarray]
    score: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Typicality:
    """Which observations are typical of the training simulations.

    Attributes:
        spaces: That of the features; after it, with an embedding, that of its output (of the first
            member of the first ensemble).
        reference: Statistics of simulations that nothing else here has seen, shape (R, S).
    """

    spaces: tuple[Space, ...]
    reference: np.ndarray
    _seen: set[bytes] = dataclasses.field(default_factory=set)

    @property
    def least_p(self) -> float:
        """The smallest p-value that the number of simulations allows."""
        return 1.0 / (1 + len(self.reference))

    def judged(self, values: Sequence[Any]) -> Judged:
        """Test a batch of observations.

        Args:
            values: Their features (B, C) and, with an embedding, its output (B, F).
        """
        return self._compared(statistics(self.spaces, values))

    def gate(
        self,
        features: Array,
        labels: Callable[[], Sequence[str]],
        values: Callable[[], Any],
        stacklevel: int,
    ) -> None:
        """Warn, once, if an observation is not typical at `LEVEL`.

        Args:
            features: Its features, shape (1, C).
            labels: Gives their names.
            values: Gives what `judged` takes.
            stacklevel: Of the warning, from here to the user's own call.
        """
        name = np.asarray(features).tobytes()
        if name in self._seen or self.least_p > LEVEL:
            return
        if len(self._seen) >= SEEN:
            self._seen.clear()
        self._seen.add(name)
        given = values()
        p = float(self.judged(given).p_value[0])
        if p <= LEVEL:
            off = np.flatnonzero(self.off(given[0])[0]).tolist()
            names = labels()
            where = ", ".join(names[i] for i in off[:5]) + ", ..." * (len(off) > 5)
            warnings.warn(
                f"x: not typical of the training simulations (p {p:.2g}"
                f"{': ' + where if where else ''}); what is learned there is an extrapolation. "
                "posterior.misspecification(x) says more",
                SbiFlowsWarning,
                stacklevel=stacklevel,
            )

    def off(self, features: Any, level: float = 0.05) -> np.ndarray:
        """Which features are off, shape (B, C): beyond what any is in all but few simulations."""
        space = self.spaces[0]
        z = space.standard(features)
        scores = space.marginal_scores(z), space.conditional_scores(space.errors(z)[1])
        # one of the two families at half of the level each
        ends = np.quantile(self.reference[:, :2], 1.0 - level / 2, axis=0)
        return (np.abs(scores[0]) > ends[0]) | (np.abs(scores[1]) > ends[1])

    def _compared(self, found: np.ndarray) -> Judged:
        """Ranks of statistics (B, S) among those of the reference."""
        ordered, total = np.sort(self.reference, axis=0), len(self.reference)
        p = (1 + _beyond(self.reference, found)) / (1 + total)
        middle, end = ordered[total // 2], np.quantile(ordered, 0.95, axis=0)
        spread = np.maximum(end - middle, 1e-12 * (1.0 + np.abs(end)))
        return Judged(
            p_value=_combined(self.reference, found, p),
            tests=dict(zip(NAMES[: p.shape[1]], p.T, strict=True)),
            score=np.max((found - middle) / spread, axis=1),
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as named arrays, from which `from_arrays` makes the same again."""
        arrays = {"reference": self.reference}
        for i, space in enumerate(self.spaces):
            parts = {**space.moments._asdict(), "rows": space.rows}
            arrays |= {f"{i}.{name}": part for name, part in parts.items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Typicality:
        """What `to_arrays` gave as arrays."""
        count = sum(name.endswith(".rows") for name in arrays)
        spaces = [
            Space(Moments(*(arrays[f"{i}.{m}"] for m in Moments._fields)), arrays[f"{i}.rows"])
            for i in range(count)
        ]
        return cls(tuple(spaces), arrays["reference"])


NAMES = (
    "largest feature",
    "largest given the others",
    "Mahalanobis distance",
    "MMD",
    "Mahalanobis distance, embedded",
    "MMD, embedded",
)
"""Names of the statistics; the last two where there is an embedding."""


def statistics(spaces: Sequence[Space], values: Sequence[Any]) -> np.ndarray:
    """Statistics (B, S) of observations, large where they are not typical.

    References:
        MMD in the space of summaries: arXiv:2112.08866, equation 6.
    """
    given = [np.asarray(v) for v in values]
    starts = range(0, len(given[0]), CHUNK)
    parts = [_statistics(spaces, [v[s : s + CHUNK] for v in given]) for s in starts]
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
    key: Key, blueprint: Blueprint, weights: Weights, standardiser: Standardiser, features: Array
) -> Typicality:
    """Summarise training rows.

    Args:
        key: Random key; of the split of the rows, which is made on the host.
        blueprint: What the members are built from, for their embedding.
        weights: Their arrays.
        standardiser: What made the features.
        features: Of all rows, shape (N, C), N at least 4.
    """
    rng = np.random.default_rng([*np.asarray(jax.random.key_data(key)).ravel(), 8])
    width = features.shape[1]
    judged, kept, fitted = _sizes(len(features), width)
    places = rng.permutation(len(features))[: judged + kept + fitted]
    values = spaces_of(blueprint, weights, np.asarray(features)[places])
    size = 1.0 + np.abs(np.asarray(standardiser.center, float) / np.asarray(standardiser.scale))
    spaces = []
    for i, rows in enumerate(values):
        rows = np.asarray(rows, float)
        floor = ROUNDING * size if i == 0 else np.full(rows.shape[1], ROUNDING)
        spaces.append(fit_space(rows[judged + kept :], rows[judged : judged + kept], floor))
    reference = statistics(spaces, [rows[:judged] for rows in values])
    return Typicality(tuple(spaces), reference)


def _sizes(n: int, width: int) -> tuple[int, int, int]:
    """Numbers of rows that are judged, kept and fitted to, of n."""
    judged = min(JUDGED, n // 2, max(500, ENTRIES // width))
    kept = min(KEPT, (n - judged) // 3, max(16, ENTRIES // width))
    fitted = min(FITTED, n - judged - kept, max(64, ENTRIES // width))
    return judged, max(kept, 1), fitted


def spaces_of(blueprint: Blueprint, weights: Weights, features: Any) -> tuple[np.ndarray, ...]:
    """Features (B, C) and, where there is an embedding, what its first member makes of them."""
    rows = np.asarray(features)
    if blueprint.embedding is None:
        return (rows,)
    size = min(CHUNK, len(rows))
    parts = []
    for start in range(0, len(rows), size):
        # the last chunk has rows twice rather than a program of its own
        places = np.arange(start, start + size) % len(rows)
        parts.append(np.asarray(_embedded(blueprint, weights, rows[places])))
    return rows, np.concatenate(parts)[: len(rows)]


def widths(blueprint: Blueprint, weights: Weights, features: int) -> tuple[int, ...]:
    """Entries of what `spaces_of` makes of so many features."""
    if blueprint.embedding is None:
        return (features,)
    like = jax.ShapeDtypeStruct((1, features), float)
    return features, jax.eval_shape(partial(_embedded, blueprint), weights, like).shape[1]


@partial(jax.jit, static_argnums=0)
@full_precision
def _embedded(blueprint: Blueprint, weights: Weights, features: Array) -> Array:
    own = jax.tree.map(lambda leaf: leaf[0], weights)
    return nnx.merge(graph_of(blueprint), *own).context(blueprint.select_features(features))


def _combined(reference: np.ndarray, found: np.ndarray, p: np.ndarray) -> np.ndarray:
    """P-values (B,) of the least of several p-values (B, S), by its own rank.

    An observation and the reference are exchangeable if nothing is wrong: each of them is ranked
    among all others. Sharper than a correction that knows nothing of how statistics depend on each
    other.
    """
    total, own = len(reference), _beyond(reference, reference)
    out = np.empty(len(found))
    for start in range(0, len(found), CHUNK):
        part = slice(start, start + CHUNK)
        least = np.min(own + (found[part, None, :] >= reference), axis=2) / (1 + total)
        out[part] = (1 + np.sum(least <= np.min(p[part], axis=1)[:, None], axis=1)) / (1 + total)
    return out


def _beyond(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Number of reference rows (R, S) that are at least as large as each statistic (B, S)."""
    ordered = np.sort(reference, axis=0)
    parts = zip(ordered.T, found.T, strict=True)
    below = [np.searchsorted(own, f, side="left") for own, f in parts]
    return len(reference) - np.stack(below, axis=1)
