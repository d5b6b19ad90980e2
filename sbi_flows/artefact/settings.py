"""Codec of settings objects. A table lists the classes that can be saved.

The settings of a density, or of a part of a density, are written as
`{"type": name, "fields": {...}}`. Names from a file are looked up in the table below only, never in
a Python module. Each value must have the annotated type of its field; the constructor of the class
then checks the value as usual.

Public names: `encode`, `decode`, `DENSITIES`, `EMBEDDINGS`, `PATTERNS`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any, Literal, Union

import jax
import numpy as np

from sbi_flows.artefact.strict import (
    expect_fields,
    expect_integer,
    expect_list,
    expect_number,
    expect_type,
)
from sbi_flows.core.errors import ArtefactError
from sbi_flows.densities.cnf import CNF
from sbi_flows.densities.distilled import Distilled
from sbi_flows.densities.flow import MAF, NSF
from sbi_flows.densities.matching import Diffusion, FlowMatching
from sbi_flows.densities.mixture import GaussianMixture
from sbi_flows.densities.ode import Solver
from sbi_flows.densities.paths import EDM, VE, VP, Path, Straight
from sbi_flows.densities.samplers import Ancestral, Heun, Sampler
from sbi_flows.networks.embeddings import (
    ConvNet,
    DeepSet,
    EmbeddingSettings,
    Fusion,
    SeriesNet,
    SetTransformer,
    Summaries,
)
from sbi_flows.networks.tokens import Tokens
from sbi_flows.networks.velocity import Film, VelocitySettings
from sbi_flows.observations.missing import RandomEntries, RandomParts, RandomSubset

DENSITIES = (NSF, MAF, GaussianMixture, CNF, FlowMatching, Diffusion, Distilled)
EMBEDDINGS = (DeepSet, SetTransformer, SeriesNet, ConvNet, Fusion, Summaries)
PATTERNS = (RandomEntries, RandomSubset, RandomParts)

_KINDS: dict[Any, tuple[type, ...]] = {
    VelocitySettings: (Film, Tokens),
    Path: (Straight, EDM, VP, VE),
    Sampler: (Heun, Ancestral),
    EmbeddingSettings: EMBEDDINGS,
}
"""Dict from each protocol that annotates a field to the classes that implement it."""

SETTINGS = {
    kind.__name__: kind
    for kinds in (DENSITIES, PATTERNS, (Solver,), *_KINDS.values())
    for kind in kinds
}

# solvers and adjoints of diffrax for ordinary differential equations
METHODS = (
    *("Bosh3", "Dopri5", "Dopri8", "Euler", "Heun", "Midpoint", "Ralston", "Tsit5"),
    *("Kvaerno3", "Kvaerno4", "Kvaerno5", "ImplicitEuler"),
)
ADJOINTS = ("RecursiveCheckpointAdjoint", "DirectAdjoint", "ImplicitAdjoint", "BacksolveAdjoint")

MAX_LAYERS = 128
"""Maximum number of layers of one kind in a density. It limits the time to build the density."""

MAX_TUPLE_LENGTH = 2**16
MAX_INTEGER = 2**31 - 1

_LAYER_FIELDS = {"blocks", "context_blocks", "hidden", "layers", "parts", "rounds"}


def encode(name: str, value: Any) -> Any:
    """Convert settings to JSON data.

    Args:
        name: Name of the settings, for error messages.
        value: A settings object, or the value of a field of a settings object.

    Raises:
        ValueError: The class of the object, or of one of its fields, is not in the table.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating) and math.isfinite(value):
        return float(value)
    if isinstance(value, tuple):
        return [encode(name, part) for part in value]
    kind = type(value).__name__
    if type(value) is SETTINGS.get(kind):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(SETTINGS[kind])}
        return {"type": kind, "fields": {n: encode(f"{name}.{n}", v) for n, v in parts.items()}}
    if kind in (*METHODS, *ADJOINTS) and _is_plain_diffrax(value):
        return {"type": kind, "fields": {}}
    raise ValueError(
        f"{name}: expected an object of this library that can be saved ({', '.join(SETTINGS)}), or "
        f"a solver or adjoint of diffrax as it is made without arguments, got {value!r:.200}"
    )


