"""Simulations: a frozen pytree of parameters and observations, in memory or on disk.

Public names: `Simulations`, `unchecked_simulations`, `observation_shape`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from sbi_flows.core import doubles
from sbi_flows.core.checks import (
    as_real_array,
    as_tree,
    require_flag,
)
from sbi_flows.core.doubles import as_data_array
from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.core.frames import frame_columns
from sbi_flows.core.pytrees import describe_arrays
from sbi_flows.core.typing import Key, Obs
from sbi_flows.core.warn import warn_user
from sbi_flows.observations.missing import MissingPattern
from sbi_flows.prior.base import Prior
from sbi_flows.simulations.arrays import (
    MAX_INDEX,
    as_parameters,
    finite_rows,
    named_columns,
    require_rows,
    row_index,
    whole_numbers,
)
from sbi_flows.simulations.disk import (
    ON_DISK,
    LazyArray,
    finite_rows_on_disk,
    from_pickle,
    is_on_disk,
    keep_on_disk,
    to_pickle,
)

MIN_WARNING_ROWS, MIN_WARNING_FRACTION = 10, 0.1
"""Number and fraction of rows with NaN or infinity. `Simulations` warns if both are exceeded."""

MAX_SHOWN_NAMES = 8
"""Maximum number of names of columns in the text of `Simulations`."""


class Names(NamedTuple):
    """Names of the columns of theta (D,) and of x (C,); None for an array without names."""

    theta: tuple[str, ...] | None = None
    x: tuple[str, ...] | None = None


class Facts(NamedTuple):
    """Attributes of simulations that are not arrays; see `Simulations`."""

    names: Names
    missing: bool


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Simulations:
    """Pairs of parameters and simulated observations.

    Failed rows stay in the data set and are marked invalid, so that they can be counted. A warning
    is issued if more than ten rows and more than 10% of all rows contain NaN or infinity.

    Arrays of any library and tables with named columns are accepted. The entries of a list are
    rows. A dict or a tuple contains several arrays. See docs/data.md.

    Observations that do not fit in memory can stay on disk: pass a memory-mapped array, as returned
    by `np.load("x.npy", mmap_mode="r")` or `np.memmap`, or use a `SimulationStore`. Training then
    reads the observations in parts. A pickle contains the paths of the files, not their content.

    Attributes:
        theta: Parameters, shape (N, D); a NumPy array of float64 if single precision cannot
            represent them. The argument may also be a table or a dict of arrays; its columns are
            matched by name with the parameters of the prior.
        x: Observations, shape (N, *event), or a dict of such arrays. The dtype is the same whether
            the arrays are in memory or on disk. An array that single precision cannot represent,
            such as Julian dates, is a NumPy array of float64.
        valid: Whether each row is valid, shape (N,). A row is valid if its observation is finite,
            apart from missing entries, and the argument `valid`, if given, is true for the row.
        round: Round of sequential inference in which each row was simulated, shape (N,). It is zero
            if the inference is not sequential.
        names: Names of the columns of theta and x, if they were given as tables or dicts.
        missing: Whether NaN in x marks a missing entry; a row is then invalid only if it contains
            infinity, or nothing but NaN. If False, NaN marks a failed simulation.

    Raises:
        ValueError: The arrays have different numbers of rows, theta is not a finite (N, D) array, x
            is empty, or x does not contain real numbers.

    Example:
        >>> import numpy as np
        >>> sims = Simulations(np.zeros((3, 2)), np.array([[1.0], [np.nan], [2.0]]))
        >>> sims
        Simulations(N=3, D=2, x=float32[1], invalid=1)
        >>> Simulations(np.zeros((2, 2)), np.array([[1.0, np.nan], [2.0, 3.0]]), missing=True)
        Simulations(N=2, D=2, x=float32[2], invalid=0, missing=1)
    """

    theta: Array | np.ndarray
    x: Obs
    valid: Array
    round: Array
    names: Names
    missing: bool

    def __init__(
        self,
        theta: Any,
        x: Obs,
        *,
        valid: Any | None = None,
        round: Any | None = None,
        missing: bool = False,
    ) -> None:
        """Check the user's arrays, and mark failed rows of x as invalid."""
        require_flag(missing=missing)
        theta, theta_names = named_columns(theta)
        theta, names = as_parameters(theta), Names(theta_names, frame_columns(x))
        n = len(theta)
        x = as_tree("x", x, as_data_array, kept=ON_DISK)
        require_rows(x, n)
        valid = np.ones(n, bool) if valid is None else whole_numbers("valid", valid, n, 1)
        zeros = np.zeros(n, np.int32)
        round = zeros if round is None else whole_numbers("round", round, n, MAX_INDEX)
        _set_fields(self, theta, x, valid, round, Facts(names, bool(missing)))
        not_finite = int(np.sum(np.asarray(valid, bool))) - self.num_valid
        if not_finite > max(MIN_WARNING_ROWS, MIN_WARNING_FRACTION * n):
            what = "infinity, or nothing but NaN" if missing else "NaN or infinity"
            advice = "" if missing else ". If NaN marks a missing entry, give missing=True"
            warn_user(
                f"x: {not_finite:,} of {n:,} rows contain {what}; a fit uses the other "
                f"{self.num_valid:,}{advice}",
                SbiFlowsWarning,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for pickle and copy, with the locations of arrays on disk."""
        return {**vars(self), "x": jax.tree.map(to_pickle, self.x)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the attributes and open the files of arrays on disk."""
        # pickles of earlier versions do not say whether entries are missing
        vars(self).update({"missing": False, **state}, x=jax.tree.map(from_pickle, state["x"]))

    def __len__(self) -> int:
        """Number of rows N, including failed rows."""
        return len(self.theta)

    def __getitem__(self, rows: Any) -> Simulations:
        """Return simulations with the selected rows.

        Args:
            rows: A slice, an index array or a boolean mask.

        Raises:
            ValueError: `rows` has another type, or a row number is out of range.
        """
        if not isinstance(rows, Tracer):
            rows = row_index(rows, len(self))
        return jax.tree.map(lambda leaf: _as_leaf(leaf[rows]), self)

    def __repr__(self) -> str:
        """Show the sizes, names and shapes of the arrays, and the number of failed rows."""
        n, d = self.theta.shape
        columns = self.names.theta or ()
        shown = [*columns[:MAX_SHOWN_NAMES], *(["..."] if len(columns) > MAX_SHOWN_NAMES else [])]
        names = f" ({', '.join(shown)})" if shown else ""
        invalid = n - self.num_valid
        missing = f", missing={self._num_lacking}" if self.missing and not self.on_disk else ""
        shapes = describe_arrays(self.x)
        return f"Simulations(N={n}, D={d}{names}, x={shapes}, invalid={invalid}{missing})"

    @property
    def _num_lacking(self) -> int:
        """Number of valid rows with missing entries."""
        arrays = [np.asarray(a, float).reshape(len(self), -1) for a in jax.tree.leaves(self.x)]
        lacks = np.isnan(np.concatenate(arrays, axis=1)).any(axis=1)
        return int(np.sum(lacks & np.asarray(self.valid)))

    @property
    def num_valid(self) -> int:
        """Number of valid rows."""
        return int(np.sum(np.asarray(self.valid)))

    @property
    def on_disk(self) -> bool:
        """Whether the observations are on disk. If so, training reads them in parts."""
        return is_on_disk(self.x)

    def aligned(self, prior: Prior) -> Simulations:
        """Return the simulations with the columns of theta in the order of a prior's parameters.

        Columns without names are taken in their order. So are columns with other names than the
        labels theta[0], theta[1], ... of a prior without names.

        Raises:
            ValueError: The names of the columns are not those of the prior's parameters.
        """
        columns, parameters = self.names.theta, prior.labels
        if columns is None or columns == tuple(parameters):
            return self
        if not prior.is_named and sorted(columns) != sorted(parameters):
            return self
        if sorted(columns) != sorted(parameters):
            raise ValueError(
                "theta: expected columns named like the prior's parameters, "
                f"{', '.join(parameters)}, got {', '.join(columns)}; rename or select the columns"
            )
        order = np.array([columns.index(label) for label in parameters])
        facts = Facts(self.names._replace(theta=tuple(parameters)), self.missing)
        return _from_children(facts, (self.theta[:, order], self.x, self.valid, self.round))

    def relative_to(self, prior: Prior) -> Simulations:
        """Return the simulations for internal use: aligned, with theta minus the prior's offset.

        Raises:
            ValueError: The names of the columns are not those of the prior's parameters.
        """
        aligned = self.aligned(prior)
        has_columns = self.theta.shape[1] == prior.dim
        if not has_columns or not (prior.layout.offset or doubles.is_double(aligned.theta)):
            return aligned
        theta = prior.subtract_offset(aligned.theta)
        facts = Facts(aligned.names, self.missing)
        return _from_children(facts, (theta, self.x, self.valid, self.round))

    def hide(self, key: Key, pattern: MissingPattern) -> Simulations:
        """Return a copy in which random entries of x are replaced by NaN, with `missing` True.

        A valid row stays valid, even if all of its entries are hidden.

        Args:
            key: Random key.
            pattern: Pattern such as `sf.RandomEntries(0.2)`.

        Raises:
            ValueError: The pattern does not suit x, or x is on disk.

        Example:
            >>> import jax, numpy as np, sbi_flows as sf
            >>> sims = sf.Simulations(np.zeros((3, 2)), np.ones((3, 10)))
            >>> sims.hide(jax.random.key(0), sf.RandomEntries(0.5)).missing
            True
        """
        if self.on_disk:
            raise ValueError("x: expected observations in memory, got observations on disk")
        # a row without any entry stays valid: it is hidden, not failed
        children = (self.theta, pattern(key, self.x), self.valid, self.round)
        return _from_children(Facts(self.names, True), children)

    def only_valid(self) -> Simulations:
        """Return simulations with the valid rows only."""
        return self if self.num_valid == len(self) else self[np.flatnonzero(self.valid)]


_LEAVES = ("theta", "x", "valid", "round")


def unchecked_simulations(
    theta: Array | np.ndarray, x: Obs, valid: Any, *, missing: bool = False
) -> Simulations:
    """Create simulations from arrays without a check.

    The caller ensures that theta (N, D) is finite and that x has N rows.

    Failed rows of x are marked invalid, as in `Simulations`.
    """
    simulations = object.__new__(Simulations)
    x = jax.tree.map(lambda a: as_data_array("x", a) if doubles.is_double(a) else a, x)
    facts = Facts(Names(), missing)
    _set_fields(simulations, theta, x, valid, np.zeros(len(theta), np.int32), facts)
    return simulations


def _set_fields(
    simulations: Simulations,
    theta: Array | np.ndarray,
    x: Obs,
    valid: Any,
    round: Any,
    facts: Facts,
) -> None:
    x = jax.tree.map(_as_leaf, x)
    test = partial(finite_rows, missing=facts.missing)
    finite = finite_rows_on_disk(x, test) if is_on_disk(x) else test(x)
    # operations on the host, and copies by device_put, compile no program for the number of rows
    valid = np.asarray(valid, bool) & np.asarray(finite)
    round = np.array(round, jnp.result_type(int))
    values = (theta, x, *jax.device_put((valid, round)), *facts)
    for name, value in zip((*_LEAVES, *Facts._fields), values, strict=True):
        object.__setattr__(simulations, name, value)


def _children(simulations: Simulations) -> tuple[list[tuple[Any, Any]], Facts]:
    leaves = [(jax.tree_util.GetAttrKey(n), getattr(simulations, n)) for n in _LEAVES]
    return leaves, Facts(simulations.names, simulations.missing)


def _from_children(facts: Facts, children: Any) -> Simulations:
    # without the constructor: it checks values, but the leaves may be tracers here
    simulations = object.__new__(Simulations)
    for name, value in zip((*_LEAVES, *Facts._fields), (*children, *facts), strict=True):
        object.__setattr__(simulations, name, value)
    return simulations


jax.tree_util.register_pytree_with_keys(Simulations, _children, _from_children)


def _as_leaf(leaf: Any) -> Array | np.ndarray | LazyArray:
    """Convert an array to a JAX array; return an array on disk or in double precision unchanged."""
    if isinstance(leaf, ON_DISK):
        return keep_on_disk(leaf)
    return leaf if doubles.is_double(leaf) else jnp.asarray(as_real_array("x", leaf))


def observation_shape(x: Obs) -> Obs:
    """Return shape and dtype of one row of x, as a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), x)
