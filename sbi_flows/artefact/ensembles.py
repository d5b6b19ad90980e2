"""The ensembles of a posterior in an artefact: what they are built from, and their weights.

A blueprint is written as plain data. To read the weights, the model is built again without its
arrays (`jax.eval_shape`): every tensor of the file has to be one of it, of its shape and dtype, and
every one of it in the file, before any is read.

Public names: `Ensemble`, `encode`, `decode`, `require`, `require_entry`, `weights_of`,
`observation_of`, `observation_from`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_flatten_with_path

from sbi_flows.artefact import container, embeddings, settings
from sbi_flows.artefact.container import Entry
from sbi_flows.artefact.distributions import Tensors
from sbi_flows.artefact.strict import checked, counted, fields, items
from sbi_flows.core.errors import ArtefactError
from sbi_flows.core.typing import Obs
from sbi_flows.densities.conditional import Blueprint, Embedding, Sizes, Weights, initial_weights

MAX_ENSEMBLES, MOST_MEMBERS, MOST_LEAVES = 64, 2**12, 2**10

DTYPES = {np.dtype(kind).name: np.dtype(kind) for kind in container.DTYPES.values()}


class Ensemble(NamedTuple):
    """What is known of an ensemble before its arrays are read."""

    blueprint: Blueprint
    members: int
    prefix: str

    @property
    def answered(self) -> str:
        """Name of the tensor of what an embedding of the user's makes of fixed observations."""
        return f"{self.prefix}/embedding"


def encode(
    i: int, blueprint: Blueprint, weights: Weights, observation: Obs, x64: bool, tensors: Tensors
) -> dict[str, Any]:
    """An ensemble as plain data; its weights become tensors.

    Raises:
        ValueError: The density cannot be written, or the weights are not those of the blueprint.
    """
    members = len(jax.tree.leaves(weights)[0])
    own = Ensemble(blueprint, members, f"ensembles/{i}")
    if blueprint.sizes != _sizes(blueprint.sizes.bounded, observation, blueprint.feature_indices):
        raise ValueError(f"blueprints[{i}]: expected the sizes of the observation, got others")
    described = embeddings.encode(blueprint.embedding)
    found = {
        "density": settings.encode("density", blueprint.density),
        "embedding": described,
        "kept": None if blueprint.feature_indices is None else list(blueprint.feature_indices),
        "members": members,
    }
    if not blueprint.linear_start:  # files of the default have no such key
        found["linear_start"] = False
    leaves = _named(weights)
    arrays = {f"{own.prefix}/{name}": np.asarray(leaf) for name, leaf in leaves.items()}
    there = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    if there != {n: (e.dtype, e.shape) for n, e in _expected(own, x64).items()}:
        raise ValueError(f"weights[{i}]: expected those of {blueprint.density}, got others")
    if embeddings.is_given(described):
        arrays[own.answered] = np.asarray(embeddings.answers(blueprint, weights), np.float64)
    tensors |= arrays
    return found


def decode(
    i: int, value: Any, bounded: tuple[bool, ...], observation: Obs, given: Embedding | None
) -> Ensemble:
    """What an ensemble is built from.

    Raises:
        ArtefactError: The data are malformed.
    """
    name = f"ensembles[{i}]"
    value = dict(checked(name, value, dict, "an object"))
    linear_start = checked(f"{name}.linear_start", value.pop("linear_start", True), bool, "a flag")
    density, embedding, kept, members = fields(
        name, value, "density", "embedding", "kept", "members"
    )
    built = settings.decode("density", density, *settings.DENSITIES)
    if kept is not None:
        size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(observation))
        places = items(f"{name}.kept", kept, size)
        kept = tuple(counted(f"{name}.kept", place, 0, size - 1) for place in places)
        if not kept or any(a >= b for a, b in itertools.pairwise(kept)):
            raise ArtefactError(f"{name}.kept: expected places in rising order")
    sizes = _sizes(bounded, observation, kept)
    blueprint = Blueprint(built, embeddings.decode(embedding, given), sizes, kept, linear_start)
    members = counted(f"{name}.members", members, 1, MOST_MEMBERS)
    return Ensemble(blueprint, members, f"ensembles/{i}")


def require(ensemble: Ensemble, given: bool, table: Mapping[str, Entry], x64: bool) -> set[str]:
    """Names of the ensemble's tensors, all of which are in the table as they should be.

    Args:
        ensemble: What they belong to.
        given: Whether its embedding is the user's.
        table: The tensors of the file.
        x64: Whether the file was written in double precision.

    Raises:
        ArtefactError: One is missing, or has another shape or dtype.
    """
    expected = _expected(ensemble, x64)
    for name, wanted in expected.items():
        require_entry(name, wanted, table)
    if not given:
        return set(expected)
    stacked = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((ensemble.members, *leaf.shape), leaf.dtype),
        _template(ensemble.blueprint, x64),
    )
    with jax.enable_x64(x64):
        answer = jax.eval_shape(lambda own: embeddings.answers(ensemble.blueprint, own), stacked)
    wanted = Entry(np.dtype(np.float64), tuple(answer.shape), 0)
    require_entry(ensemble.answered, wanted, table)
    return {*expected, ensemble.answered}


