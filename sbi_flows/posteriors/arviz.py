"""Conversion of posterior draws to ArviZ data, for ArviZ 0.x and 1.x.

Posterior draws are independent. They are divided into chains, because ArviZ compares chains to
compute R-hat and effective sample sizes.

Public names: `Groups`, `arviz_groups`, `require_chains`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from sbi_flows.core.checks import require_count
from sbi_flows.core.errors import SbiFlowsWarning, SimulationFailed
from sbi_flows.core.typing import Obs
from sbi_flows.core.warn import warn_user
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.simulations import Simulations


class Groups(NamedTuple):
    """Arrays from which the groups of the ArviZ data are made.

    Attributes:
        draws: Posterior draws, shape (n, D).
        log_prob: Log densities of the posterior draws, shape (n,).
        prior_draws: Prior draws, shape (m, D).
        x: The observation, an array or a pytree of arrays.
        simulated: Simulations at the first of the posterior draws, row by row, with failed rows;
            None omits the group posterior_predictive.
    """

    draws: Array | np.ndarray
    log_prob: Array
    prior_draws: Array | np.ndarray
    x: Obs
    simulated: Simulations | None = None


def require_chains(n: int, chains: int) -> None:
    """Raise ValueError unless n draws can be divided into chains of equal length."""
    require_count(1, chains=chains)
    if n % chains:
        raise ValueError(f"n: expected a multiple of the number of chains, {chains}, got {n}")


def arviz_groups(
    prior: Prior,
    groups: Groups,
    *,
    chains: int = 4,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Any] | None = None,
) -> Any:
    """Build ArviZ data with the groups posterior, sample_stats, prior, observed_data, ...

    Draw d of chain c is row `d * chains + c` of the arrays. In the group posterior_predictive, draw
    d of chain c is a simulation at draw d of chain c of the group posterior. If simulations failed,
    the rows are permuted so that failures fall on the same draws of all chains, and the group
    posterior_predictive is without these draws.

    Args:
        prior: The prior, which defines names and shapes of the parameters.
        groups: The arrays.
        chains: Number of chains of equal length. Prior draws form one chain.
        coords: Coordinate values of each dimension, by the name of the dimension.
        dims: Names of the dimensions of each array, by the name of the parameter or array of x.

    Returns:
        `arviz.InferenceData` on ArviZ 0.x, `xarray.DataTree` on ArviZ 1.x.

    Raises:
        ValueError: `dims` has an unknown variable or a wrong number of axes, `coords` has an
            unknown dimension or a wrong number of values, or the number of draws is not a multiple
            of `chains`.
        SimulationFailed: Fewer simulations than chains are valid.
    """
    require_chains(len(groups.draws), chains)
    rows, simulated_draws = _chain_rows(groups, chains)
    names = _file_names(prior.names)
    observed = {k: np.asarray(v) for k, v in _named(groups.x).items()}
    arrays: dict[str, Any] = {
        "posterior": _by_chain(_renamed(prior.unflatten(groups.draws), names), rows),
        "sample_stats": _by_chain({"lp": groups.log_prob}, rows),
        "prior": _one_chain(_renamed(prior.unflatten(groups.prior_draws), names)),
        "observed_data": observed,
    }
    if groups.simulated is not None:
        simulated_rows = rows[:, simulated_draws]
        arrays["posterior_predictive"] = _by_chain(_named(groups.simulated.x), simulated_rows)
    event_shapes = _renamed(prior.event_shapes, names)
    shapes = {**event_shapes, **{name: value.shape for name, value in observed.items()}}
    named = {name: list(axes) for name, axes in (dims or {}).items()}
    for name in named.keys() & event_shapes.keys() & observed.keys():
        # ArviZ would give both arrays the same axes
        if event_shapes[name] != observed[name].shape:
            raise ValueError(
                f"dims: expected one shape for {name!r}, which names a parameter and an array of "
                f"x, got {event_shapes[name]} and {observed[name].shape}"
            )
    _require_dims(shapes, named, dict(coords or {}))
    data = _from_arrays(arrays, {"coords": dict(coords or {}), "dims": named})
    if groups.simulated is not None:
        data = _with_draw_numbers(data, simulated_draws)
    return data


def _from_arrays(arrays: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """Build ArviZ data from the arrays of each group."""
    import arviz

    if not _is_old_arviz():
        return arviz.from_dict(arrays, **settings)
    data: Any = arviz.from_dict(**arrays, **settings)
    for group, values in arrays.items():  # ArviZ 0.x sorts the variables by name
        data = data.map(lambda each, names=list(values): each[names], groups=group)
    # ArviZ 0.x turns scalars into vectors of length 1: remove that axis, as in ArviZ 1.x
    scalars = [f"{k}_dim_0" for k, v in arrays["observed_data"].items() if v.ndim == 0]
    return data.map(lambda group: group.squeeze(scalars, drop=True), groups="observed_data")


def _with_draw_numbers(data: Any, draws: np.ndarray) -> Any:
    """Number the draws of the group posterior_predictive as in the group posterior."""
    if np.array_equal(draws, np.arange(len(draws))):
        return data
    group = "posterior_predictive"
    if _is_old_arviz():
        return data.map(lambda each: each.assign_coords(draw=draws), groups=group)
    data[group].dataset = data[group].to_dataset().assign_coords(draw=draws)
    return data


def _is_old_arviz() -> bool:
    """Return whether ArviZ is of version 0.x."""
    import arviz

    return int(arviz.__version__.split(".")[0]) < 1


def _chain_rows(groups: Groups, chains: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide the rows of the draws among chains.

    Returns:
        Row of each draw, shape (chains, n / chains); and numbers of the draws with a valid
        simulation in every chain, in ascending order, empty without simulations.

    Raises:
        SimulationFailed: Fewer simulations than chains are valid.
    """
    rows = np.arange(len(groups.draws)).reshape(-1, chains)
    if groups.simulated is None:
        return rows.T, np.zeros(0, int)
    count = len(groups.simulated) // chains
    valid = np.asarray(groups.simulated.valid)[: count * chains]
    if not valid.all():
        # failures together in as few draws as possible, and these anywhere in the chains: a group
        # of valid draws at the start would make chains that are not stationary
        by_validity = np.argsort(~valid, kind="stable").reshape(count, chains)
        rows[:count] = np.random.default_rng(0).permutation(by_validity)
    draws = np.flatnonzero(valid[rows[:count]].all(axis=1))
    if not draws.size:
        raise SimulationFailed(
            f"simulator: expected at least {chains} valid simulations, one for each chain, got "
            f"{valid.sum()} of {len(groups.simulated)}"
        )
    return rows.T, draws


