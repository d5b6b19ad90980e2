"""Check a simulator, its executor and its outputs before the first simulation.

Public names: `check_executor`, `check_outputs`, `row_outputs`, `simulator_identity`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from functools import partial
from typing import Any

import jax
import numpy as np

from sbi_flows.core.checks import require_object, require_real
from sbi_flows.core.typing import Key, Simulator
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.batching import CallPlan, trace_call, with_current_state
from sbi_flows.simulations.executors import Executor, External
from sbi_flows.simulations.purity import trace_pure
from sbi_flows.simulations.worker import from_named, to_named


def check_executor(simulator: Simulator, executor: Executor | None) -> None:
    """Raise ValueError if the simulator is a JAX function but an executor is given."""
    if executor is None:
        return
    if not isinstance(simulator, External):
        raise ValueError(
            "executor: expected None with a simulator that is a JAX function, got "
            f"{type(executor).__name__}"
        )
    require_object("executor", executor, Executor, "one such as sf.Processes()")


def check_outputs(key: Key, prior: Prior, simulator: Simulator, plan: CallPlan) -> Any:
    """Trace a JAX simulator; return shape and dtype of each array of one observation.

    The simulator is traced for a compiled call of the size `plan`, and JAX reuses this trace when
    it compiles the call.

    Returns:
        A tree of `jax.ShapeDtypeStruct`.

    Raises:
        ValueError: JAX cannot trace the simulator; its random numbers do not come from its key; it
            does not return real numbers; or the prior has an offset.
    """
    if prior.layout.offset:
        labels = ", ".join(n for n, c in zip(prior.labels, prior.layout.offset, strict=True) if c)
        raise ValueError(
            f"simulator: expected an external simulator, because single precision cannot represent "
            f"{labels}, got a JAX function; use simulators.external_simulator, "
            "jax.config.update('jax_enable_x64', True), or a prior of the difference from a fixed "
            "value, and add this value in the simulator"
        )
    try:
        traced = trace_pure(simulator, partial(trace_call, key, prior, plan))
    except (jax.errors.JAXTypeError, jax.errors.NonConcreteBooleanIndexError) as error:
        raise ValueError(
            "simulator: expected a function that JAX can trace (jax.numpy, no branches on values "
            f"in Python), got {type(error).__name__}: {error}"
        ) from error
    outputs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), traced.out_info)
    leaves = jax.tree.leaves(outputs)
    for leaf in leaves:
        require_real("simulator", leaf.dtype)
    if not any(leaf.size for leaf in leaves):
        raise ValueError(f"simulator: expected numeric arrays, got {outputs}")
    return outputs


def row_outputs(simulator: Simulator | External, prior: Prior) -> Any:
    """Return shape and dtype of each array of one observation, as `check_outputs` does.

    An external simulator declares its outputs. A JAX simulator is traced for one row.
    """
    if isinstance(simulator, External):
        arrays = simulator.job.outputs.items()
        return from_named(
            {n: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for n, (shape, dtype) in arrays}
        )
    run = with_current_state(simulator)
    return check_outputs(jax.random.key(0), prior, run, CallPlan(1, None))


def simulator_identity(simulator: Simulator | External, outputs: Any) -> dict[str, Any]:
    """Describe a simulator as JSON data, to compare it with the simulator of a later process.

    Args:
        simulator: The simulator.
        outputs: Shape and dtype of each array, as `check_outputs` and `row_outputs` return them.

    Returns:
        The name of the function, and shape and dtype of each array by name, as JSON data.

    Raises:
        ValueError: The observation is neither an array nor a dict of arrays.
    """
    function = simulator.job.function if isinstance(simulator, External) else simulator
    arrays = to_named(outputs)
    if not all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in arrays.values()):
        raise ValueError(f"simulator: expected an array or a dict of arrays, got {outputs}")
    shapes = {name: [list(leaf.shape), leaf.dtype.str] for name, leaf in arrays.items()}
    return {"name": _name_of(function), "outputs": shapes}


def _name_of(value: Any) -> str:
    """Return the name of a function or callable object. It is the same in every process."""
    if isinstance(value, partial):
        arguments = [_name_of(v) for v in value.args]
        arguments += [f"{k}={_name_of(v)}" for k, v in value.keywords.items()]
        return f"{_name_of(value.func)}({', '.join(arguments)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        arguments = [f"{k}={_name_of(v)}" for k, v in fields.items()]
        return f"{type(value).__qualname__}({', '.join(arguments)})"
    name = getattr(value, "__qualname__", None)
    if name is not None:
        return f"{getattr(value, '__module__', '')}.{name}"
    if isinstance(value, np.ndarray | jax.Array):
        digest = hashlib.sha256(np.asarray(value).tobytes()).hexdigest()
        return f"array{np.shape(value)}-{digest[:16]}"
    text = repr(value)
    # remove memory addresses, which differ from process to process
    return type(value).__qualname__ if " at 0x" in text else text
