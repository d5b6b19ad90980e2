"""Codec of ensembles: blueprints become JSON data, and the weights of members become tensors.

Before the weights are read, `jax.eval_shape` builds the model without arrays. The file must contain
exactly the tensors of this model, with the same shapes and dtypes.

Public names: `Coordinates`, `Ensemble`, `encode`, `decode`, `require`, `require_entry`,
`weights_of`, `encode_observation`, `decode_observation`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_flatten_with_path

from sbi_flows.artefact import container, embeddings, settings
from sbi_flows.artefact.container import Entry
from sbi_flows.artefact.distributions import Tensors
from sbi_flows.artefact.strict import expect_fields, expect_integer, expect_list, expect_type
from sbi_flows.core.errors import ArtefactError
from sbi_flows.core.typing import Obs
from sbi_flows.densities.conditional import Blueprint, Weights, initial_weights
from sbi_flows.densities.embedding import Embedding, has_summaries_only, summary_count
from sbi_flows.densities.sizes import Sizes
from sbi_flows.networks.embeddings import EmbeddingSettings
from sbi_flows.observations.standardise import entry_count

MAX_ENSEMBLES = 64
MAX_MEMBERS = 2**12
MAX_LEAVES = 2**10
"""Maximum number of arrays in an observation."""

DTYPES = {np.dtype(kind).name: np.dtype(kind) for kind in container.DTYPES.values()}


class Coordinates(NamedTuple):
    """Kinds of a prior's standard coordinates.

    Attributes:
        bounded: Whether each standard coordinate is bounded.
        circular: Whether each standard coordinate is circular; empty if none is.
    """

    bounded: tuple[bool, ...]
    circular: tuple[bool, ...]


class Ensemble(NamedTuple):
    """Description of an ensemble in a file, before the arrays are read.

    Attributes:
        blueprint: Description of the model of each member.
        members: Number of members.
        prefix: Prefix of the names of the ensemble's tensors, such as "ensembles/0".
    """

    blueprint: Blueprint
    members: int
    prefix: str

    @property
    def probe_name(self) -> str:
        """Name of the tensor with the outputs of the user's embedding for fixed observations."""
        return f"{self.prefix}/embedding"


def encode(
    i: int, blueprint: Blueprint, weights: Weights, observation: Obs, x64: bool, tensors: Tensors
) -> dict[str, Any]:
    """Convert an ensemble to JSON data; its weights become tensors.

    Args:
        i: Index of the ensemble in the mixture.
        blueprint: Description of the model of each member.
        weights: Weights of all members, stacked on the leading axis.
        observation: Shape and dtype of one observation.
        x64: Whether the file is written in double precision.
        tensors: Tensors of the file. This function adds the tensors of the ensemble.

    Raises:
        ValueError: The density cannot be saved, or the weights do not fit the blueprint.
    """
    members = len(jax.tree.leaves(weights)[0])
    ensemble = Ensemble(blueprint, members, f"ensembles/{i}")
    sizes = blueprint.sizes
    coordinates = Coordinates(sizes.bounded, sizes.circular)
    wanted = _sizes(
        coordinates, observation, blueprint.feature_indices, blueprint.embedding, sizes.has_mask
    )
    if sizes != wanted:
        raise ValueError(f"blueprints[{i}]: expected the sizes of the observation, got others")
    embedding = embeddings.encode(blueprint.embedding)
    data = {
        "density": settings.encode("density", blueprint.density),
        "embedding": embedding,
        "kept": None if blueprint.feature_indices is None else list(blueprint.feature_indices),
        "members": members,
    }
    if not blueprint.linear_start:  # written only if it differs from the default
        data["linear_start"] = False
    if isinstance(blueprint.embedding, EmbeddingSettings):
        data["summaries"] = _hash_of_summaries(blueprint.embedding, observation)
    if blueprint.missing is not None:
        data["missing"] = settings.encode("missing", blueprint.missing)
    leaves = _leaves_by_path(weights)
    arrays = {f"{ensemble.prefix}/{name}": np.asarray(leaf) for name, leaf in leaves.items()}
    entries = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    if entries != {n: (e.dtype, e.shape) for n, e in _expected(ensemble, x64).items()}:
        raise ValueError(f"weights[{i}]: expected those of {blueprint.density}, got others")
    if embeddings.is_users(embedding):
        arrays[ensemble.probe_name] = np.asarray(
            embeddings.probe_outputs(blueprint, weights), np.float64
        )
    tensors |= arrays
    return data


