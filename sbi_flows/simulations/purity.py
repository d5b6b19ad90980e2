"""Test that all random numbers of a JAX simulator come from its random key.

JAX runs the Python code of a simulator once, when it traces it. A random number that NumPy draws in
this run becomes a constant of the compiled program, and so does noise from a constant key. All
simulations then have the same noise, and the posterior is far too narrow.

Public names: `trace_pure`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr

from sbi_flows.core.typing import Simulator

KEY_POSITION = -2
"""Position of the random keys among the inputs of the compiled call of `batching`."""

_DRAWS = {"random_bits", "random_gamma", "rng_bit_generator", "rng_uniform", "threefry2x32"}
"""Names of JAX's primitives that return random numbers."""

_EXPECTED = "simulator: expected random numbers only from its argument `key`, got "

_SAME_NOISE = "all simulations would have the same noise. "

_USE_KEY = (
    "Use jax.random with the key, for example jax.random.normal(key, shape); for NumPy code use "
    "simulators.external_simulator"
)

_OUTSIDE = "; draw constants, such as a design matrix, outside of the simulator"

_GLOBAL_STATE = (
    f"draws of numpy.random, which JAX takes as constants: {_SAME_NOISE}{_USE_KEY}{_OUTSIDE}"
)

_OTHER_CONSTANTS = (
    "constants that differ from one trace to the next, for example draws of a NumPy generator or "
    f"of Python's random: {_SAME_NOISE}{_USE_KEY}"
)

_CONSTANT_KEY = (
    "an output {} with random numbers from a constant key, such as jax.random.key(0), and none "
    f"from `key`: {_SAME_NOISE}Make all keys from the argument, for example by "
    f"jax.random.split(key){_OUTSIDE}"
)

_MESSAGES: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""Error message of each tested function; empty if it passed. JAX caches traces by function, so that
a later trace would not run the Python code again."""


def trace_pure(simulator: Simulator, trace: Callable[[Simulator, bool], Any]) -> Any:
    """Trace a simulator, and test that its random numbers come from its key.

    The test traces the function a second time. Each function is tested only once.

    Args:
        simulator: The simulator.
        trace: Function that traces a compiled call of a simulator and returns a
            `jax.stages.Traced`. If its second argument is True, it bypasses JAX's cache of traces.

    Returns:
        The trace of the simulator, from JAX's cache if it is there.

    Raises:
        ValueError: The simulator uses NumPy's global generator; its constants differ
            between two traces; or an output has noise from a constant key only.
    """
    message = _message_of(simulator)
    if message:
        raise ValueError(message)
    before = _global_state()
    traced = trace(simulator, False)
    if message is not None:
        return traced
    first, plain = traced, simulator
    if isinstance(simulator, jax.stages.Wrapped):
        # JAX may have traced the function inside `jax.jit` before, so trace the function itself
        plain = simulator.__wrapped__  # type: ignore[attr-defined]  # jit keeps its function
        first = trace(plain, True)
    second = trace(plain, True)
    message = ""
    if _global_state() != before and _draws_again(partial(trace, plain, True)):
        message = _EXPECTED + _GLOBAL_STATE
    elif not _has_equal_constants(first.jaxpr, second.jaxpr):
        message = _EXPECTED + _OTHER_CONSTANTS
    elif names := _outputs_of_constant_keys(first):
        message = _EXPECTED + _CONSTANT_KEY.format(", ".join(names))
    _remember(simulator, message)
    if message:
        raise ValueError(message)
    return traced


def _message_of(simulator: Simulator) -> str | None:
    """Return the stored error message of a simulator; None if it was not tested."""
    try:
        return _MESSAGES.get(simulator)
    except TypeError:  # an object without hash or weak references
        return None


def _remember(simulator: Simulator, message: str) -> None:
    try:
        _MESSAGES[simulator] = message
    except TypeError:
        pass


def _global_state() -> list[bytes]:
    """Return the state of NumPy's global generator.

    The state of Python's `random` is not compared, because type checkers such as beartype draw from
    it during a trace.
    """
    state = np.random.get_state(legacy=False)  # noqa: NPY002
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def _draws_again(trace: Callable[[], Any]) -> bool:
    """Return whether another trace changes NumPy's state too; another thread may have drawn."""
    before = _global_state()
    trace()
    return _global_state() != before


def _has_equal_constants(first: ClosedJaxpr, second: ClosedJaxpr) -> bool:
    """Return whether two programs contain the same constants in the same order."""
    left, right = list(_constants(first)), list(_constants(second))
    return len(left) == len(right) and all(map(_is_equal, left, right))


def _is_equal(a: Any, b: Any) -> bool:
    """Return whether two constants have equal shape, dtype and bits."""
    if a is b:
        return True
    x, y = _as_numpy(a), _as_numpy(b)
    return x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes()


def _as_numpy(constant: Any) -> np.ndarray:
    """Convert a constant to a NumPy array; random keys are converted to their data."""
    is_key = jnp.issubdtype(getattr(constant, "dtype", float), jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(constant) if is_key else constant)


def _constants(program: ClosedJaxpr | Jaxpr) -> Iterator[Any]:
    """Yield the constants of a program and of the programs nested in it."""
    if isinstance(program, ClosedJaxpr):
        yield from program.consts
    for equation in _equations(program):
        yield from (v.val for v in equation.invars if isinstance(v, Literal))
        for part in _parts(equation):
            yield from _constants(part)


def _outputs_of_constant_keys(traced: Any) -> list[str]:
    """Return the names of outputs that depend on random numbers but not on the argument `key`."""
    program = traced.jaxpr.jaxpr
    if not _draws(program):
        return []
    names, paths = [], jax.tree_util.tree_leaves_with_path(traced.out_info)
    for i, (path, _) in enumerate(paths):
        needed, is_used = dce_jaxpr(program, [i == j for j in range(len(paths))])
        if not is_used[KEY_POSITION] and _draws(needed):
            names.append(jax.tree_util.keystr(path, simple=True, separator=".") or "x")
    return names


def _draws(program: ClosedJaxpr | Jaxpr) -> bool:
    """Return whether a program draws random numbers."""
    return any(
        equation.primitive.name in _DRAWS or any(map(_draws, _parts(equation)))
        for equation in _equations(program)
    )


def _equations(program: ClosedJaxpr | Jaxpr) -> Any:
    return program.eqns


def _parts(equation: Any) -> Iterator[ClosedJaxpr | Jaxpr]:
    """Yield the programs nested in an equation, for example the body of a loop."""
    for value in equation.params.values():
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, ClosedJaxpr | Jaxpr):
                yield part
