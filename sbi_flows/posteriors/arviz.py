"""Posterior draws in ArviZ's groups, on ArviZ 0.x and 1.x alike."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from sbi_flows.core.typing import Obs
from sbi_flows.prior.prior import Prior


def arviz_groups(prior: Prior, draws: Array, log_prob: Array, prior_draws: Array, x: Obs) -> Any:
    """Named variables in the groups posterior, sample_stats, prior and observed_data.

    Args:
        prior: Names and shapes of the parameters.
        draws: Posterior draws, shape (n, D).
        log_prob: Their log densities, shape (n,).
        prior_draws: Prior draws, shape (m, D).
        x: The observation, an array or a pytree of arrays.

    Returns:
        `arviz.InferenceData` on ArviZ 0.x, `xarray.DataTree` on ArviZ 1.x.
    """
    import arviz

    groups: dict[str, Any] = {
        "posterior": _one_chain(prior.unflatten(draws)),
        "sample_stats": {"lp": np.asarray(log_prob)[None]},
        "prior": _one_chain(prior.unflatten(prior_draws)),
        "observed_data": {k: np.asarray(v) for k, v in _named(x).items()},
    }
    if int(arviz.__version__.split(".")[0]) < 1:
        # it makes vectors of length 1 of scalars, which ArviZ 1.x leaves as they are
        scalars = [f"{k}_dim_0" for k, v in groups["observed_data"].items() if v.ndim == 0]
        data: Any = arviz.from_dict(**groups)
        return data.map(lambda group: group.squeeze(scalars, drop=True), groups="observed_data")
    return arviz.from_dict(groups)


def _one_chain(values: dict[str, Array]) -> dict[str, np.ndarray]:
    """Independent draws as one chain: (n, *event) to (1, n, *event)."""
    return {name: np.asarray(value)[None] for name, value in values.items()}


def _named(x: Obs) -> dict[str, Any]:
    """The leaves of x by name: keys joined by dots, `x` for an array alone."""
    leaves = jax.tree_util.tree_leaves_with_path(x)
    name = partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path) or "x": leaf for path, leaf in leaves}