def decode(
    i: int,
    value: Any,
    coordinates: Coordinates,
    observation: Obs,
    user_embedding: Embedding | None,
    has_mask: bool = False,
) -> Ensemble:
    """Check the JSON data of an ensemble.

    Args:
        i: Index of the ensemble in the mixture.
        value: The data.
        coordinates: The standard coordinates of the prior.
        observation: Shape and dtype of one observation.
        user_embedding: Embedding that the user supplied for this ensemble, or None.
        has_mask: Whether entries of an observation can be missing.

    Raises:
        ArtefactError: The data are malformed, or the user did not supply a needed embedding.
    """
    name = f"ensembles[{i}]"
    value = dict(expect_type(name, value, dict, "an object"))
    linear_start = expect_type(
        f"{name}.linear_start", value.pop("linear_start", True), bool, "a flag"
    )
    summaries = value.pop("summaries", None)
    missing = value.pop("missing", None)
    if missing is not None:
        missing = settings.decode(f"{name}.missing", missing, *settings.PATTERNS)
        if not has_mask:
            raise ArtefactError(f"{name}.missing: expected none for complete observations, got one")
        _fitting(missing.check, observation)
    density, embedding, kept, members = expect_fields(
        name, value, "density", "embedding", "kept", "members"
    )
    density = settings.decode("density", density, *settings.DENSITIES)
    if kept is not None:
        size = entry_count(observation)
        places = expect_list(f"{name}.kept", kept, size)
        kept = tuple(expect_integer(f"{name}.kept", place, 0, size - 1) for place in places)
        if not kept or any(a >= b for a, b in itertools.pairwise(kept)):
            raise ArtefactError(f"{name}.kept: expected indices in increasing order")
        if has_mask:
            raise ArtefactError(f"{name}.kept: expected none with missing entries, got some")
    embedding = embeddings.decode(embedding, user_embedding)
    if isinstance(embedding, EmbeddingSettings):
        _fitting(embedding.check, observation)
        if summaries != _hash_of_summaries(embedding, observation):
            raise ArtefactError(
                f"{name}: expected the fixed summaries of this version of sbi_flows, got other "
                "fixed summaries; load the file with the version that wrote it, or fit again"
            )
    sizes = _sizes(coordinates, observation, kept, embedding, has_mask)
    blueprint = Blueprint(density, embedding, sizes, kept, linear_start, missing)
    members = expect_integer(f"{name}.members", members, 1, MAX_MEMBERS)
    return Ensemble(blueprint, members, f"ensembles/{i}")


def require(ensemble: Ensemble, is_users: bool, table: Mapping[str, Entry], x64: bool) -> set[str]:
    """Check that the file contains the tensors of an ensemble, and return their names.

    Args:
        ensemble: The ensemble.
        is_users: Whether the embedding has a class of the user's own.
        table: Table of the tensors in the file.
        x64: Whether the file was written in double precision.

    Raises:
        ArtefactError: A tensor is missing, or has another shape or dtype.
    """
    expected = _expected(ensemble, x64)
    for name, wanted in expected.items():
        require_entry(name, wanted, table)
    if not is_users:
        return set(expected)
    stacked = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((ensemble.members, *leaf.shape), leaf.dtype),
        _template(ensemble.blueprint, x64),
    )
    with jax.enable_x64(x64):
        answer = jax.eval_shape(lambda w: embeddings.probe_outputs(ensemble.blueprint, w), stacked)
    wanted = Entry(np.dtype(np.float64), tuple(answer.shape), 0)
    require_entry(ensemble.probe_name, wanted, table)
    return {*expected, ensemble.probe_name}


def weights_of(ensemble: Ensemble, read: Any) -> Weights:
    """Read the weights of an ensemble, and convert them to JAX's present precision.

    Args:
        ensemble: The ensemble.
        read: Function from the name of a tensor to its array.
    """
    template = _template(ensemble.blueprint, jnp.result_type(float) == jnp.float64)
    leaves = {
        name: jnp.asarray(read(f"{ensemble.prefix}/{name}"), leaf.dtype)
        for name, leaf in _leaves_by_path(template).items()
    }
    return jax.tree.unflatten(jax.tree.structure(template), leaves.values())


def require_entry(name: str, wanted: Entry, table: Mapping[str, Entry]) -> None:
    """Raise ArtefactError if the tensor `name` is missing or has another shape or dtype."""
    entry = table.get(name)
    if entry is None or (entry.dtype, entry.shape) != (wanted.dtype, wanted.shape):
        raise ArtefactError(f"{name}: expected a tensor {wanted}, got {entry or 'none'!s}")


def _expected(ensemble: Ensemble, x64: bool) -> dict[str, Entry]:
    """Return a dict from the name of each tensor of an ensemble to its shape and dtype."""
    leaves = _leaves_by_path(_template(ensemble.blueprint, x64))
    return {
        f"{ensemble.prefix}/{name}": Entry(np.dtype(leaf.dtype), (ensemble.members, *leaf.shape), 0)
        for name, leaf in leaves.items()
    }


