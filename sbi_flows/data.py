"""Simulations as one frozen pytree, and `simulate`, which makes them.

Public names: `Simulations`, `simulate`, `simulate_at`, `observation_shape`, `valid_rows`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import partial
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm.auto import tqdm

from sbi_flows.checks import real_array, real_arrays, require_count, require_object, require_real
from sbi_flows.errors import SbiFlowsWarning, SimulationFailed
from sbi_flows.execution import Executor, Outside, row_seeds
from sbi_flows.precision import full_precision
from sbi_flows.prior import Prior, PriorLike, as_prior
from sbi_flows.typing import Key, Obs, Simulator

CHUNK = 16_384
"""Simulations in one compiled call; the same shape for every chunk."""

LANES = 256
"""Simulations side by side on a CPU: their arrays stay in its cache, and an adaptive solver takes
as many steps as the slowest of a few, not of thousands. Accelerators take a whole chunk at once."""


_REASONS = 5
"""Reasons of failures that a warning names."""


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Simulations:
    """Pairs of parameters and simulated observations.

    Failed rows stay, marked invalid: they are counted and reported, never silently lost.

    Observations that are larger than memory stay on disk: give them memory-mapped, as
    `np.load("x.npy", mmap_mode="r")` or `np.memmap` do. Training then reads them in chunks.

    Attributes:
        theta: Parameters, shape (N, D).
        x: Observations, shape (N, *event), or a dict of such arrays.
        valid: Whether a row's observation is finite throughout, and good to the user, shape (N,).
        round: Round that a row was simulated in, shape (N,); zero unless sequential.

    Raises:
        ValueError: Row counts differ, theta is not a finite (N, D) array, or x is empty or holds
            anything but real numbers.

    Example:
        >>> import numpy as np
        >>> sims = Simulations(np.zeros((3, 2)), np.array([[1.0], [np.nan], [2.0]]))
        >>> sims
        Simulations(N=3, D=2, x=float32[1], invalid=1)
    """

    theta: Array
    x: Obs
    valid: Array
    round: Array

    def __init__(
        self, theta: Any, x: Obs, *, valid: Any | None = None, round: Any | None = None
    ) -> None:
        """Validate arrays that the user already has; rows that are not finite are never valid."""
        theta = _parameters(theta)
        x = jax.tree.map(_held, x if _on_disk(x) else real_arrays("x", x))
        _require_rows(x, len(theta))
        finite = _finite_rows(x) if _on_disk(x) else valid_rows(x)
        valid = finite if valid is None else jnp.asarray(valid, bool)
        rounds = jnp.zeros(len(theta), jnp.int32) if round is None else jnp.asarray(round, int)
        if valid.shape != (len(theta),) or rounds.shape != (len(theta),):
            raise ValueError(f"valid and round: expected shape ({len(theta)},)")
        for name, value in zip(_FIELDS, (theta, x, valid & finite, rounds), strict=True):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        """Number of rows N, failed ones included."""
        return len(self.theta)

    def __getitem__(self, rows: Any) -> Simulations:
        """The given rows (a slice or an index array) of every field.

        Raises:
            ValueError: `rows` is a single number.
        """
        if np.ndim(rows) == 0 and not isinstance(rows, slice):
            raise ValueError(f"rows: expected a slice or an index array, got {rows!r}")
        return jax.tree.map(lambda leaf: _held(leaf[rows]), self)

    def __repr__(self) -> str:
        """Sizes, the observation's shape and the number of failed rows."""
        leaves = [f"{a.dtype}{list(a.shape[1:])}" for a in jax.tree.leaves(self.x)]
        n, d = self.theta.shape
        invalid = n - self.num_valid
        return f"Simulations(N={n}, D={d}, x={', '.join(leaves)}, invalid={invalid})"

    @property
    def num_valid(self) -> int:
        """Number of rows with a finite observation."""
        return int(np.sum(self.valid))

    @property
    def on_disk(self) -> bool:
        """Whether the observations are memory-mapped."""
        return _on_disk(self.x)

    def only_valid(self) -> Simulations:
        """The rows with a finite observation."""
        return self if self.num_valid == len(self) else self[np.flatnonzero(self.valid)]


_FIELDS = tuple(field.name for field in dataclasses.fields(Simulations))


def _children(simulations: Simulations) -> tuple[list[tuple[Any, Any]], None]:
    return [(jax.tree_util.GetAttrKey(n), getattr(simulations, n)) for n in _FIELDS], None


def _from_children(_: None, children: Any) -> Simulations:
    # not through the constructor, which validates: a transformation puts tracers into the fields
    simulations = object.__new__(Simulations)
    for name, value in zip(_FIELDS, children, strict=True):
        object.__setattr__(simulations, name, value)
    return simulations


jax.tree_util.register_pytree_with_keys(Simulations, _children, _from_children)


