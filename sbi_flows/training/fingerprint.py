"""What a fit is made of, as a JSON document that tells it from others.

Public names: `parts`, `unlike`.

Arrays are described by a few random sums, which are the same up to rounding on another machine, or
when the data were simulated again there, and differ if a single row does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.core.typing import Key
from sbi_flows.densities.conditional import Blueprint, graph_of, initial_weights
from sbi_flows.training.devices import words_of
from sbi_flows.training.settings import Training

SUMS = 4

BLOCK = 2**16
"""Rows of an array that are summed at once, which bounds the memory."""

TOLERANCE = 1e-5
"""Difference of a sum from rounding, at the most, in terms of the norm of what is summed."""


def parts(
    key: Key,
    blueprint: Blueprint,
    training: Training,
    data: Mapping[str, Array | np.ndarray],
    **numbers: int | None,
) -> dict[str, dict[str, Any]]:
    """Versions, data, key, density and settings of a fit.

    Args:
        key: Its key.
        blueprint: What is built.
        training: Its settings.
        data: Its arrays, the first axis of each the rows.
        numbers: What else its result depends on.
    """
    words = np.asarray(jax.random.key_data(key)).tolist()
    return {
        "versions": {name: version(name) for name in ("sbi-flows", "jax", "flax", "optax")},
        "data": {name: _sums(value) for name, value in data.items()},
        "key": {"data": words, "kind": str(jax.random.key_impl(key))},
        "density": _density(blueprint),
        "settings": _settings(blueprint, training) | {n: str(v) for n, v in numbers.items()},
    }


def unlike(there: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """Names of what differs, sums by more than rounding."""
    names = {**mine, **there}
    return [n for n in names if n not in there or n not in mine or not _alike(there[n], mine[n])]


def _alike(there: Any, mine: Any) -> bool:
    if not isinstance(there, Mapping) or not isinstance(mine, Mapping):
        return there == mine
    if any(there[name] != mine[name] for name in ("shape", "dtype")):
        return False
    difference = np.abs(np.subtract(there["sums"], mine["sums"]))
    return bool(np.all(difference <= TOLERANCE * max(there["norm"], mine["norm"])))


def _sums(array: Any) -> dict[str, Any]:
    """Sums of all entries, each time with other weights between -1 and 1, and their norm."""
    shape = np.shape(array)
    rows = np.asarray(array).reshape(shape[0], math.prod(shape[1:]))
    columns = _waves(np.arange(rows.shape[1]), 1.0)
    sums, square = np.zeros(SUMS), 0.0
    for first in range(0, len(rows), BLOCK):
        block = np.asarray(rows[first : first + BLOCK], np.float64)
        waves = _waves(first + np.arange(len(block)), math.pi)
        sums += np.einsum("ks,ks->s", block @ columns, waves)
        square += float(np.sum(block**2))
    return {
        "shape": list(shape),
        "dtype": rows.dtype.name,
        "norm": math.sqrt(square),
        "sums": sums.tolist(),
    }


def _waves(places: np.ndarray, rate: float) -> np.ndarray:
    """Weights (n, SUMS) that no pattern of the data follows."""
    rates = rate * np.sqrt([2.0, 3.0, 5.0, 7.0])
    return np.cos((places[:, None] + 1.0) * rates)


def _density(blueprint: Blueprint) -> dict[str, Any]:
    """Its settings; with an embedding, or where these do not tell, its programs as well."""
    said = {
        "density": repr(blueprint.density),
        "features": repr(blueprint.feature_indices),
        "bounded": repr(blueprint.sizes.bounded),
    }
    if blueprint.embedding is None and " at 0x" not in said["density"]:
        return said
    said = {name: _without_addresses(text) for name, text in said.items()}
    given = blueprint.embedding_weights()
    weights = jax.tree.leaves(given)
    said |= {f"weights {i}": _sums(jnp.ravel(leaf)) for i, leaf in enumerate(weights)}
    return said | {"program": _programs(blueprint, given)}


def _programs(blueprint: Blueprint, given: Any) -> str:
    """SHA-256 of what makes the initial weights, and of the loss."""
    key, sizes = jax.random.key(0), blueprint.sizes
    make = partial(initial_weights, blueprint, embedding_weights=given)
    params, rest = jax.eval_shape(make, key)

    def loss(params: Any, rest: Any, key: Key, noise: Array, features: Array) -> Array:
        return nnx.merge(graph_of(blueprint), params, rest).loss(key, noise, features)

    row = [jax.ShapeDtypeStruct((2, width), float) for width in (sizes.dim, sizes.feature_count)]
    return _program(make, key) + _program(loss, params, rest, key, *row)


def _settings(blueprint: Blueprint, training: Training) -> dict[str, Any]:
    """All but where the fit runs and is kept; an optimiser by its program."""
    settings = dataclasses.replace(training.without_checkpoint, devices=None)
    said = {f.name: repr(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    if training.optimizer is None:
        return said
    params = jax.eval_shape(
        partial(initial_weights, blueprint, embedding_weights=None), jax.random.key(0)
    )[0]
    transform = training.transform(1, 1.0)
    state = jax.eval_shape(transform.init, params)
    update = _program(transform.update, params, state, params)
    # a list, so that no message repeats it
    return said | {"optimizer": [_program(transform.init, params), update]}


def _program(function: Any, *arguments: Any) -> str:
    """SHA-256 of a function's operations and constants."""
    program = jax.make_jaxpr(function)(*arguments)
    digest = hashlib.sha256(_without_addresses(str(program)).encode())
    for constant in program.consts:
        digest.update(np.asarray(words_of(constant)).tobytes())
    return digest.hexdigest()


def _without_addresses(text: str) -> str:
    """An address is another one in the next process."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)
