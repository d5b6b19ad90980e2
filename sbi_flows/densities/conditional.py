"""p(theta in standard coordinates | x): embedding, linear start and density as one module."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.core.typing import Key
from sbi_flows.densities.base import Density, DensitySettings, TransformedDistribution
from sbi_flows.densities.ode import OdeFlow, SolverStats
from sbi_flows.densities.start import LinearStart, standard_truncation
from sbi_flows.networks.mlp import fast_key, split_key
from sbi_flows.observations.standardise import Shapes, unflatten_rows

Embedding = nnx.Module | Callable[[nnx.Rngs], nnx.Module]
"""A flax module, or a function `rngs -> module`, that maps observations (B, *event) to (B, F)."""


class Conditional(nnx.Module):
    """The whole trained model; `features` are standardised and flat, shape (B, C)."""

    def __init__(
        self,
        start: LinearStart | None,
        density: Density,
        embedding: nnx.Module | None,
        sizes: Sizes,
    ) -> None:
        """Store the parts; the linear start, if there is one, is not a trainable parameter."""
        self.start = nnx.data(None if start is None else nnx.Variable(start))
        self.density = density
        self.embedding = nnx.data(embedding)
        self.sizes = sizes

    def __call__(self, features: Array) -> distrax.Distribution:
        """Distribution over standard coordinates given features (B, C)."""
        density = self.density(self.context(features))
        return TransformedDistribution(density, self.start_bijector(features))

    def whiten(self, y: Array, features: Array) -> tuple[Array, Array]:
        """Standard coordinates (B, d) to the noise (B, d) that the density models, and log det.

        The start is no trainable parameter, so a fit does this once and not every step.
        """
        return self.start_bijector(features).inverse_and_log_det(y)

    def loss(self, key: Key | None, noise: Array, features: Array) -> Array:
        """Training loss of each row: noise (B, d), features (B, C) to (B,)."""
        first, second = split_key(key, 2)
        return self.density.loss(second, noise, self.context(features, first))

    def negative_log_prob(self, noise: Array, features: Array) -> tuple[Array, SolverStats]:
        """Negative log density (B,) by solving an ODE, in nats, and the work of each solve."""
        flow = self.density(self.context(features))
        assert isinstance(flow, OdeFlow)
        log_prob, effort = flow.log_prob_and_stats(noise)
        return -log_prob, effort

    def start_bijector(self, features: Array, *, at_mean: bool = False) -> distrax.Bijector:
        """Return the bijector from noise to standard coordinates.

        Without a linear start it is the identity for unbounded coordinates; a bounded one is a
        standard normal truncated to the prior's box.

        Args:
            features: Shape (B, C).
            at_mean: Condition on the mean of the features, so that the bijector has no batch shape.
        """
        bounded = self.sizes.bounded
        if self.start is None:
            batch_shape = () if at_mean else features.shape[:-1]
            return standard_truncation(batch_shape, bounded, features.dtype)
        start = self.start.get_value()
        line = features @ start.weight
        return start.from_predictor(jnp.mean(line, axis=0) if at_mean else line, bounded)

    def context(self, features: Array, key: Key | None = None) -> Array:
        """What the density is conditioned on, given features (B, C); a key turns dropout on."""
        if self.embedding is None:
            return features
        x = unflatten_rows(features, self.sizes.tree, self.sizes.shapes)
        return _embed(self.embedding, x, key)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static facts about the data that shape a model.

    Attributes:
        bounded: Which of the d standard coordinates are bounded.
        tree: Structure of one observation.
        shapes: Shape of each of its leaves.
    """

    bounded: tuple[bool, ...]
    tree: Any
    shapes: Shapes

    @property
    def dim(self) -> int:
        """d, the number of standard coordinates."""
        return len(self.bounded)

    @property
    def feature_count(self) -> int:
        """C, the length of the flat feature vector."""
        return sum(math.prod(shape) for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """Everything static that a model is built from; hashable, so that programs can be reused.

    Attributes:
        density: The density.
        embedding: What the density is conditioned on instead of the features; None for these.
        sizes: Those of the data, or of the part of it that the model is given.
        feature_indices: Indices of the features that the model uses; None for all.
        linear_start: Whether the model has a `LinearStart`, which a fit sets before training.
            Without one, `Conditional.start` is None, and a fit has no start to set.
    """

    density: DensitySettings
    embedding: Embedding | None
    sizes: Sizes
    feature_indices: tuple[int, ...] | None = None
    linear_start: bool = True

    def select_features(self, features: Array) -> Array:
        """Of all features (*, C), those that the model is given."""
        return (
            features
            if self.feature_indices is None
            else features[..., np.asarray(self.feature_indices)]
        )

    def build(self, key: Key) -> Conditional:
        """Build the model with its initial weights; its start ignores the observation."""
        first, second = jax.random.split(key)
        d, features = self.sizes.dim, self.sizes.feature_count
        embedding, context_dim = self._embedding(first), features
        if embedding is not None:
            x = unflatten_rows(jnp.zeros((2, features)), self.sizes.tree, self.sizes.shapes)
            out = nnx.eval_shape(lambda m: _embed(m, x, None), embedding)
            if out.ndim != 2 or out.shape[0] != 2:
                raise ValueError(f"embedding: expected output (B, F), got {out.shape} for B = 2")
            context_dim = out.shape[1]
        start = LinearStart.standard(features, d) if self.linear_start else None
        density = self.density.build(second, d, context_dim)
        return Conditional(start, density, embedding, self.sizes)

    def _embedding(self, key: Key) -> nnx.Module | None:
        if self.embedding is None:
            return None
        if isinstance(self.embedding, nnx.Module):
            return nnx.clone(self.embedding)
        return _trainable(self.embedding(nnx.Rngs(key)))

    def embedding_weights(self) -> Any:
        """Weights, as they are now, of an embedding that is given as a module; None otherwise."""
        if not isinstance(self.embedding, nnx.Module):
            return None
        return nnx.as_pure(nnx.state(self.embedding, nnx.Param))


def check_embedding(embedding: Any) -> None:
    """Refuse what is no embedding, as far as that is known before any data.

    Raises:
        ValueError: A module with state that is no parameter, or what cannot be called with one
            `nnx.Rngs`.
    """
    if isinstance(embedding, nnx.Module):
        _trainable(embedding)
        return
    try:  # the metaclass of modules hides the signature of the class
        if isinstance(embedding, type):
            inspect.signature(embedding.__init__).bind(None, None)
        else:
            inspect.signature(embedding).bind(None)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"embedding: expected a module or a function of one nnx.Rngs, got {embedding!r}: "
            f"{error}; other arguments can be set by functools.partial"
        ) from None