def simulate(
    key: Key,
    prior: PriorLike,
    simulator: Simulator,
    n: int,
    *,
    executor: Executor | None = None,
    progress: bool = True,
) -> Simulations:
    """Draw n parameter vectors from the prior and simulate each.

    Args:
        key: Random key; the result does not depend on how the rows are chunked.
        prior: What `as_prior` takes.
        simulator: `(key, theta) -> x` on one parameter vector (or the named dict where the prior
            is a dict or a model), traceable by JAX, and then run in compiled chunks; x is an array
            or a dict of arrays. Or what `simulators.external_simulator` makes of other functions.
        n: Number of simulations.
        executor: Where an external simulator runs; its own by default. The result is the same.
        progress: Show a progress bar when there is more than one chunk.

    Returns:
        Simulations with n rows; rows with NaN or infinity in x are marked invalid.

    Raises:
        ValueError: n is not positive, or the simulator cannot be traced or returns no numbers.
        SimulationFailed: Every row is invalid.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> noisy = lambda key, theta: theta + jax.random.normal(key)
        >>> simulate(jax.random.key(0), dist.Normal(0, 1), noisy, 100)
        Simulations(N=100, D=1, x=float32[], invalid=0)
    """
    require_count(1, n=n)
    prior = as_prior(prior)
    _check_simulator(prior, simulator, executor)
    prior_key, noise_key = jax.random.split(key)
    theta = prior.sample(prior_key, n)
    return _simulated(noise_key, prior, simulator, theta, executor, progress=progress)


def simulate_at(
    key: Key,
    prior: PriorLike,
    simulator: Simulator,
    theta: Any,
    *,
    executor: Executor | None = None,
    progress: bool = True,
) -> Simulations:
    """Simulate each of the given parameter vectors, draws of a posterior say.

    Args:
        key: Random key; the result does not depend on how the rows are chunked.
        prior: What `as_prior` takes; it names the parameters.
        simulator: As for `simulate`.
        theta: Parameters, shape (n, D).
        executor: As for `simulate`.
        progress: Show a progress bar when there is more than one chunk.

    Returns:
        Simulations with the rows of theta; those with NaN or infinity in x are marked invalid.

    Raises:
        ValueError: theta does not fit the prior, or the simulator cannot be traced or returns no
            numbers.
        SimulationFailed: Every row is invalid.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> noisy = lambda key, theta: theta + jax.random.normal(key)
        >>> simulate_at(jax.random.key(0), dist.Normal(0, 1), noisy, [[0.0], [1.0]])
        Simulations(N=2, D=1, x=float32[], invalid=0)
    """
    prior, theta = as_prior(prior), _parameters(theta)
    if theta.shape[1] != prior.dim:
        raise ValueError(
            f"theta: expected {prior.dim} columns for {prior.labels}, got {theta.shape[1]}"
        )
    _check_simulator(prior, simulator, executor)
    return _simulated(key, prior, simulator, theta, executor, progress=progress)


def _simulated(
    key: Key,
    prior: Prior,
    simulator: Simulator,
    theta: Array,
    executor: Executor | None,
    *,
    progress: bool,
) -> Simulations:
    if isinstance(simulator, Outside):
        return _simulated_outside(key, prior, simulator, theta, executor, progress=progress)
    simulator, n = _with_present_state(simulator), len(theta)
    keys = jax.random.split(key, n)
    chunks = []
    starts = range(0, n, CHUNK)
    size = min(CHUNK, math.ceil(n / LANES) * LANES) if n > LANES else n
    for start in tqdm(starts, desc="simulate", disable=not progress or len(starts) < 2):
        rows = np.arange(start, start + size) % n
        chunk = _simulate_chunk(prior, simulator, keys[rows], theta[rows])
        chunks.append(chunk)
    x = jax.tree.map(lambda *parts: jnp.concatenate(parts)[:n], *chunks)
    sims = Simulations(theta, x)
    _report_failures(sims)
    return sims


def _simulated_outside(
    key: Key,
    prior: Prior,
    simulator: Outside,
    theta: Array,
    executor: Executor | None,
    *,
    progress: bool,
) -> Simulations:
    """Rows in any order, each with a seed of its own, and the reasons of those that failed."""
    n, values = len(theta), jax.tree.map(np.asarray, prior.structured(theta))
    seeds = row_seeds(jax.random.split(key, n))
    tasks = [(i, seeds[i], jax.tree.map(lambda a, i=i: a[i], values)) for i in range(n)]
    x = {
        name: np.full((n, *shape), np.nan if np.dtype(kind).kind == "f" else 0, kind)
        for name, (shape, kind) in simulator.job.outputs.items()
    }
    reasons: dict[int, str] = {}
    chosen = simulator.executor if executor is None else executor
    rows = chosen.run(simulator.job, simulator.limits, tasks)
    for i, row in tqdm(rows, total=n, desc="simulate", disable=not progress):
        if row.x is None:
            reasons[i] = row.reason
            continue
        for name, value in row.x.items():
            x[name][i] = value
    valid = np.array([i not in reasons for i in range(n)])
    sims = Simulations(theta, x[""] if set(x) == {""} else x, valid=valid)
    _report_failures(sims, reasons)
    return sims


def _on_disk(x: Obs) -> bool:
    return any(isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(x))