def _require_dims(
    shapes: Mapping[str, tuple[int, ...]], dims: Mapping[str, list], coords: Mapping[str, Any]
) -> None:
    """Raise ValueError unless `dims` and `coords` match the shapes of the variables."""
    lengths: dict[str, int] = {}
    for name, axes in dims.items():
        if name not in shapes:
            raise ValueError(f"dims: expected names among {sorted(shapes)}, got {name!r}")
        if len(axes) != len(shapes[name]):
            raise ValueError(
                f"dims: expected {len(shapes[name])} names for {name!r} of shape {shapes[name]}, "
                f"got {axes}"
            )
        lengths.update(zip(axes, shapes[name], strict=True))
    for name, values in coords.items():
        if name not in lengths:
            raise ValueError(f"coords: expected dimensions among {sorted(lengths)}, got {name!r}")
        if len(values) != lengths[name]:
            raise ValueError(
                f"coords: expected {lengths[name]} values for {name!r}, got {len(values)}"
            )


def _file_names(names: Sequence[str]) -> dict[str, str]:
    """Return names that netCDF files allow, by the names of the parameters; warn of a change.

    Raises:
        ValueError: Two parameters would get the same name.
    """
    allowed = {name: name.replace("/", "_").strip() for name in names}
    changed = [f"{old!r} to {new!r}" for old, new in allowed.items() if old != new]
    if len(set(allowed.values())) < len(allowed):
        raise ValueError(
            "prior: expected names that differ when slashes become underscores, as netCDF files "
            f"require, got {', '.join(map(repr, names))}; rename the parameters"
        )
    if changed:
        warn_user(
            f"renamed parameters, because netCDF files do not allow slashes in names, or spaces at "
            f"their ends: {', '.join(changed)}",
            SbiFlowsWarning,
        )
    return allowed


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names[name]: value for name, value in values.items()}


def _by_chain(values: Mapping[str, Any], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Select the rows (chains, m) of arrays (n, *event): shapes (chains, m, *event)."""
    return {name: np.asarray(value)[rows] for name, value in values.items()}


def _one_chain(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Add a chain axis of length 1: shapes (n, *event) become (1, n, *event)."""
    return {name: np.asarray(value)[None] for name, value in values.items()}


def _named(x: Obs) -> dict[str, Any]:
    """Return the arrays of x by name: dict keys joined by dots, or `x` for a single array."""
    leaves = jax.tree_util.tree_leaves_with_path(x)
    name = partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path) or "x": leaf for path, leaf in leaves}
