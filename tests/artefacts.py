"""Posteriors with random weights, and helpers that read and write the parts of their files."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

import sbi_flows as sf
from sbi_flows.artefact.container import pack
from sbi_flows.densities.conditional import Blueprint, Weights, initial_weights
from sbi_flows.densities.sizes import Sizes
from sbi_flows.observations.standardise import Standardiser
from tests.cases import perturbed

EVENT = 3
"""Length of an observation."""


def ensemble(density: Any, bounded: tuple[bool, ...], like: Any = None, **settings: Any) -> Any:
    """Return a blueprint, and perturbed weights of two members."""
    like = jax.ShapeDtypeStruct((EVENT,), jnp.float32) if like is None else like
    tree, shapes = jax.tree.structure(like), tuple(leaf.shape for leaf in jax.tree.leaves(like))
    if (kept := settings.get("kept")) is not None:
        tree, shapes = jax.tree.structure(0), ((len(kept),),)
    sizes = Sizes(bounded, tree, shapes, settings.get("circular", ()))
    made = Blueprint(density, settings.get("embedding"), sizes, kept)

    @jax.jit
    def weights(keys):
        return jax.vmap(lambda key: initial_weights(made, key, made.embedding_weights()))(keys)

    keys = jax.random.split(jax.random.key(0), 2)
    return made, Weights(*perturbed(jax.random.key(1), weights(keys), 0.1))


def posterior(prior: Any, *parts: Any, shares: tuple[float, ...] = (1.0,), like: Any = None):
    """Return a posterior that is a mixture of ensembles."""
    like = jax.ShapeDtypeStruct((EVENT,), jnp.result_type(float)) if like is None else like
    count = sum(leaf.size for leaf in jax.tree.leaves(like))
    dtype = jnp.result_type(float)
    standardiser = Standardiser(
        jnp.linspace(-1.0, 1.0, count, dtype=dtype),
        jnp.linspace(0.5, 2.0, count, dtype=dtype),
        jnp.where(jnp.arange(count) == 1, 0.1, 0.0).astype(dtype),
    )
    blueprints, weights = zip(*parts, strict=True)
    return sf.Posterior(sf.as_prior(prior), blueprints, weights, shares, standardiser, like)


def opened(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the document and the tensors of a file with the safetensors library."""
    with safe_open(path, "np") as file:
        document = json.loads(file.metadata()["sbi_flows"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    del document["sha256"]
    return document, tensors


def written(path: Path, document: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """Write a file with this content and a valid hash."""
    path.write_bytes(pack(document, tensors))
    return path


def bits(tree: Any) -> list[tuple[np.dtype, bytes]]:
    """Return dtype and bytes of each array, to compare trees exactly."""
    return [(np.asarray(a).dtype, np.asarray(a).tobytes()) for a in jax.tree.leaves(tree)]