def _held(leaf: Any) -> Array | np.memmap:
    """What is memory-mapped as it is, as long as JAX can hold its numbers; else an array."""
    if not isinstance(leaf, np.memmap):
        return jnp.asarray(real_array("x", leaf))
    require_real("x", leaf.dtype)
    return leaf


def _finite_rows(x: Obs) -> Array:
    """What `valid_rows` says, a chunk at a time."""
    leaves = jax.tree.leaves(x)
    starts = range(0, len(leaves[0]), CHUNK)
    chunks = [valid_rows([jnp.asarray(a[i : i + CHUNK]) for a in leaves]) for i in starts]
    return jnp.concatenate(chunks)


@jax.jit
def valid_rows(x: Obs) -> Array:
    """Whether each row (first axis) of every leaf of x is finite; bool of shape (N,)."""
    rows = [jnp.all(jnp.isfinite(a), axis=tuple(range(1, a.ndim))) for a in jax.tree.leaves(x)]
    return jnp.all(jnp.stack(rows), axis=0)


def observation_shape(x: Obs) -> Obs:
    """Shape and dtype of one row of x: the same tree, of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), x)


@partial(jax.jit, static_argnums=(0, 1))
@full_precision
def _simulate_chunk(prior: Prior, simulator: Simulator, keys: Key, theta: Array) -> Obs:
    inputs = (keys, prior.structured(theta))
    if jax.default_backend() != "cpu" or len(theta) <= LANES:
        return jax.vmap(simulator)(*inputs)
    return jax.lax.map(lambda one: simulator(*one), inputs, batch_size=LANES)


def _with_present_state(simulator: Simulator) -> Simulator:
    """A simulator that compiled programs do not take for an earlier one.

    A method, or an object that is called, may have other attributes by now; programs that were
    compiled for it would not see that. Plain functions are known by themselves.
    """
    if isinstance(simulator, FunctionType) or hasattr(simulator, "__wrapped__"):
        return simulator
    return lambda key, theta: simulator(key, theta)


def _check_simulator(prior: Prior, simulator: Simulator, executor: Executor | None) -> None:
    """Trace the simulator on one parameter vector; nothing is computed."""
    if isinstance(simulator, Outside):
        if executor is not None:
            require_object("executor", executor, Executor, "one such as sf.Processes()")
        return
    if executor is not None:
        raise ValueError("executor: expected none with a simulator that is a JAX function, got one")
    theta = jax.eval_shape(lambda: prior.structured(prior.center()))
    try:
        out = jax.eval_shape(simulator, jax.random.key(0), theta)
    except (jax.errors.JAXTypeError, jax.errors.NonConcreteBooleanIndexError) as error:
        raise ValueError(
            "simulator: expected a function that JAX can trace (jax.numpy, no branches on values "
            f"in Python), got {type(error).__name__}: {error}"
        ) from error
    for leaf in jax.tree.leaves(out):
        require_real("simulator", leaf.dtype)
    if not any(leaf.size for leaf in jax.tree.leaves(out)):
        raise ValueError(f"simulator: expected numeric arrays, got {out}")


def _report_failures(sims: Simulations, reasons: Mapping[int, str] | None = None) -> None:
    """Warn of invalid rows, by what is known of their reasons."""
    failed = len(sims) - sims.num_valid
    if not failed:
        return
    counts = Counter(reason.split("; it printed")[0] for reason in (reasons or {}).values())
    counts["gave NaN or infinity"] = failed - counts.total()
    common = [f"{n} {reason}" for reason, n in counts.most_common() if n]
    said = "; ".join(common[:_REASONS]) + ("; ..." if len(common) > _REASONS else "")
    if failed == len(sims):
        raise SimulationFailed(f"all {failed} simulations failed: {said}")
    warnings.warn(
        f"{failed} of {len(sims)} simulations failed: {said}; they are kept, marked invalid, and "
        "left out of training",
        SbiFlowsWarning,
        stacklevel=5 if reasons is not None else 4,
    )


def _parameters(theta: Any) -> Array:
    """Validate theta; a finite float array (N, D)."""
    given = np.asarray(theta)
    if given.ndim != 2 or given.dtype == np.bool_:
        raise ValueError(f"theta: expected a numeric array (N, D), got {given.dtype}{given.shape}")
    if not given.size:
        raise ValueError(f"theta: expected at least one row and column, got shape {given.shape}")
    held = np.asarray(real_array("theta", given)).astype(jnp.result_type(float), copy=False)
    bad = int(np.sum(~np.isfinite(held).all(axis=-1)))
    if bad:
        raise ValueError(f"theta: expected finite values, got {bad} rows with NaN or inf")
    return jnp.asarray(held)


def _require_rows(x: Obs, n: int) -> None:
    leaves = jax.tree.leaves(x)
    for leaf in leaves:
        if leaf.ndim < 1 or len(leaf) != n:
            raise ValueError(f"x: expected {n} rows as in theta, got shape {leaf.shape}")
    if not any(leaf.size for leaf in leaves):
        raise ValueError("x: expected at least one number in each row, got none")