def decode(name: str, value: Any, *allowed: type) -> Any:
    """Convert JSON data to settings of one of the allowed classes.

    Args:
        name: Name of the settings, for error messages.
        value: The data.
        *allowed: Allowed classes.

    Raises:
        ArtefactError: The class in the data is not allowed, or the data do not fit its fields.
    """
    kind, data = expect_fields(name, value, "type", "fields")
    known = {each.__name__: each for each in allowed}
    if not isinstance(kind, str) or kind not in known:
        raise ArtefactError(f"{name}: expected one of {sorted(known)}, got {kind!r:.80}")
    annotations = _annotations(known[kind])
    data = expect_type(f"{name}.fields", data, dict, "an object")
    if not data.keys() <= annotations.keys():
        unknown = sorted(data.keys() - annotations.keys())[:5]
        raise ArtefactError(f"{name}: expected fields of {kind}, got {unknown}")
    values = {n: _value(f"{name}.{n}", n, v, annotations[n]) for n, v in data.items()}
    try:
        return known[kind](**values)
    except (ValueError, TypeError) as error:
        raise ArtefactError(f"{name}: {error}") from None


@functools.cache
def _annotations(kind: type) -> dict[str, Any]:
    """Return the annotated type of each field of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _value(name: str, field: str, value: Any, hint: Any) -> Any:
    """Convert the JSON value of a field to its annotated type; raise ArtefactError on failure."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _any_of(name, field, value, parts)
    if origin is Literal:
        if value not in parts or not isinstance(value, str):
            raise ArtefactError(f"{name}: expected one of {parts}, got {value!r:.80}")
        return value
    if origin is tuple:
        most = MAX_LAYERS if field in _LAYER_FIELDS else MAX_TUPLE_LENGTH
        values = expect_list(name, value, most)
        hints = parts[:1] * len(values) if parts[1:] == (...,) else parts
        if len(hints) != len(values):
            raise ArtefactError(f"{name}: expected {len(hints)} values, got {len(values)}")
        pairs = enumerate(zip(values, hints, strict=True))
        return tuple(_value(f"{name}[{i}]", "", part, own) for i, (part, own) in pairs)
    if hint is str:
        return expect_type(name, value, str, "a string")
    if hint is bool:
        return expect_type(name, value, bool, "a truth value")
    if hint is int:
        most = MAX_LAYERS if field in _LAYER_FIELDS else MAX_INTEGER
        return expect_integer(name, value, -MAX_INTEGER, most)
    if hint is float:
        return expect_number(name, value)
    if hint is Any:
        return None if value is None else _of_diffrax(name, field, value)
    return decode(name, value, *_KINDS.get(hint, (hint,)))


def _any_of(name: str, field: str, value: Any, hints: tuple) -> Any:
    """Convert a JSON value to the first type of a union that accepts the value."""
    if value is None and type(None) in hints:
        return None
    hints = tuple(hint for hint in hints if hint is not type(None))
    kinds = [kind for hint in hints for kind in _KINDS.get(hint, (hint,))]
    if all(isinstance(kind, type) and kind in SETTINGS.values() for kind in kinds):
        return decode(name, value, *kinds)
    for hint in hints[:-1]:
        try:
            return _value(name, field, value, hint)
        except ArtefactError:
            continue
    return _value(name, field, value, hints[-1])


def _of_diffrax(name: str, field: str, value: Any) -> Any:
    """Create a solver or an adjoint of diffrax with its default arguments."""
    import diffrax

    kind, data = expect_fields(name, value, "type", "fields")
    known = METHODS if field == "method" else ADJOINTS
    if kind not in known or data != {}:
        raise ArtefactError(f"{name}: expected one of {known} without fields, got {kind!r:.80}")
    return getattr(diffrax, kind)()


def _is_plain_diffrax(value: Any) -> bool:
    """Return whether a diffrax object has only default arguments."""
    import diffrax

    kind = getattr(diffrax, type(value).__name__, None)
    if kind is None or type(value) is not kind:
        return False
    (leaves, tree), (defaults, default_tree) = (jax.tree.flatten(v) for v in (value, kind()))
    is_same_tree = tree == default_tree and len(leaves) == len(defaults)
    return is_same_tree and all(map(np.array_equal, leaves, defaults))
