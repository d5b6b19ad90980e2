"""Simulators that are no JAX functions: any Python function, and executables.

Public names: `external_simulator`, `executable`, `ExternalSimulator`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sbi_flows.core.checks import require_count, require_finite, require_positive
from sbi_flows.core.errors import SimulationFailed
from sbi_flows.core.typing import Key, Obs
from sbi_flows.simulations.executors import Executor, Processes, row_seeds
from sbi_flows.simulations.processes import Limits
from sbi_flows.simulations.worker import Job, bare

Shape = tuple[int, ...] | Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ExternalSimulator:
    """A function of a seed and parameters, with what one simulation may take.

    `sf.simulate`, `sf.check` and `sf.predictive_check` take it as they take a JAX function; a
    simulation that raises, hangs, dies or takes too much memory costs one row, whose reason they
    report. It runs in processes of its own, so that it has to be importable there or picklable by
    cloudpickle, and sees no change of this process.

    Attributes:
        job: The function, its outputs and its memory.
        limits: Time and retries.
        executor: Where it runs if `sf.simulate` is not told.
    """

    job: Job
    limits: Limits
    executor: Executor

    def __call__(self, key: Key, theta: Any) -> Obs:
        """One simulation, of named parameters where theta is a dict.

        Raises:
            SimulationFailed: It failed; the message says why.
        """
        theta = jax.tree.map(np.asarray, theta)
        tasks = [(0, row_seeds(key[None])[0], theta)]
        ((_, row),) = self.executor.run(self.job, self.limits, tasks)
        if row.x is None:
            raise SimulationFailed(f"the simulation {row.reason}")
        return bare(row.x)

    def __repr__(self) -> str:
        """The function and its outputs."""
        name = getattr(self.job.function, "__qualname__", repr(self.job.function))
        return f"ExternalSimulator({name}, {self.job.outputs})"


def external_simulator(
    function: Callable[[int, Any], Any] | None = None,
    *,
    shape: Shape,
    dtype: Any = float,
    timeout: float | None = None,
    retries: int = 0,
    memory: float | None = None,
    executor: Executor | None = None,
) -> Any:
    """Make a simulator of any Python function `(seed, theta) -> x`; works as a decorator.

    Args:
        function: It takes a whole number, which all of its randomness should come from, and the
            parameters: a NumPy array, or a dict of them where the prior is named.
        shape: Shape of the array that it returns, or a dict of the shapes of several.
        dtype: Type of their numbers, or a dict of these.
        timeout: Seconds after which a simulation is stopped.
        retries: How often one that failed is run again, with the same seed.
        memory: GiB that a process may take beyond what it has at its start (Linux).
        executor: Where it runs; `Processes()`, as many as there are cores, by default.

    Returns:
        The simulator, or without a function a decorator that makes one.

    Raises:
        ValueError: A shape, a type or a number is none, or memory cannot be limited here.

    Example:
        >>> import jax, numpy as np, numpyro.distributions as dist, sbi_flows as sf
        >>> @external_simulator(shape=(2,), timeout=60.0)
        ... def noisy(seed, theta):
        ...     return theta["rate"] + np.random.default_rng(seed).normal(size=2)
        >>> prior = {"rate": dist.Uniform(0.0, 1.0)}
        >>> sf.simulate(jax.random.key(0), prior, noisy, 10, progress=False)
        Simulations(N=10, D=1, x=float32[2], invalid=0)
    """
    if function is None:
        return functools.partial(
            external_simulator,
            shape=shape,
            dtype=dtype,
            timeout=timeout,
            retries=retries,
            memory=memory,
            executor=executor,
        )
    if not callable(function):
        raise ValueError(f"function: expected one, got {type(function).__name__}")
    require_count(0, retries=retries)
    if timeout is not None:
        require_positive(timeout=timeout)
        require_finite(timeout=timeout)
    if executor is not None and not isinstance(executor, Executor):
        raise ValueError(f"executor: expected one such as Processes(), got {executor!r}")
    job = Job(function, _outputs(shape, dtype), _bytes(memory))
    limits = Limits(seconds=timeout, retries=retries)
    return ExternalSimulator(job, limits, Processes() if executor is None else executor)


def executable(
    arguments: Sequence[str],
    *,
    shape: Shape,
    read: Callable[[Path], Any] | None = None,
    files: Mapping[str, str] | None = None,
    **settings: Any,
) -> ExternalSimulator:
    """Make a simulator of a program that is started anew for each simulation.

    It runs in an empty folder of its own, which is removed afterwards, and without a shell.

    Args:
        arguments: The program and its arguments, in which `{seed}` and the names of the parameters
            in braces stand for their values; of a prior without names, `{theta[0]}` and so on.
        shape: As for `external_simulator`.
        read: What makes the observation of the folder of a run; by default the numbers in the file
            `stdout`, where what the program prints is found, in the order in which they stand
            there.
        files: Files that are written into the folder before, by their names, with the same braces
            (which have to be doubled where they stand for themselves).
        settings: The others of `external_simulator`.

    Returns:
        The simulator. A program that ends with another status than 0 has failed.

    Raises:
        ValueError: There are no arguments, or one of the settings does not fit.

    Example:
        >>> import jax, sys
        >>> script = "import sys; print(float(sys.argv[1]) + 1)"
        >>> program = executable([sys.executable, "-c", script, "{rate}"], shape=(1,))
        >>> program(jax.random.key(0), {"rate": 0.5})
        array([1.5])
    """
    given = isinstance(arguments, str) or not arguments
    if given or not all(isinstance(a, str) for a in arguments):
        raise ValueError(f"arguments: expected a list of strings, got {arguments!r}")
    program = arguments[0]
    if os.sep in program and "{" not in program:  # it runs in another folder
        program = os.path.abspath(program)
    first = shape if isinstance(shape, tuple) else ()
    reader = functools.partial(_numbers, first) if read is None else read
    command = _Command((program, *arguments[1:]), reader, dict(files or {}))
    return external_simulator(command, shape=shape, **settings)


@dataclasses.dataclass(frozen=True)
class _Command:
    arguments: tuple[str, ...]
    read: Callable[[Path], Any]
    files: dict[str, str]

    def __call__(self, seed: int, theta: Any) -> Any:
        values = {"seed": seed, **(theta if isinstance(theta, Mapping) else {"theta": theta})}
        with tempfile.TemporaryDirectory(prefix="simulation-") as name:
            folder = Path(name)
            for file, text in self.files.items():
                (folder / file).write_text(text.format(**values))
            with open(folder / "stdout", "wb") as out:
                arguments = [a.format(**values) for a in self.arguments]
                subprocess.run(arguments, cwd=folder, stdout=out, check=True)
            return self.read(folder)


def _numbers(shape: tuple[int, ...], folder: Path) -> np.ndarray:
    return np.array((folder / "stdout").read_text().split(), float).reshape(shape)


def _outputs(shape: Shape, dtype: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    shapes = dict(shape) if isinstance(shape, Mapping) else {"": shape}
    dtypes = dict(dtype) if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
    if not shapes or set(shapes) != set(dtypes):
        raise ValueError(f"dtype: expected one for each of {sorted(shapes)}, got {sorted(dtypes)}")
    outputs = {}
    for name, sizes in shapes.items():
        if not isinstance(sizes, tuple) or not all(isinstance(n, int) and n >= 0 for n in sizes):
            raise ValueError(f"shape: expected a tuple of whole numbers, got {sizes!r}")
        try:
            kind = np.dtype(dtypes[name])
        except TypeError:
            raise ValueError(f"dtype: expected a type of numbers, got {dtypes[name]!r}") from None
        if kind.kind not in "biuf":
            raise ValueError(f"dtype: expected a type of real numbers, got {kind}")
        outputs[name] = (sizes, kind.str)
    return outputs


def _bytes(memory: float | None) -> int | None:
    if memory is None:
        return None
    require_positive(memory=memory)
    require_finite(memory=memory)
    if sys.platform != "linux":
        raise ValueError(f"memory: expected none on {sys.platform}, where it cannot be limited")
    return int(memory * 2**30)
