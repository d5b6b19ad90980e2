"""Fingerprint of a fit: a JSON document that identifies its data, key, density and settings.

Public names: `parts`, `differing`.

Each array is described by a few weighted sums of its entries. If the same data are loaded or
simulated again on another machine, the sums agree up to rounding. If a single row differs, the sums
differ.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.core.typing import Key
from sbi_flows.densities.conditional import Blueprint, graph_of, initial_weights
from sbi_flows.networks.embeddings import EmbeddingSettings
from sbi_flows.training.devices import to_numeric
from sbi_flows.training.settings import Training

NUM_SUMS = 4

BLOCK_ROWS = 2**16
"""Number of rows of an array that are summed at once. A small number saves memory."""

TOLERANCE = 1e-5
"""Maximum difference of a sum due to rounding, relative to the norm of the array."""


def parts(
    key: Key,
    blueprint: Blueprint,
    training: Training,
    data: Mapping[str, Array | np.ndarray],
    **numbers: int | None,
) -> dict[str, dict[str, Any]]:
    """Return versions, data, key, density and settings of a fit as JSON data.

    Args:
        key: The user's key.
        blueprint: Description of the model.
        training: Settings of the fit.
        data: Dict of the training arrays; the first axis of each array indexes the rows.
        numbers: Other numbers on which the result of the fit depends.
    """
    return {
        "versions": {name: version(name) for name in ("sbi-flows", "jax", "flax", "optax")},
        "data": {name: _sums(value) for name, value in data.items()},
        "key": {
            "data": np.asarray(jax.random.key_data(key)).tolist(),
            "kind": str(jax.random.key_impl(key)),
        },
        "density": _density(blueprint),
        "settings": _settings(blueprint, training) | {n: str(v) for n, v in numbers.items()},
    }


def differing(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Return the names of the values that differ between two parts of fingerprints.

    Sums that differ only by rounding errors count as equal.
    """
    names = {**present, **saved}
    return [
        name
        for name in names
        if name not in saved or name not in present or not _is_same(saved[name], present[name])
    ]


def _is_same(saved: Any, present: Any) -> bool:
    if not isinstance(saved, Mapping) or not isinstance(present, Mapping):
        return saved == present
    if any(saved[name] != present[name] for name in ("shape", "dtype")):
        return False
    difference = np.abs(np.subtract(saved["sums"], present["sums"]))
    return bool(np.all(difference <= TOLERANCE * max(saved["norm"], present["norm"])))


def _sums(array: Any) -> dict[str, Any]:
    """Describe an array by shape, dtype, norm, and sums of its entries with weights in [-1, 1]."""
    shape = np.shape(array)
    rows = np.asarray(array).reshape(shape[0], math.prod(shape[1:]))
    columns = _waves(np.arange(rows.shape[1]), 1.0)
    sums, square = np.zeros(NUM_SUMS), 0.0
    for first in range(0, len(rows), BLOCK_ROWS):
        block = np.asarray(rows[first : first + BLOCK_ROWS], np.float64)
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
    """Return weights (n, NUM_SUMS): cosines of the places with incommensurate frequencies.

    The weights are not periodic. Any change of a row, or of the order of the rows, therefore
    changes the sums.
    """
    rates = rate * np.sqrt([2.0, 3.0, 5.0, 7.0])
    return np.cos((places[:, None] + 1.0) * rates)


def _density(blueprint: Blueprint) -> dict[str, Any]:
    """Describe the settings of a model.

    If the settings do not identify the model, as with a user's embedding, the description also
    contains hashes of the model's programs.
    """
    described: dict[str, Any] = {
        "density": repr(blueprint.density),
        "features": repr(blueprint.feature_indices),
        "bounded": repr(blueprint.sizes.bounded),
        "linear_start": repr(blueprint.linear_start),
    }
    if blueprint.sizes.circular:
        described["circular"] = repr(blueprint.sizes.circular)
    if blueprint.missing is not None:
        described["missing"] = repr(blueprint.missing)
    if isinstance(blueprint.embedding, EmbeddingSettings):
        described["embedding"] = repr(blueprint.embedding)
    has_settings = blueprint.embedding is None or "embedding" in described
    if has_settings and " at 0x" not in described["density"]:
        return described
    described = {name: _without_addresses(text) for name, text in described.items()}
    embedding_weights = blueprint.embedding_weights()
    for i, leaf in enumerate(jax.tree.leaves(embedding_weights)):
        described[f"weights {i}"] = _sums(np.ravel(leaf))
    return described | {"program": _programs(blueprint, embedding_weights)}


def _programs(blueprint: Blueprint, embedding_weights: Any) -> str:
    """Return SHA-256 hashes of the programs that compute the initial weights and the loss."""
    key, sizes = jax.eval_shape(lambda: jax.random.key(0)), blueprint.sizes

    def make(key: Key) -> tuple[Any, Any]:
        return initial_weights(blueprint, key, embedding_weights)

    def loss(params: Any, rest: Any, key: Key, whitened: Array, features: Array) -> Array:
        return nnx.merge(graph_of(blueprint), params, rest).loss(key, whitened, features)

    params, rest = jax.eval_shape(make, key)
    row = [jax.ShapeDtypeStruct((2, width), float) for width in (sizes.dim, sizes.input_count)]
    return _program(make, key) + _program(loss, params, rest, key, *row)


def _settings(blueprint: Blueprint, training: Training) -> dict[str, Any]:
    """Describe all settings except devices and checkpoint. A user's optimiser is hashed."""
    settings = dataclasses.replace(training.without_checkpoint, devices=None)
    described = {f.name: repr(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    if training.optimizer is None:
        return described
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(lambda key: initial_weights(blueprint, key, None)[0], key)
    transform = training.transform(1, 1.0)
    state = jax.eval_shape(transform.init, params)
    update = _program(transform.update, params, state, params)
    # lists are compared, but not printed in error messages
    return described | {"optimizer": [_program(transform.init, params), update]}


def _program(function: Any, *arguments: Any) -> str:
    """Return a SHA-256 hash of the operations and constants in a traced function."""
    program = jax.make_jaxpr(function)(*arguments)
    digest = hashlib.sha256(_without_addresses(str(program)).encode())
    for constant in program.consts:
        digest.update(np.asarray(to_numeric(constant)).tobytes())
    return digest.hexdigest()


def _without_addresses(text: str) -> str:
    """Remove memory addresses, which differ in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)
