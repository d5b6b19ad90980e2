"""Codec of direct posteriors: prior, observation, networks, standardiser and typicality test.

Files may come from unknown sources, so everything in a file is checked. First, `require_header`
checks the JSON document and `require_tensors` checks the table of tensors; neither reads an array.
Then `decode` reads the arrays, whose sizes have been checked.

Public names: `Contents`, `encode`, `DirectHeader`, `require_header`, `require_tensors`, `decode`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sbi_flows.artefact import embeddings, ensembles, gates, priors
from sbi_flows.artefact.container import ArtefactFile, Entry
from sbi_flows.artefact.distributions import Tensors
from sbi_flows.artefact.layers import SavedPosterior
from sbi_flows.artefact.strict import (
    expect_fields,
    expect_integer,
    expect_list,
    expect_number,
    expect_type,
)
from sbi_flows.core.doubles import HALF_ULP, MAX_ROUNDING, is_single_precision
from sbi_flows.core.errors import ArtefactError
from sbi_flows.core.record import ReadOnlyDict
from sbi_flows.core.typing import Obs
from sbi_flows.densities.conditional import Blueprint, Weights
from sbi_flows.densities.embedded import space_widths
from sbi_flows.densities.embedding import Embedding
from sbi_flows.observations.origin import Origin
from sbi_flows.observations.standardise import Standardiser, entry_count
from sbi_flows.observations.typicality import Typicality
from sbi_flows.posteriors.codec_rows import ROWS, require_hashes, require_rows
from sbi_flows.prior.checks import MAX_ENTRIES
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.fingerprints import UsedRows

_PRECISIONS = ("float32", "float64")
_STANDARDISER = ("standardiser/center", "standardiser/scale", "standardiser/floor")
MAX_FLOAT_EXPONENT = 1100
"""Largest absolute exponent of an origin: float64 has exponents from -1074 to 1023."""

_CAN_MISS = "standardiser/can_miss"
_ORIGIN = {"high": "float32", "low": "float32", "exponent": "int32"}
_FIELD_NAMES = (
    *("format", "written_by", "precision", "prior", "observation", "linear"),
    *("ensembles", "typicality", "record"),
)


class Contents(NamedTuple):
    """The attributes of a direct posterior; see `Posterior`."""

    prior: Prior
    blueprints: tuple[Blueprint, ...]
    weights: tuple[Weights, ...]
    shares: tuple[float, ...]
    standardiser: Standardiser
    observation: Obs
    record: Mapping[str, Any]
    typicality: Typicality | None
    used_rows: UsedRows | None


def encode(contents: Contents) -> SavedPosterior:
    """Convert a direct posterior to JSON fields and tensors.

    Raises:
        ValueError: The class of a density, network or solver is not in this library, or the
            observation has containers other than dicts, lists and tuples.
    """
    standardiser, tensors = contents.standardiser, Tensors()
    precision = np.dtype(standardiser.center.dtype).name
    prior = priors.encode(contents.prior, tensors)
    for name, array in zip(_STANDARDISER, standardiser[:3], strict=True):
        tensors[name] = np.asarray(array)
    if standardiser.origin is not None:
        for name, dtype in _ORIGIN.items():
            array = np.asarray(getattr(standardiser.origin, name))
            tensors[f"standardiser/{name}"] = array.astype(dtype)
    parts = zip(contents.blueprints, contents.weights, contents.shares, strict=True)
    written = []
    for i, (blueprint, weights, share) in enumerate(parts):
        x64 = precision == "float64"
        part = ensembles.encode(i, blueprint, weights, contents.observation, x64, tensors)
        written.append({**part, "share": float(share)})
    document = {
        "precision": precision,
        "prior": prior,
        "observation": ensembles.encode_observation(contents.observation),
        "linear": float(standardiser.linear),
        "ensembles": written,
        "typicality": gates.encode(contents.typicality, tensors),
    }
    if contents.used_rows is not None:
        tensors[ROWS] = contents.used_rows.hashes
    # written only if they are needed
    if standardiser.origin is not None:
        document["has_origin"] = True
    if standardiser.can_miss is not None:
        document["has_missing"] = True
        tensors[_CAN_MISS] = np.asarray(standardiser.can_miss, np.uint8)
    return SavedPosterior(document, tensors, contents.record)


class DirectHeader(NamedTuple):
    """Validated JSON data of a direct posterior, before its arrays are read.

    Attributes:
        precision: Precision in which the file was written: "float32" or "float64".
        prior: JSON data of the prior.
        bounded: Whether each standard coordinate of the prior is bounded.
        observation: Shape and dtype of one observation.
        linear: Half-width of the standardiser's linear range.
        has_origin: Whether the standardiser removes an origin in double precision.
        has_missing: Whether entries of an observation can be missing.
        ensembles: Description of each ensemble of networks.
        shares: Weight of each ensemble in the mixture.
        needs_embedding: For each ensemble, whether the user must supply its embedding.
        spaces: Number of spaces of the typicality test; 0 if the posterior has none.
        record: Attribute `record` of the posterior.
    """

    precision: str
    prior: dict[str, Any]
    bounded: tuple[bool, ...]
    observation: Obs
    linear: float
    has_origin: bool
    has_missing: bool
    ensembles: tuple[ensembles.Ensemble, ...]
    shares: tuple[float, ...]
    needs_embedding: tuple[bool, ...]
    spaces: int
    record: dict[str, Any]


def require_header(
    document: Mapping[str, Any], user_embeddings: list[Embedding | None]
) -> DirectHeader:
    """Check the JSON document of a file.

    Args:
        document: The JSON document, without the list of layers.
        user_embeddings: Embeddings that the user supplied; [None] if none were supplied.

    Raises:
        ArtefactError: The document is malformed, or an embedding is missing.
    """
    document = dict(document)
    has_origin = expect_type("has_origin", document.pop("has_origin", False), bool, "a flag")
    has_missing = expect_type("has_missing", document.pop("has_missing", False), bool, "a flag")
    _, _, precision, prior, observation, linear, parts, spaces, record = expect_fields(
        "document", document, *_FIELD_NAMES
    )
    if precision not in _PRECISIONS:
        raise ArtefactError(f"precision: expected one of {_PRECISIONS}, got {precision!r:.80}")
    spaces = expect_integer("typicality", spaces, 0, gates.MAX_SPACES)
    record = expect_type("record", record, dict, "an object")
    observation = ensembles.decode_observation(observation, keep_doubles=has_origin)
    parts, shares = _shares(parts)
    needs_embedding = tuple(embeddings.is_users(part.get("embedding")) for part in parts)
    bounded = _bounded(prior)
    coordinates = ensembles.Coordinates(bounded, priors.circular_of(prior))
    ensemble_parts = tuple(
        ensembles.decode(i, part, coordinates, observation, embedding, has_missing)
        for i, (part, embedding) in enumerate(
            zip(parts, _embedding_of_each(user_embeddings, needs_embedding), strict=True)
        )
    )
    return DirectHeader(
        precision=precision,
        prior=prior,
        bounded=bounded,
        observation=observation,
        linear=expect_number("linear", linear),
        has_origin=has_origin,
        has_missing=has_missing,
        ensembles=ensemble_parts,
        shares=shares,
        needs_embedding=needs_embedding,
        spaces=spaces,
        record=record,
    )


def require_tensors(header: DirectHeader, table: Mapping[str, Entry]) -> set[str]:
    """Check that a table contains all tensors of a direct posterior; return their names.

    Raises:
        ArtefactError: A tensor is missing, or has a wrong shape or dtype.
    """
    size = entry_count(header.observation)
    for name in _STANDARDISER:
        ensembles.require_entry(name, Entry(np.dtype(header.precision), (size,), 0), table)
    origin = {f"standardiser/{n}": np.dtype(d) for n, d in _ORIGIN.items() if header.has_origin}
    for name, dtype in origin.items():
        ensembles.require_entry(name, Entry(dtype, (size,), 0), table)
    masks = {_CAN_MISS} if header.has_missing else set()
    for name in masks:
        ensembles.require_entry(name, Entry(np.dtype(np.uint8), (size,), 0), table)
    names = {
        *_STANDARDISER,
        *origin,
        *masks,
        *priors.tensor_names(header.prior),
        *gates.names(header.spaces, header.has_missing),
        *require_rows(ROWS, table),
    }
    x64 = header.precision == "float64"
    for ensemble, is_users in zip(header.ensembles, header.needs_embedding, strict=True):
        names |= ensembles.require(ensemble, is_users, table, x64)
    return names


def decode(header: DirectHeader, file: ArtefactFile, user_prior: Prior | None) -> Contents:
    """Read the arrays of a direct posterior.

    Args:
        header: Validated JSON data of the posterior. Call `require_tensors` before this function.
        file: The file.
        user_prior: The prior that the user supplied, or None.

    Raises:
        ArtefactError: An array has invalid values; a prior is needed but was not supplied; or the
            supplied prior or embedding differs from the saved one.
    """
    arrays = {name: file.tensor(name) for name in priors.tensor_names(header.prior)}
    prior = priors.decode(header.prior, arrays, user_prior)
    dtype = jnp.result_type(float)
    center, scale, floor = (jnp.asarray(file.tensor(name), dtype) for name in _STANDARDISER)
    if header.precision == "float64" and is_single_precision():
        _require_resolved(*(file.tensor(name) for name in _STANDARDISER[:2]))
    weights = tuple(ensembles.weights_of(ensemble, file.tensor) for ensemble in header.ensembles)
    for ensemble, stacked, is_users in zip(
        header.ensembles, weights, header.needs_embedding, strict=True
    ):
        if is_users:
            embeddings.require_same_outputs(
                ensemble.blueprint, stacked, file.tensor(ensemble.probe_name)
            )
    blueprints = tuple(ensemble.blueprint for ensemble in header.ensembles)
    can_miss = jnp.asarray(file.tensor(_CAN_MISS)) if header.has_missing else None
    features = len(center) * (2 if header.has_missing else 1)
    sizes = space_widths(blueprints[0], weights[0], features) if header.spaces else ()
    origin = _origin(header, file)
    return Contents(
        prior=prior,
        blueprints=blueprints,
        weights=weights,
        shares=header.shares,
        standardiser=Standardiser(center, scale, floor, header.linear, origin, can_miss),
        observation=header.observation,
        record=ReadOnlyDict(header.record),
        typicality=gates.decode(header.spaces, header.has_missing, sizes, file.table, file.tensor),
        used_rows=require_hashes(ROWS, file.tensor(ROWS)) if ROWS in file.table else None,
    )


def _require_resolved(center: np.ndarray, scale: np.ndarray) -> None:
    """Raise ArtefactError if single precision cannot hold the observations of the fit."""
    if np.any(HALF_ULP * np.abs(center) > MAX_ROUNDING * scale):
        raise ArtefactError(
            "observation: expected values that single precision resolves, got a file that was "
            "written in double precision; call jax.config.update('jax_enable_x64', True) first"
        )


def _origin(header: DirectHeader, file: ArtefactFile) -> Origin | None:
    if not header.has_origin:
        return None
    arrays = {n: file.tensor(f"standardiser/{n}") for n in _ORIGIN}
    is_bounded = np.all(np.abs(arrays["exponent"].astype(np.int64)) <= MAX_FLOAT_EXPONENT)
    if not is_bounded or not all(np.all(np.isfinite(a)) for a in arrays.values()):
        raise ArtefactError("standardiser: expected a finite offset and exponent, got others")
    return Origin(**{n: jnp.asarray(a) for n, a in arrays.items()})


def _shares(value: Any) -> tuple[list[dict[str, Any]], tuple[float, ...]]:
    """Return the JSON data of the ensembles, and their weights in the mixture."""
    parts = expect_list("ensembles", value, ensembles.MAX_ENSEMBLES)
    parts = [dict(expect_type("ensembles", part, dict, "an object")) for part in parts]
    shares = tuple(expect_number("share", part.pop("share", None)) for part in parts)
    if not shares or min(shares) <= 0.0 or abs(sum(shares) - 1.0) > 1e-6:
        raise ArtefactError(f"share: expected positive numbers of sum 1, got {shares!r:.80}")
    return parts, shares


def _bounded(prior: Any) -> tuple[bool, ...]:
    """Read from a prior's JSON data whether each standard coordinate is bounded."""
    flags = expect_type("prior", prior, dict, "an object").get("bounded")
    flags = expect_list("prior.bounded", flags, MAX_ENTRIES)
    return tuple(expect_type("prior.bounded", flag, bool, "truth values") for flag in flags)


def _embedding_of_each(
    user_embeddings: list[Embedding | None], needs_embedding: tuple[bool, ...]
) -> list[Embedding | None]:
    """Return the user's embedding for each ensemble; a single embedding is used for all of them."""
    count = sum(needs_embedding)
    if user_embeddings == [None]:
        return [None] * len(needs_embedding)
    if len(user_embeddings) not in (1, count) or not count:
        raise ArtefactError(f"embedding: expected {count} embeddings, got {len(user_embeddings)}")
    remaining = iter(user_embeddings * count if len(user_embeddings) == 1 else user_embeddings)
    return [next(remaining) if needed else None for needed in needs_embedding]
