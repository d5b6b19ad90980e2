"""`simulate`: parameters from the prior, and a simulation of each.

Public names: `simulate`, `simulate_at`, `simulated_rows`, `identity`,
`check_simulator`, `report_failures`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm.auto import tqdm

from sbi_flows.core.checks import require_count, require_object, require_real
from sbi_flows.core.errors import SbiFlowsWarning, SimulationFailed
from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key, Simulator
from sbi_flows.prior.prior import Prior, PriorLike, as_prior
from sbi_flows.simulations.batching import (
    simulate_call,
    spread,
    spread_for_store,
    with_present_state,
)
from sbi_flows.simulations.executors import Executor, Outside, Row, Task, row_seeds
from sbi_flows.simulations.simulations import Simulations, parameters
from sbi_flows.simulations.worker import PRINTED, bare, by_name

_REASONS = 8
"""Reasons of failures that a warning names."""


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
        key: Random key; the result depends neither on chunks nor on the number of devices.
        prior: What `as_prior` takes.
        simulator: `(key, theta) -> x` on one parameter vector (or the named dict where the prior
            is a dict or a model), traceable by JAX, and then run in compiled chunks on all devices
            of this process; x is an array or a dict of arrays. Or what
            `simulators.external_simulator` makes of other functions.
        n: Number of simulations.
        executor: Where an external simulator runs; its own by default. The result is the same.
        progress: Show a progress bar; of a JAX function when there is more than one chunk.

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
    check_simulator(prior, simulator, executor)
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
        key: Random key; the result depends neither on chunks nor on the number of devices.
        prior: What `as_prior` takes; it names the parameters.
        simulator: As for `simulate`.
        theta: Parameters, shape (n, D).
        executor: As for `simulate`.
        progress: Show a progress bar; of a JAX function when there is more than one chunk.

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
    prior, theta = as_prior(prior), parameters(theta)
    if theta.shape[1] != prior.dim:
        raise ValueError(
            f"theta: expected {prior.dim} columns for {prior.labels}, got {theta.shape[1]}"
        )
    check_simulator(prior, simulator, executor)
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
    simulator, n = with_present_state(simulator), len(theta)
    keys = jax.random.split(key, n)
    chunks = []
    size, mesh = spread(n)
    starts = range(0, n, size)
    for start in tqdm(starts, desc="simulate", disable=not progress or len(starts) < 2):
        rows = np.arange(start, start + size) % n
        chunk = simulate_call(prior, simulator, keys[rows], theta[rows], mesh)
        chunks.append(chunk)
    x = jax.tree.map(lambda *parts: jnp.concatenate(parts)[:n], *chunks)
    sims = Simulations(theta, x)
    report_failures(sims, (), 4)
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
    n, reasons = len(theta), {}
    tasks = _tasks(prior, theta, jax.random.split(key, n), 0)
    x = _empty(simulator, n)
    chosen = simulator.executor if executor is None else executor
    rows = chosen.run(simulator.job, simulator.limits, tasks)
    for i, row in tqdm(rows, total=n, desc="simulate", disable=not progress):
        _put(x, reasons, i, i, row)
    valid = np.array([i not in reasons for i in range(n)])
    sims = Simulations(theta, bare(x), valid=valid)
    report_failures(sims, reasons.values(), 5)
    return sims


def simulated_rows(
    key: Key,
    prior: Prior,
    simulator: Simulator,
    missing: Sequence[tuple[int, int]],
    chunk: int,
    executor: Executor | None = None,
) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray], dict[int, str]]]:
    """Simulations of rows that depend on the key and their number alone, in chunks.

    Args:
        key: Random key.
        prior: The prior.
        simulator: As for `simulate`.
        missing: First row, and the one after the last, of each range that is wanted.
        chunk: Rows of a chunk, at the most.
        executor: As for `simulate`.

    Yields:
        The number of the first row, the parameters (n, D), the arrays (n, *) of the observations by
        name, and the reasons of rows that failed by number.
    """
    pieces = [
        (i, min(i + chunk, stop)) for start, stop in missing for i in range(start, stop, chunk)
    ]
    if isinstance(simulator, Outside):
        yield from _outside_pieces(key, prior, simulator, pieces, chunk, executor)
    else:
        yield from _traced_pieces(key, prior, simulator, pieces, chunk)


def _traced_pieces(
    key: Key,
    prior: Prior,
    simulator: Simulator,
    pieces: list[tuple[int, int]],
    chunk: int,
) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray], dict[int, str]]]:
    """As many of them in one call as follow each other and fit into it."""
    simulator = with_present_state(simulator)
    size, mesh = spread_for_store(chunk)
    for together in _together(pieces, size):
        first = together[0][0]
        theta, keys = _rows_at(prior, key, first, size)
        x = by_name(simulate_call(prior, simulator, keys, theta, mesh))
        held = {name: np.asarray(value) for name, value in x.items()}
        for start, stop in together:
            rows = slice(start - first, stop - first)
            arrays = {name: value[rows] for name, value in held.items()}
            yield start, np.asarray(theta)[rows], arrays, {}


def _together(pieces: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    """Runs of ranges that lie within so many rows."""
    run: list[tuple[int, int]] = []
    for start, stop in pieces:
        if run and stop - run[0][0] > size:
            yield run
            run = []
        run.append((start, stop))
    if run:
        yield run


def _outside_pieces(
    key: Key,
    prior: Prior,
    simulator: Outside,
    pieces: list[tuple[int, int]],
    chunk: int,
    executor: Executor | None,
) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray], dict[int, str]]]:
    """All of them in one run, each when its last row is finished."""
    stops = dict(pieces)
    thetas: dict[int, np.ndarray] = {}
    starts: dict[int, int] = {}
    opened: dict[int, tuple[dict[str, np.ndarray], dict[int, str]]] = {}
    left: dict[int, int] = {}

    def tasks() -> Iterator[Task]:
        for start, stop in pieces:
            theta, keys = (a[: stop - start] for a in _rows_at(prior, key, start, chunk))
            thetas[start], left[start] = np.asarray(theta), stop - start
            starts.update(dict.fromkeys(range(start, stop), start))
            yield from _tasks(prior, theta, keys, start)

    chosen = simulator.executor if executor is None else executor
    for i, row in chosen.run(simulator.job, simulator.limits, tasks()):
        start = starts.pop(i)
        if start not in opened:
            opened[start] = _empty(simulator, stops[start] - start), {}
        _put(*opened[start], i, i - start, row)
        left[start] -= 1
        if not left[start]:
            yield start, thetas.pop(start), *opened.pop(start)


def identity(simulator: Simulator, prior: Prior) -> dict[str, Any]:
    """What tells a simulator from others: its name, and the arrays that it makes.

    Raises:
        ValueError: They are neither an array nor a dict of arrays.
    """
    if isinstance(simulator, Outside):
        function: Any = simulator.job.function
        outputs = {n: [list(s), np.dtype(d).str] for n, (s, d) in simulator.job.outputs.items()}
    else:
        function = simulator
        theta = jax.eval_shape(lambda: prior.structured(prior.center()))
        x = jax.eval_shape(simulator, jax.random.key(0), theta)
        parts = by_name(x)
        if not all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in parts.values()):
            raise ValueError(f"simulator: expected an array or a dict of arrays, got {x}")
        outputs = {name: [list(leaf.shape), leaf.dtype.str] for name, leaf in parts.items()}
    return {"name": _named(function), "outputs": outputs}


def _named(value: Any) -> str:
    """What a function, or what is called like one, is known by in another process."""
    if isinstance(value, partial):
        inner = [_named(v) for v in value.args]
        inner += [f"{k}={_named(v)}" for k, v in value.keywords.items()]
        return f"{_named(value.func)}({', '.join(inner)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        inner = [f"{k}={_named(v)}" for k, v in fields.items()]
        return f"{type(value).__qualname__}({', '.join(inner)})"
    name = getattr(value, "__qualname__", None)
    if name is not None:
        return f"{getattr(value, '__module__', '')}.{name}"
    if isinstance(value, np.ndarray | jax.Array):
        digest = hashlib.sha256(np.asarray(value).tobytes()).hexdigest()
        return f"array{np.shape(value)}-{digest[:16]}"
    said = repr(value)
    # an address is another one in the next process
    return type(value).__qualname__ if " at 0x" in said else said


@partial(jax.jit, static_argnums=3)
@full_precision
def _rows_at(prior: Prior, key: Key, start: int | Array, count: int) -> tuple[Array, Key]:
    """Parameters and keys of the rows from a number on."""

    def one(row: Array) -> tuple[Array, Key]:
        prior_key, noise_key = jax.random.split(jax.random.fold_in(key, row))
        return prior.unchecked_sample(prior_key, 1)[0], noise_key

    return jax.vmap(one)(start + jnp.arange(count))


def _tasks(prior: Prior, theta: Array, keys: Key, first: int) -> list[Task]:
    """Number, seed and named parameters of each row."""
    values, seeds = jax.tree.map(np.asarray, prior.structured(theta)), row_seeds(keys)
    return [
        (first + i, seed, jax.tree.map(lambda a, i=i: a[i], values)) for i, seed in enumerate(seeds)
    ]


def _empty(simulator: Outside, n: int) -> dict[str, np.ndarray]:
    """Arrays of n observations, none of which is finished."""
    return {
        name: np.full((n, *shape), np.nan if np.dtype(kind).kind == "f" else 0, kind)
        for name, (shape, kind) in simulator.job.outputs.items()
    }


def _put(
    x: dict[str, np.ndarray], reasons: dict[int, str], number: int, place: int, row: Row
) -> None:
    """Take the outcome of a row."""
    if row.x is None:
        reasons[number] = row.reason
        return
    for name, value in row.x.items():
        x[name][place] = value


def check_simulator(prior: Prior, simulator: Simulator, executor: Executor | None) -> None:
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


def report_failures(sims: Simulations, reasons: Iterable[str], stacklevel: int) -> None:
    """Warn of invalid rows, by what is known of their reasons, at a caller this many levels up."""
    failed = len(sims) - sims.num_valid
    if not failed:
        return
    counts = Counter(reason.split(PRINTED)[0] for reason in reasons)
    counts["gave NaN or infinity"] = failed - counts.total()
    common = [f"{n} {reason}" for reason, n in counts.most_common() if n]
    said = "; ".join(common[:_REASONS]) + ("; ..." if len(common) > _REASONS else "")
    if failed == len(sims):
        raise SimulationFailed(f"all {failed} simulations failed: {said}")
    warnings.warn(
        f"{failed} of {len(sims)} simulations failed: {said}; they are kept, marked invalid, and "
        "left out of training",
        SbiFlowsWarning,
        stacklevel=stacklevel,
    )
