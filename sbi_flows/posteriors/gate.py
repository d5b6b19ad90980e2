"""Warn once if an observation is not typical of the training simulations.

Public names: `gate`, `LEVEL`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
from jax import Array
from scipy.stats import binom

from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.core.labels import first_names
from sbi_flows.core.pytrees import is_traced
from sbi_flows.core.warn import warn_user
from sbi_flows.observations.typicality import Typicality

LEVEL = 0.01
"""Significance level: the warning is issued if the p-value is at most this number."""

MAX_REMEMBERED = 1_000
"""Maximum number of observations in `_tested`; when it is full, all of them are removed."""

_tested: weakref.WeakKeyDictionary[Typicality, set[bytes]] = weakref.WeakKeyDictionary()
"""Observations that were already tested; they are not tested again, so each warns only once."""


def gate(
    typicality: Typicality | None,
    features: Array,
    labels: Callable[[], Sequence[str]],
    values: Callable[[], tuple[Sequence[np.ndarray], np.ndarray | None]],
) -> None:
    """Warn once if at least one of N observations is not typical at `LEVEL`.

    For several observations, two criteria are used, each at the level `LEVEL` / 2: the smallest
    p-value is too small (Bonferroni), or too many p-values are at most `LEVEL` (binomial test).
    If `features` is traced (inside `jit`, for example), nothing is tested.

    Args:
        typicality: Distribution of the training simulations; if None, nothing is tested.
        features: Features of the observations, shape (N, C).
        labels: Function that returns the names of the C features.
        values: Function that returns the arguments of `Typicality.test`: features and, if there is
            an embedding, the embedding's output; and the fraction of entries that each observation
            has, or None.
    """
    if typicality is None or is_traced(features):
        return
    tested = _tested.setdefault(typicality, set())
    name = np.asarray(features).tobytes()
    if name in tested or typicality.least_p > LEVEL:
        return
    if len(tested) >= MAX_REMEMBERED:
        tested.clear()
    tested.add(name)
    spaces, present = values()
    p_values = typicality.test(spaces, present).p_value
    worst = int(np.argmin(p_values))
    if _is_atypical(p_values):
        compared = typicality if present is None else typicality.given(present[worst])
        unusual = np.flatnonzero(compared.unusual(spaces[0])[worst])
        names = labels()
        where = first_names([names[int(i)] for i in unusual])
        which = "" if len(features) == 1 else f"[{worst}]"
        warn_user(
            f"x{which}: not typical of the training simulations (p {p_values[worst]:.2g}"
            f"{': ' + where if where else ''}); what is learned there is an extrapolation. "
            "posterior.misspecification(x) says more",
            SbiFlowsWarning,
        )


def _is_atypical(p_values: np.ndarray) -> bool:
    """Return whether p-values (N,) show that at least one of N observations is not typical."""
    count = len(p_values)
    if count == 1:
        return bool(p_values[0] <= LEVEL)
    too_many = binom.sf(np.sum(p_values <= LEVEL) - 1, count, LEVEL)
    return bool(count * p_values.min() <= LEVEL / 2 or too_many <= LEVEL / 2)