def weights_of(ensemble: Ensemble, read: Any) -> Weights:
    """The weights, in the precision that is on.

    Args:
        ensemble: What they belong to.
        read: Function of a tensor's name to its array.
    """
    template = _template(ensemble.blueprint, jnp.result_type(float) == jnp.float64)
    leaves = {
        name: jnp.asarray(read(f"{ensemble.prefix}/{name}"), leaf.dtype)
        for name, leaf in _named(template).items()
    }
    return jax.tree.unflatten(jax.tree.structure(template), leaves.values())


def require_entry(name: str, wanted: Entry, table: Mapping[str, Entry]) -> None:
    """Refuse a table without this tensor, or with one of another shape or dtype."""
    found = table.get(name)
    if found is None or (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        raise ArtefactError(f"{name}: expected a tensor {wanted}, got {found or 'none'!s}")


def _expected(ensemble: Ensemble, x64: bool) -> dict[str, Entry]:
    """The tensors of an ensemble in one of the precisions, by their names."""
    found = _named(_template(ensemble.blueprint, x64))
    return {
        f"{ensemble.prefix}/{name}": Entry(np.dtype(leaf.dtype), (ensemble.members, *leaf.shape), 0)
        for name, leaf in found.items()
    }


@functools.lru_cache(maxsize=16)
def _template(blueprint: Blueprint, x64: bool) -> Weights:
    """Shapes and dtypes of a member's weights, without computing any."""
    with jax.enable_x64(x64):
        build = functools.partial(initial_weights, blueprint, embedding_weights=None)
        return Weights(*jax.eval_shape(lambda: build(jax.random.key(0))))


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, in its order."""
    leaves, _ = tree_flatten_with_path(tree)
    return {"/".join(map(_step, path)): leaf for path, leaf in leaves}


def _step(key: Any) -> str:
    return str(next(getattr(key, n) for n in ("key", "name", "idx") if hasattr(key, n)))


def _sizes(bounded: tuple[bool, ...], observation: Obs, kept: Sequence[int] | None) -> Sizes:
    """Those of a model that is given all of an observation, or some of its entries."""
    if kept is not None:
        return Sizes(bounded, jax.tree.structure(0), ((len(kept),),))
    shapes = tuple(tuple(leaf.shape) for leaf in jax.tree.leaves(observation))
    return Sizes(bounded, jax.tree.structure(observation), shapes)


def observation_of(like: Obs) -> Any:
    """Shapes and dtypes of an observation as plain data.

    Raises:
        ValueError: It is a tree of other things than dicts with names, lists and tuples.
    """
    if hasattr(like, "dtype"):
        return {"dtype": np.dtype(like.dtype).name, "shape": list(like.shape)}
    if type(like) is dict and all(isinstance(name, str) for name in like):
        return {"dict": {name: observation_of(part) for name, part in like.items()}}
    if type(like) in (list, tuple):
        return {type(like).__name__: [observation_of(part) for part in like]}
    raise ValueError(
        f"observation: expected arrays in dicts with names, lists or tuples, got {type(like)}"
    )


def observation_from(value: Any) -> Obs:
    """What `observation_of` made data of, in the precision that is on.

    Raises:
        ArtefactError: The data are malformed.
    """
    found = _observation(value)
    counted("observation: number of arrays", len(jax.tree.leaves(found)), 1, MOST_LEAVES)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(found))
    counted("observation: number of entries", size, 1, settings.MOST)
    return found


def _observation(value: Any) -> Obs:
    value = checked("observation", value, dict, "an object")
    if "shape" in value:
        dtype, shape = fields("observation", value, "dtype", "shape")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ArtefactError(
                f"observation: expected a dtype of {list(DTYPES)}, got {dtype!r:.80}"
            )
        sizes = items("observation: shape", shape, 16)
        sizes = tuple(counted("observation: shape", n, 0, settings.MOST) for n in sizes)
        return jax.ShapeDtypeStruct(sizes, jax.dtypes.canonicalize_dtype(DTYPES[dtype]))
    (kind,) = value if len(value) == 1 else ("nothing",)
    if kind == "dict":
        parts = checked("observation", value[kind], dict, "an object")
        return {name: _observation(part) for name, part in parts.items()}
    if kind not in ("list", "tuple"):
        raise ArtefactError(
            f"observation: expected an array, a dict, a list or a tuple, got {kind}"
        )
    parts = [_observation(part) for part in items("observation", value[kind], MOST_LEAVES)]
    return parts if kind == "list" else tuple(parts)
