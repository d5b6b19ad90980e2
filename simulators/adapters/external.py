"""Adapters for simulators that JAX cannot trace: Python functions and executables.

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
from sbi_flows.simulations.worker import Job, from_named

Shape = tuple[int, ...] | Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ExternalSimulator:
    """Simulator that runs a Python function in worker processes, with limits on each simulation.

    `sf.simulate`, `sf.check` and `sf.predictive_check` accept this simulator in place of a JAX
    function. A
    simulation fails if it raises an exception, crashes, or exceeds its time or memory limit. A
    failed simulation gives one invalid row, and the reason is reported. The function must be
    importable in the worker processes or picklable by cloudpickle. Worker processes do not see
    variables that are changed later in the main process.

    Attributes:
        job: The function, its outputs and its memory limit.
        limits: Time limit and number of retries.
        executor: Executor that runs the simulations, if `sf.simulate` is called without one.
    """

    job: Job
    limits: Limits
    executor: Executor

    def __call__(self, key: Key, theta: Any) -> Obs:
        """Run one simulation.

        Args:
            key: Random key.
            theta: Parameter vector, or a dict if the prior is named.

        Raises:
            SimulationFailed: The simulation failed; the message gives the reason.
        """
        theta = jax.tree.map(np.asarray, theta)
        tasks = [(0, row_seeds(key[None])[0], theta)]
        ((_, row),) = self.executor.run(self.job, self.limits, tasks)
        if row.x is None:
            raise SimulationFailed(f"the simulation {row.reason}")
        return from_named(row.x)

    def __repr__(self) -> str:
        """Return a string with the name of the function and its outputs."""
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
    """Make a simulator from a Python function `(seed, theta) -> x`; works as a decorator.

    Args:
        function: Function of an integer seed, from which all of its randomness should come, and
            the parameters: a NumPy array, or a dict of arrays if the prior is named.
        shape: Shape of the returned array, or a dict of shapes if it returns a dict.
        dtype: Data type of the returned array, or a dict of types.
        timeout: Time limit of a simulation in seconds.
        retries: Number of times that a failed simulation is repeated, with the same seed.
        memory: Memory in GiB that a worker process may use beyond what it uses at its start
            (Linux only).
        executor: Executor of the simulations, by default `Processes()`: one process per core.

    Returns:
        The simulator, or a decorator if `function` is left out.

    Raises:
        ValueError: An argument has the wrong type or is out of range, or this operating system
            cannot limit memory.

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
        raise ValueError(f"function: expected a function, got {type(function).__name__}")
    require_count(0, retries=retries)
    if timeout is not None:
        require_positive(timeout=timeout)
        require_finite(timeout=timeout)
    if executor is not None and not isinstance(executor, Executor):
        raise ValueError(f"executor: expected an executor such as Processes(), got {executor!r}")
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
    """Make a simulator from a program that is started once for each simulation.

    Each run has its own empty working folder, which is removed afterwards. No shell is used. A run
    fails if its exit status is not 0.

    Args:
        arguments: The program and its arguments. `{seed}` and the parameter names in braces are
            replaced by their values; `{theta[0]}` and so on if the prior has no names.
        shape: As for `external_simulator`.
        read: Function that reads the observation from the working folder. By default it reads all
            numbers in the file `stdout`, which holds the program's output.
        files: Names and contents of input files to write into the working folder. Braces are
            replaced as in `arguments`; double a brace to keep it.
        settings: Further arguments of `external_simulator`.

    Returns:
        The simulator.

    Raises:
        ValueError: `arguments` is not a list of strings or is empty, or a setting is invalid.

    Example:
        >>> import jax, sys
        >>> script = "import sys; print(float(sys.argv[1]) + 1)"
        >>> program = executable([sys.executable, "-c", script, "{rate}"], shape=(1,))
        >>> program(jax.random.key(0), {"rate": 0.5})
        array([1.5])
    """
    is_list = bool(arguments) and not isinstance(arguments, str)
    if not is_list or not all(isinstance(a, str) for a in arguments):
        raise ValueError(f"arguments: expected a list of strings, got {arguments!r}")
    program = arguments[0]
    if os.sep in program and "{" not in program:  # the working folder changes
        program = os.path.abspath(program)
    array_shape = shape if isinstance(shape, tuple) else ()
    reader = functools.partial(_read_numbers, array_shape) if read is None else read
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


def _read_numbers(shape: tuple[int, ...], folder: Path) -> np.ndarray:
    return np.array((folder / "stdout").read_text().split(), float).reshape(shape)


def _outputs(shape: Shape, dtype: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    shapes = dict(shape) if isinstance(shape, Mapping) else {"": shape}
    dtypes = dict(dtype) if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
    if not shapes or set(shapes) != set(dtypes):
        raise ValueError(
            f"dtype: expected a type for each of {sorted(shapes)}, got {sorted(dtypes)}"
        )
    outputs = {}
    for name, sizes in shapes.items():
        if not isinstance(sizes, tuple) or not all(isinstance(n, int) and n >= 0 for n in sizes):
            raise ValueError(f"shape: expected a tuple of integers >= 0, got {sizes!r}")
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
        raise ValueError(f"memory: expected None, as {sys.platform} cannot limit it, got {memory}")
    return int(memory * 2**30)
