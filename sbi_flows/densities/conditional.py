"""Model of the posterior in standard coordinates: embedding, linear start and density.

Public names: `Conditional`, `Blueprint`, `Weights`, `graph_of`, `has_likelihood_loss`, `needs_ode`,
`initial_weights`, `ravel_weights`, `unravel_weights`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.core.typing import Key
from sbi_flows.densities.base import Density, DensitySettings, TransformedDistribution
from sbi_flows.densities.embedding import Embedding, as_trainable, embed, has_summaries_only
from sbi_flows.densities.ode import OdeFlow, SolverStats
from sbi_flows.densities.scaling import Scaling
from sbi_flows.densities.sizes import Sizes
from sbi_flows.densities.start import LinearStart, standard_truncation
from sbi_flows.networks.embeddings import EmbeddingSettings
from sbi_flows.networks.embeddings.base import start_at_zero
from sbi_flows.networks.mlp import fast_key, split_key
from sbi_flows.observations.missing import MissingPattern, RandomSubset
from sbi_flows.observations.size_groups import shorten, size_groups, weights_of
from sbi_flows.observations.standardise import uncompressed


class Conditional(nnx.Module):
    """Model of one ensemble member: p(standard coordinates | features).

    A row of the inputs consists of up to three parts: the standardised observation, flattened to C
    entries; if entries can be missing, a mask of C zeros and ones; and the K fixed summaries of an
    embedding. If the embedding is `Summaries`, the inputs are its K summaries only.
    `Blueprint.inputs` computes the inputs from features.

    Args:
        start: Linear start, which training does not change; None for a model without one.
        density: Conditional density of the noise, which the start maps to standard coordinates.
        embedding: Network from observations to contexts; None to condition on the inputs.
        sizes: Sizes of the data.
    """

    def __init__(
        self,
        start: LinearStart | None,
        density: Density,
        embedding: nnx.Module | None,
        sizes: Sizes,
    ) -> None:
        """Store the parts."""
        self.start = nnx.data(None if start is None else nnx.Variable(start))
        scaling = Scaling.standard(sizes.summaries) if sizes.summaries_only else None
        self.scaling = nnx.data(None if scaling is None else nnx.Variable(scaling))
        self.density = density
        self.embedding = nnx.data(embedding)
        self.sizes = sizes

    def __call__(self, inputs: Array) -> distrax.Distribution:
        """Return the distribution over standard coordinates given inputs (B, I)."""
        density = self.density(self.context(inputs))
        return TransformedDistribution(density, self.start_bijector(inputs))

    def whiten(self, y: Array, inputs: Array) -> tuple[Array, Array]:
        """Map standard coordinates to the noise that the density models.

        Training does not change the linear start, so a fit calls this once for all steps.

        Args:
            y: Standard coordinates (B, d).
            inputs: Shape (B, I).

        Returns:
            Noise (B, d) and log determinants (B,).
        """
        return self.start_bijector(inputs).inverse_and_log_det(y)

    def loss(self, key: Key | None, noise: Array, inputs: Array) -> Array:
        """Compute the training loss (B,) of noise (B, d) given inputs (B, I).

        A key turns dropout on; see `Density.loss`.
        """
        return self.loss_of_parts(key, noise, [inputs], [self])

    def whiten_parts(
        self, y: Array, inputs: Sequence[Array], parts: Sequence[Conditional]
    ) -> Array:
        """Map standard coordinates (B, d) to noise, without gradients; see `loss_of_parts`."""
        pairs = zip(parts, inputs, strict=True)
        regressors = jnp.concatenate([part.sizes.regressors(given) for part, given in pairs])
        return jax.lax.stop_gradient(self._start_bijector(regressors).inverse(y))

    def loss_of_parts(
        self, key: Key | None, noise: Array, inputs: Sequence[Array], parts: Sequence[Conditional]
    ) -> Array:
        """Compute the training loss (B,) of parts with observations of different lengths.

        Args:
            key: Random key, which turns dropout on; None turns it off.
            noise: Noise of all rows (B, d).
            inputs: Inputs of each part, (b, I); the parts follow each other in the batch.
            parts: For each part, this model with the `sizes` of the part; all share the weights.
        """
        embedding_key, density_key = split_key(key, 2)
        keys = [embedding_key] if len(parts) == 1 else split_key(embedding_key, len(parts))
        triples = zip(parts, inputs, keys, strict=True)
        contexts = [part.context(given, k) for part, given, k in triples]
        return self.density.loss(density_key, noise, jnp.concatenate(contexts))

    def negative_log_prob(self, noise: Array, inputs: Array) -> tuple[Array, SolverStats]:
        """Compute the negative log density of an ODE density, and the solver statistics.

        Args:
            noise: Shape (B, d).
            inputs: Shape (B, I).

        Returns:
            Negative log densities (B,) in nats, and solver statistics (B,).

        Raises:
            TypeError: The density does not solve an ODE.
        """
        flow = self.density(self.context(inputs))
        if not isinstance(flow, OdeFlow):
            raise TypeError(f"expected a density that needs an ODE, got {type(self.density)}")
        log_prob, stats = flow.log_prob_and_stats(noise)
        return -log_prob, stats

    def start_bijector(self, inputs: Array, *, at_mean: bool = False) -> distrax.Bijector:
        """Return the bijector from noise to standard coordinates of the linear start.

        Without a start, the bijector is the identity for unbounded coordinates, and maps noise to a
        standard normal truncated to the prior's box for bounded coordinates.

        Args:
            inputs: Shape (B, I).
            at_mean: Condition on the mean of the inputs, so that the bijector has no batch shape.
        """
        return self._start_bijector(self.sizes.regressors(inputs), at_mean=at_mean)

    def _start_bijector(self, regressors: Array, *, at_mean: bool = False) -> distrax.Bijector:
        """Return the bijector of `start_bijector` for regressors (B, R)."""
        bounded = self.sizes.bounded
        if self.start is None:
            batch_shape = () if at_mean else regressors.shape[:-1]
            return standard_truncation(batch_shape, bounded, regressors.dtype)
        start = self.start.get_value()
        predictor = regressors @ start.weight
        predictor = jnp.mean(predictor, axis=0) if at_mean else predictor
        bijector = start.from_predictor(predictor, bounded)
        if start.turn is None:
            return bijector
        rotation = start.turn.rotation(regressors, self.sizes.circular, at_mean=at_mean)
        return distrax.Chain([rotation, bijector])

    def context(self, inputs: Array, key: Key | None = None) -> Array:
        """Return the context of the density: embedded observations and summaries, or inputs.

        Args:
            inputs: Shape (B, I).
            key: Random key of the embedding's dropout; None turns dropout off.

        Returns:
            Contexts (B, F + K) of an embedding with F outputs and K fixed summaries; K scaled
            summaries, if there is no network; or inputs (B, I) without an embedding.
        """
        if self.scaling is not None:
            return self.scaling.get_value()(inputs)
        if self.embedding is None:
            return inputs
        x, mask = self.sizes.observations(inputs)
        out = embed(self.embedding, x, mask, key)
        return jnp.concatenate([out, self.sizes.summaries_of(inputs)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """Static description of a model, hashable, so that compiled programs are reused.

    Attributes:
        density: Settings of the density.
        embedding: Network from observations to contexts; None to condition on the inputs.
        sizes: Sizes of the data, after the selection of features by `feature_indices`.
        feature_indices: Indices of the features that the model uses; None for all.
        linear_start: Whether the model has a `LinearStart`, which a fit sets before training.
            Without one, `Conditional.start` is None.
        missing: Pattern by which a fit hides different entries in every batch; None to hide none.
    """

    density: DensitySettings
    embedding: Embedding | None
    sizes: Sizes
    feature_indices: tuple[int, ...] | None = None
    linear_start: bool = True
    missing: MissingPattern | None = None

    def inputs(self, features: Array) -> Array:
        """Return the inputs (*, I) of the model for features (*, C), or (*, 2 C) with a mask.

        They are the selected features, or all features and the fixed summaries of an embedding, or
        the fixed summaries only.
        """
        features = self.select(features)
        if not self.sizes.summaries:
            return features
        flat = features.reshape(-1, features.shape[-1])
        x, mask = self.sizes.observations(flat)
        # compressed tails would change spectra and moments; the clip, at 1e16 scales from the
        # median, prevents an overflow
        x = jax.tree.map(lambda v: uncompressed(jnp.clip(v, -40.0, 40.0)), x)
        summaries = self.settings.summarise(x, mask)
        summaries = summaries.reshape(*features.shape[:-1], -1)
        if self.sizes.summaries_only:
            return summaries
        return jnp.concatenate([features, summaries], axis=-1)

    @property
    def without_embedding(self) -> Blueprint:
        """The same model, conditioned on the features."""
        sizes = dataclasses.replace(self.sizes, summaries=0, summaries_only=False)
        return dataclasses.replace(self, embedding=None, sizes=sizes)

    def select(self, features: Array) -> Array:
        """Select the features (*, C) that the model uses."""
        if self.feature_indices is None:
            return features
        return features[..., np.asarray(self.feature_indices)]

    @property
    def settings(self) -> EmbeddingSettings:
        """The embedding, which must be `EmbeddingSettings`."""
        assert isinstance(self.embedding, EmbeddingSettings)
        return self.embedding

    def hide(self, key: Key, features: Array) -> Array:
        """Hide entries of features (B, 2 C) by the pattern `missing`; return the inputs (B, I)."""
        assert self.missing is not None and self.sizes.has_mask
        values, mask = jnp.split(features, 2, axis=-1)
        keep = self.missing.keep(key, self.sizes.like, len(features)) & (mask > 0.5)
        values = jnp.where(keep, values, 0.0)
        return self.inputs(jnp.concatenate([values, keep.astype(mask.dtype)], axis=-1))

    def hide_by_groups(self, key: Key, features: Array) -> list[tuple[Blueprint, Array, float]]:
        """Hide entries of features (B, 2 C), and cut the arrays of small sets to a smaller length.

        Returns:
            For each part of the batch, in the order of the rows: the blueprint for its length,
            its inputs (b, I), and the weight of its rows in the mean loss. It is one part if sets
            cannot be grouped by size.
        """
        groups = self._size_groups(len(features))
        if not groups:
            return [(self, self.hide(key, features), 1.0)]
        (shape,), rows = self.sizes.shapes, len(features) // len(groups)
        pair = features.reshape(len(groups), rows, 2, *shape)
        parts = []
        for i, (group, weight) in enumerate(zip(groups, weights_of(groups), strict=True)):
            cut_key, hide_key = jax.random.split(jax.random.fold_in(key, i))
            elements = jnp.moveaxis(pair[i], 1, 2)  # (rows, n, 2, ...)
            at_random = cast(RandomSubset, self.missing).order == "random"
            elements = shorten(cut_key, elements, group.largest, at_random=at_random)
            flat = jnp.moveaxis(elements, 2, 1).reshape(rows, -1)
            sizes = dataclasses.replace(self.sizes, shapes=((group.largest, *shape[1:]),))
            shorter = dataclasses.replace(self, sizes=sizes, missing=group)
            parts.append((shorter, shorter.hide(hide_key, flat), weight))
        return parts

    def _size_groups(self, rows: int) -> tuple[RandomSubset, ...]:
        """Return the groups of sets of similar size in a batch; none if all rows are one part."""
        pattern, embedding = self.missing, self.embedding
        reads_any = isinstance(embedding, EmbeddingSettings) and embedding.reads_any_length
        if not reads_any or not isinstance(pattern, RandomSubset) or pattern.axis != 0:
            return ()
        return size_groups(pattern, rows) if len(self.sizes.shapes) == 1 else ()

    def build(self, key: Key) -> Conditional:
        """Build the model with its initial weights; its start ignores the observation.

        Raises:
            ValueError: The output of the embedding is not of shape (B, F).
        """
        embedding_key, density_key = jax.random.split(key)
        dim, sizes = self.sizes.dim, self.sizes
        embedding, context_dim = self._build_embedding(embedding_key), sizes.input_count
        if embedding is not None:
            x, mask = sizes.observations(jnp.zeros((2, sizes.input_count)))
            out = nnx.eval_shape(lambda m: embed(m, x, mask, None), embedding)
            if out.ndim != 2 or out.shape[0] != 2:
                raise ValueError(f"embedding: expected output (B, F), got {out.shape} for B = 2")
            context_dim = out.shape[1] + sizes.summaries
        start = None
        if self.linear_start:
            start = LinearStart.standard(sizes.regressor_count, dim, sizes.circular)
        density = self.density.build(density_key, dim, context_dim)
        return Conditional(start, density, embedding, sizes)

    def _build_embedding(self, key: Key) -> nnx.Module | None:
        if self.embedding is None or has_summaries_only(self.embedding):
            return None
        if isinstance(self.embedding, EmbeddingSettings):
            network = self.embedding.build(nnx.Rngs(key), self.sizes.like)
            return as_trainable(start_at_zero(network))
        if isinstance(self.embedding, nnx.Module):
            return nnx.clone(self.embedding)
        return as_trainable(self.embedding(nnx.Rngs(key)))

    def embedding_weights(self) -> Any:
        """Return the current weights of the embedding if it is a module, and None otherwise."""
        if not isinstance(self.embedding, nnx.Module):
            return None
        return nnx.as_pure(nnx.state(self.embedding, nnx.Param))


class Weights(NamedTuple):
    """Arrays of all members of an ensemble, stacked on a leading axis M.

    Attributes:
        params: Trainable weights.
        rest: Other arrays: the linear start, and the scaling of fixed summaries.
    """

    params: Any
    rest: Any


@functools.lru_cache(maxsize=64)
def _template(blueprint: Blueprint) -> _Template:
    model = nnx.eval_shape(lambda: blueprint.build(jax.random.key(0)))
    graph, params, _ = nnx.split(model, nnx.Param, ...)
    density = model.density
    return _Template(graph, nnx.as_pure(params), density.has_likelihood_loss, density.needs_ode)


class _Template(NamedTuple):
    """Static part of a model, shapes of its weights, and class attributes of its density."""

    graph: nnx.GraphDef
    weights: Any
    has_likelihood_loss: bool
    needs_ode: bool


def graph_of(blueprint: Blueprint) -> nnx.GraphDef:
    """Return the static part of a model without computing any weights."""
    return _template(blueprint).graph


def has_likelihood_loss(blueprint: Blueprint) -> bool:
    """Return whether the training loss of the density is its negative log density."""
    return _template(blueprint).has_likelihood_loss


def needs_ode(blueprint: Blueprint) -> bool:
    """Return whether draws and densities need the solution of an ODE."""
    return _template(blueprint).needs_ode


def initial_weights(blueprint: Blueprint, key: Key, embedding_weights: Any) -> tuple[Any, Any]:
    """Compute the trainable weights and the other arrays of a new model.

    Args:
        blueprint: Description of the model.
        key: Random key.
        embedding_weights: Weights of an embedding that is a module, as
            `Blueprint.embedding_weights` returns them. They are a separate argument because a
            compiled program treats the module as a constant and ignores later changes of it.

    Returns:
        Trainable weights, and the other arrays: the linear start, if there is one.
    """
    # with the default generator (threefry) this would take a third of the compile time of a fit
    key = fast_key(key)
    _, params, rest = nnx.split(blueprint.build(key), nnx.Param, ...)
    params = nnx.as_pure(params)
    if embedding_weights is not None:
        params = {**params, "embedding": embedding_weights}
    return params, nnx.as_pure(rest)


def ravel_weights(params: Any) -> Array:
    """Concatenate all trainable weights into one vector, on which optimisers are fastest."""
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])


def unravel_weights(blueprint: Blueprint, vector: Array | np.ndarray) -> Any:
    """Invert `ravel_weights`: convert vectors (*, P) to weights with leading axes (*)."""
    shapes, tree = jax.tree.flatten(_template(blueprint).weights)
    ends = np.cumsum([math.prod(s.shape) for s in shapes])[:-1]
    split = np.split if isinstance(vector, np.ndarray) else jnp.split
    parts = zip(split(vector, ends, axis=-1), shapes, strict=True)
    leaves = [p.reshape(*vector.shape[:-1], *s.shape).astype(s.dtype) for p, s in parts]
    return jax.tree.unflatten(tree, leaves)