@functools.lru_cache(maxsize=16)
def _template(blueprint: Blueprint, x64: bool) -> Weights:
    """Return shapes and dtypes of the weights of one member, without computing the weights."""
    with jax.enable_x64(x64):
        build = functools.partial(initial_weights, blueprint, embedding_weights=None)
        return Weights(*jax.eval_shape(lambda: build(jax.random.key(0))))


def _leaves_by_path(tree: Any) -> dict[str, Any]:
    """Return a dict from the path of each leaf to the leaf, in the order of the tree."""
    leaves, _ = tree_flatten_with_path(tree)
    return {"/".join(map(_step, path)): leaf for path, leaf in leaves}


def _step(key: Any) -> str:
    return str(next(getattr(key, n) for n in ("key", "name", "idx") if hasattr(key, n)))


def _hash_of_summaries(embedding: EmbeddingSettings, observation: Obs) -> str:
    """Return a hash of the names of the fixed summaries, which may differ between versions."""
    return hashlib.sha256("\n".join(embedding.summary_labels(observation)).encode()).hexdigest()


def _fitting(check: Callable[[Obs], None], observation: Obs) -> None:
    """Raise ArtefactError if settings do not suit the observation."""
    try:
        check(observation)
    except ValueError as error:
        raise ArtefactError(str(error)) from None


def _sizes(
    coordinates: Coordinates,
    observation: Obs,
    kept: Sequence[int] | None,
    embedding: Embedding | None,
    has_mask: bool,
) -> Sizes:
    """Return the sizes of a model for all features of an observation, or for those in `kept`."""
    bounded, circular = coordinates
    if kept is not None:
        return Sizes(bounded, jax.tree.structure(0), ((len(kept),),), circular)
    shapes = tuple(tuple(leaf.shape) for leaf in jax.tree.leaves(observation))
    summaries = summary_count(embedding, observation)
    tree, only = jax.tree.structure(observation), has_summaries_only(embedding)
    return Sizes(bounded, tree, shapes, circular, has_mask, summaries, only)


def encode_observation(like: Obs) -> Any:
    """Convert shapes and dtypes of an observation to JSON data.

    Raises:
        ValueError: The observation is a tree with containers other than lists, tuples and dicts
            whose keys are strings.
    """
    if hasattr(like, "dtype"):
        return {"dtype": np.dtype(like.dtype).name, "shape": list(like.shape)}
    if type(like) is dict and all(isinstance(name, str) for name in like):
        return {"dict": {name: encode_observation(part) for name, part in like.items()}}
    if type(like) in (list, tuple):
        return {type(like).__name__: [encode_observation(part) for part in like]}
    raise ValueError(
        f"observation: expected arrays in dicts with names, lists or tuples, got {type(like)}"
    )


def decode_observation(value: Any, *, keep_doubles: bool = False) -> Obs:
    """Convert JSON data to shapes and dtypes of an observation.

    64-bit dtypes become 32-bit dtypes unless JAX is in double precision (`jax_enable_x64`). With
    `keep_doubles`, float64 stays: these arrays are standardised on the host.

    Raises:
        ArtefactError: The data are malformed.
    """
    observation = _observation(value, keep_doubles)
    expect_integer(
        "observation: number of arrays", len(jax.tree.leaves(observation)), 1, MAX_LEAVES
    )
    size = entry_count(observation)
    expect_integer("observation: number of entries", size, 1, settings.MAX_INTEGER)
    return observation


def _observation(value: Any, keep_doubles: bool) -> Obs:
    value = expect_type("observation", value, dict, "an object")
    if "shape" in value:
        dtype, shape = expect_fields("observation", value, "dtype", "shape")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ArtefactError(
                f"observation: expected a dtype of {list(DTYPES)}, got {dtype!r:.80}"
            )
        sizes = expect_list("observation: shape", shape, 16)
        sizes = tuple(
            expect_integer("observation: shape", n, 0, settings.MAX_INTEGER) for n in sizes
        )
        is_kept = keep_doubles and dtype == "float64"
        kept = DTYPES[dtype] if is_kept else jax.dtypes.canonicalize_dtype(DTYPES[dtype])
        return jax.ShapeDtypeStruct(sizes, kept)
    (kind,) = value if len(value) == 1 else ("nothing",)
    if kind == "dict":
        parts = expect_type("observation", value[kind], dict, "an object")
        return {name: _observation(part, keep_doubles) for name, part in parts.items()}
    if kind not in ("list", "tuple"):
        raise ArtefactError(
            f"observation: expected an array, a dict, a list or a tuple, got {kind}"
        )
    parts = [
        _observation(part, keep_doubles)
        for part in expect_list("observation", value[kind], MAX_LEAVES)
    ]
    return parts if kind == "list" else tuple(parts)