def _trainable(module: Any) -> nnx.Module:
    """The module, if a fit can train all of its state.

    Running statistics and random streams would change with every call, which a posterior that is
    fitted must not.
    """
    if not isinstance(module, nnx.Module):
        raise ValueError(f"embedding: expected a flax nnx.Module, got {type(module).__name__}")
    other = nnx.state(module, nnx.Not(nnx.Param))
    kinds = {type(v).__name__ for v in jax.tree.leaves(other, is_leaf=_is_variable)}
    if kinds:
        raise ValueError(
            f"embedding: expected a module whose state is parameters (nnx.Param) alone, got "
            f"{', '.join(sorted(kinds))}. Use LayerNorm in place of BatchNorm; for dropout, take a "
            "`key` in __call__, as sf.ResidualMLP does, which is None outside training"
        )
    return module


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


class Weights(NamedTuple):
    """Arrays of all members of an ensemble, stacked on a leading axis M: trainable and other."""

    params: Any
    rest: Any


@functools.lru_cache(maxsize=64)
def _template(blueprint: Blueprint) -> _Template:
    model = nnx.eval_shape(lambda: blueprint.build(jax.random.key(0)))
    graph, params, _ = nnx.split(model, nnx.Param, ...)
    density = model.density
    return _Template(graph, nnx.as_pure(params), density.has_likelihood_loss, density.needs_ode)


class _Template(NamedTuple):
    """The static half of a model, the shapes of its weights, and what `Density` says of itself."""

    graph: nnx.GraphDef
    weights: Any
    has_likelihood_loss: bool
    needs_ode: bool


def graph_of(blueprint: Blueprint) -> nnx.GraphDef:
    """The static half of a model, without computing any weights."""
    return _template(blueprint).graph


def has_likelihood_loss(blueprint: Blueprint) -> bool:
    """Whether the density is trained by its likelihood."""
    return _template(blueprint).has_likelihood_loss


def needs_ode(blueprint: Blueprint) -> bool:
    """Whether the density solves an ODE, and is NaN where that fails."""
    return _template(blueprint).needs_ode


def initial_weights(blueprint: Blueprint, key: Key, embedding_weights: Any) -> tuple[Any, Any]:
    """Trainable weights and the other arrays of a new model.

    The weights of an embedding that was given as a module come as an argument: the module itself is
    a constant of compiled programs, which would not see that its weights have changed.
    """
    # a third of the time to compile a fit went into threefry for some twenty arrays
    key = fast_key(key)
    _, params, rest = nnx.split(blueprint.build(key), nnx.Param, ...)
    params = nnx.as_pure(params)
    if embedding_weights is not None:
        params = {**params, "embedding": embedding_weights}
    return params, nnx.as_pure(rest)


def ravel_weights(params: Any) -> Array:
    """All trainable weights as one vector, which is what an optimiser is fast at."""
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])


def unravel_weights(blueprint: Blueprint, vector: Array | np.ndarray) -> Any:
    """The trainable weights that `ravel_weights` made a vector of; any axes before it stay."""
    shapes, tree = jax.tree.flatten(_template(blueprint).weights)
    ends = np.cumsum([math.prod(s.shape) for s in shapes])[:-1]
    split = np.split if isinstance(vector, np.ndarray) else jnp.split
    parts = zip(split(vector, ends, axis=-1), shapes, strict=True)
    leaves = [p.reshape(*vector.shape[:-1], *s.shape).astype(s.dtype) for p, s in parts]
    return jax.tree.unflatten(tree, leaves)


def _embed(embedding: nnx.Module, x: Any, key: Key | None) -> Array:
    """Call the embedding, with a key for its dropout where it takes one."""
    parameters = inspect.signature(type(embedding).__call__).parameters
    return embedding(x, key=key) if "key" in parameters else embedding(x)  # type: ignore[operator]
