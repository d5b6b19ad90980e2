"""Precision of matrix products: full by default, lower if the user requests it.

By default JAX computes products of 32-bit matrices with a mantissa of 10 bits on an NVIDIA GPU
(TensorFloat-32) and of 7 bits on a TPU (bfloat16). With products of this precision, the density of
a flow would not integrate to one, and would disagree with the distribution of the flow's draws.

Public names: `FULL`, `full_precision`, `precision_context`, `inherit_precision`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

FULL = jax.lax.Precision.HIGHEST
"""Full precision. Bijectors always use it, even if the networks use a lower precision."""


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function compute its matrix products in full precision.

    A precision that the user has set with `jax.default_matmul_precision` takes priority. Apply
    this decorator to the function that `jax.jit` traces. A context around the call of a jitted
    function has no effect in other threads that compile it.

    Example:
        >>> import jax.numpy as jnp
        >>> square = full_precision(lambda a: a @ a)
        >>> jax.make_jaxpr(square)(jnp.ones((2, 2))).eqns[0].params["precision"][0].name
        'HIGHEST'
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision(_user_precision() or "highest"):
            return function(*args, **kwargs)

    return wrapped


def precision_context(precision: str | None) -> AbstractContextManager[None]:
    """Return a context in which matrix products use the given precision.

    "bfloat16" rounds both factors to bfloat16 and sums their products in 32 bits, also on a GPU.
    (On a GPU, JAX's setting of the same name would select TensorFloat-32.)

    Args:
        precision: A name that `jax.default_matmul_precision` accepts. None changes nothing.
    """
    if precision is None:
        return nullcontext()
    gpu_names = {"bfloat16": "BF16_BF16_F32"} if jax.default_backend() == "gpu" else {}
    return jax.default_matmul_precision(gpu_names.get(precision, precision))


def inherit_precision() -> Callable[[], None]:
    """Return a function that sets the current matrix precision in another thread.

    Call the returned function in the other thread. It is needed because JAX keeps a separate
    setting of `jax.default_matmul_precision` in each thread.
    """
    precision = _user_precision()

    def adopt() -> None:
        if precision is not None:
            # never exited: the setting is local to the thread and ends with it
            jax.default_matmul_precision(precision).__enter__()

    return adopt


def _user_precision() -> str | None:
    """Return the precision that the user has set in this thread; None if there is none."""
    return getattr(jax.config, "jax_default_matmul_precision", None)
