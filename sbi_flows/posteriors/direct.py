"""The posterior: draws, densities and modes for one observation or a batch of them."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.artefact.layers import SavedPosterior
from sbi_flows.core.checks import (
    as_random_key,
    as_real_array,
    as_real_tree,
    require_count,
    require_memory,
)
from sbi_flows.core.errors import SolveFailed
from sbi_flows.core.typing import Key, Obs
from sbi_flows.densities.conditional import Blueprint, Weights, needs_ode
from sbi_flows.observations.standardise import Standardiser, entry_labels
from sbi_flows.observations.typicality import Typicality, spaces_of
from sbi_flows.posteriors import codec_direct, mixtures
from sbi_flows.posteriors.writing import save
from sbi_flows.prior.prior import Prior

ENTRIES = 2**18
"""Parameter entries (draws times d) in one compiled call, which bounds the memory."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    """An amortised posterior: a mixture of ensembles, each of them of equal members.

    One observation has the shape of a training row; a batch has one more axis in front. Batches
    are computed in compiled chunks of bounded memory; a result does not depend on the chunks. (The
    steps of an ODE that adapt to all draws at one observation do, within the solver's tolerance.)

    Attributes:
        prior: The prior, which names the parameters.
        blueprints: What the members of each ensemble are built from.
        weights: Their arrays, stacked on a leading axis, one `Weights` an ensemble.
        shares: Weight of each ensemble in the mixture; they add up to 1.
        standardiser: Observation to features.
        observation: Shape and dtype of one observation (`jax.ShapeDtypeStruct` leaves).
        record: What is known of the fit and not needed for draws, as plain JSON data, read-only:
            settings, simulations, history, versions and, once saved with a report, the check.
        typicality: What the training simulations look like; None gates no observation.

    A draw or a density at a single observation warns, once, if that is not typical of the training
    simulations at a level of 0.01; batches are for `misspecification` and `sf.anomalies` to judge.
    """

    prior: Prior
    blueprints: tuple[Blueprint, ...]
    weights: tuple[Weights, ...]
    shares: tuple[float, ...]
    standardiser: Standardiser
    observation: Obs
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    typicality: Typicality | None = None

    @property
    def members(self) -> int:
        """Number of models in the mixture."""
        return sum(mixtures.count(w) for w in self.weights)

    @property
    def solved(self) -> bool:
        """Whether densities are the solutions of an ODE, many times the work of others."""
        return any(map(needs_ode, self.blueprints))

    def __repr__(self) -> str:
        """Prior, densities with their shares, and the number of models."""
        parts = [
            f"{b.density}" if share == 1.0 else f"{share:.2f} {b.density}"
            for b, share in zip(self.blueprints, self.shares, strict=True)
        ]
        return f"Posterior({self.prior}, {' + '.join(parts)}, members={self.members})"

    def sample(self, key: Key, x: Obs, n: int) -> Array:
        """Draw from the posterior; no draw is outside the prior's support.

        Args:
            key: Random key.
            x: One observation (*event) or a batch (B, *event).
            n: Number of draws an observation.

        Returns:
            Shape (n, D), or (B, n, D) for a batch.

        Raises:
            ValueError: x has another shape than the training rows, holds no real numbers, or holds
                NaN or infinity; n is not positive, or more than there is room for; or `key` is no
                random key.
            SolveFailed: The ODE of a continuous flow was not solved.
        """
        return self._draw(key, x, n, with_log_prob=False)[0]

    def sample_and_log_prob(self, key: Key, x: Obs, n: int) -> tuple[Array, Array]:
        """Draw as `sample` does, with the log density (n,) or (B, n) of each draw."""
        return self._draw(key, x, n, with_log_prob=True)

    def log_prob(self, theta: Any, x: Obs) -> Array:
        """Log density in the parameters' own units; -inf outside the prior's support.

        Args:
            theta: For one observation: shape (*, D). For a batch: (B, D) or (B, n, D), the rows
                of theta belonging to the observations in turn.
            x: One observation (*event) or a batch (B, *event).

        Returns:
            Shape of theta without its last axis.

        Raises:
            ValueError: A shape does not fit, there are no real numbers, or x holds NaN or
                infinity.
            SolveFailed: The ODE of a continuous flow was not solved.
        """
        features, single = self._features(x)
        self._gate(features, single, stacklevel=4)
        theta = jnp.asarray(as_real_array("theta", theta), features.dtype)
        if theta.ndim == 0 or theta.shape[-1] != self.prior.dim:
            raise ValueError(
                f"theta: expected shape (*, {self.prior.dim}) for {self.prior.labels}, "
                f"got {theta.shape}"
            )
        if not single and (theta.ndim not in (2, 3) or len(theta) != len(features)):
            raise ValueError(
                f"theta: expected ({len(features)}, {self.prior.dim}) or ({len(features)}, n, "
                f"{self.prior.dim}) for a batch of {len(features)} observations, got {theta.shape}"
            )
        if theta.size == 0:
            return jnp.zeros(theta.shape[:-1], theta.dtype)
        rows = theta.reshape(len(features), -1, self.prior.dim)
        n = rows.shape[1]
        # many theta at an observation: split them up as if there were more observations
        pieces, each = _pieces(n, self.prior.dim)
        padded = _pad(rows, pieces * each).reshape(-1, each, self.prior.dim)
        repeated = jnp.repeat(features, pieces, axis=0)
        evaluate = partial(mixtures.log_prob, self._parts, self.prior, self.weights)
        out = self._in_chunks(evaluate, each, repeated, padded)[0].reshape(len(features), -1)
        out = out[:, :n]
        return self._solved(out, out.reshape(theta.shape[:-1]))

    def map(self, x: Obs, *, key: Key | None = None, starts: int = 1000, steps: int = 200) -> Array:
        """Mode of the posterior: the best of many draws, refined by gradient ascent.

        Args:
            x: One observation or a batch.
            key: Random key of the draws; a fixed one by default, so that the result is
                deterministic.
            starts: Number of draws.
            steps: Steps of Adam.

        Returns:
            Shape (D,), or (B, D) for a batch.

        Raises:
            ValueError: x does not fit, or a number is not positive.
        """
        require_count(1, starts=starts, steps=steps)
        key = jax.random.key(0) if key is None else key
        draws, log_prob = self.sample_and_log_prob(key, x, starts)
        features, single = self._features(x)
        draws = draws.reshape(-1, starts, self.prior.dim)
        best = jnp.argmax(log_prob.reshape(-1, starts), axis=1)
        first = draws[jnp.arange(len(draws)), best]
        refine = partial(mixtures.ascend, self._parts, self.prior, steps, self.weights)
        modes = self._in_chunks(refine, 1, features, first)[0]
        return modes[0] if single else modes

    def to_arviz(self, key: Key, x: Obs, *, n: int = 4000, prior_draws: int = 1000) -> Any:
        """Draws as ArviZ data with named variables.

        Args:
            key: Random key.
            x: One observation.
            n: Number of posterior draws (one chain: they are independent).
            prior_draws: Number of prior draws.

        Returns:
            `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (ArviZ 1.x) with the groups
            posterior, sample_stats (`lp`), prior and observed_data.

        Raises:
            ValueError: x is a batch or does not fit, or a number of draws is not positive.
        """
        from sbi_flows.posteriors.arviz import arviz_groups

        require_count(1, n=n, prior_draws=prior_draws)
        if not self.is_single(x):
            raise ValueError("x: expected one observation, got a batch")
        posterior_key, prior_key = jax.random.split(key)
        draws, log_prob = self.sample_and_log_prob(posterior_key, x, n)
        prior = self.prior.sample(prior_key, prior_draws)
        return arviz_groups(self.prior, draws, log_prob, prior, x)

    def save(self, path: str | os.PathLike[str], *, report: Any = None) -> None:
        """Write the posterior to one file, which `sf.load` reads; nothing in it is ever executed.

        The file is complete or not there: one of the same name stays until the new one is written.

        Args:
            path: The file; by custom it ends in `.sbif`.
            report: What `sf.check` found, which then travels in `record["check"]`.

        Raises:
            ValueError: A density, network or solver is of the user's own class, the observation is
                of other containers than dicts, lists and tuples, or `report` is no report.
            OSError: The file cannot be written.
        """
        save(self, path, report=report)

    def to_saved(self) -> SavedPosterior:
        """Return what a file says of the posterior.

        Raises:
            ValueError: A part of the posterior cannot be written.
        """
        return codec_direct.encode(
            codec_direct.Contents(
                prior=self.prior,
                blueprints=self.blueprints,
                weights=self.weights,
                shares=self.shares,
                standardiser=self.standardiser,
                observation=self.observation,
                record=self.record,
                typicality=self.typicality,
            )
        )

    def misspecification(self, x: Obs, *, level: float = 0.05) -> Any:
        """Whether an observation is typical of the training simulations, and which entries are not.

        Args:
            x: One observation.
            level: Probability of flagging an observation that the simulator made.

        Returns:
            A `Misspecification`, whose text is a table and which plots itself.

        Raises:
            ValueError: x is a batch or does not fit, the level is not between 0 and 1, or the
                posterior was made without its training simulations.
        """
        from sbi_flows.observations.misspecification import misspecification

        return misspecification(self, x, level=level)

    def _gate(self, features: Array, single: bool, *, stacklevel: int) -> None:
        """Warn once if a single observation is not typical of the training simulations."""
        if single and self.typicality is not None:
            labels = partial(entry_labels, self.observation)
            values = partial(self._spaces, features)
            self.typicality.gate(features, labels, values, stacklevel)

    def _draw(self, key: Key, x: Obs, n: int, *, with_log_prob: bool) -> tuple[Array, Array]:
        require_count(1, n=n)
        key = as_random_key("key", key)
        features, single = self._features(x)
        require_memory("n", (len(features), int(n), self.prior.dim), features.dtype)
        self._gate(features, single, stacklevel=5)
        # many draws for an observation: split them up as if there were more observations
        pieces, each = _pieces(n, self.prior.dim)
        repeated = jnp.repeat(features, pieces, axis=0)
        keys = jax.random.split(key, len(repeated))
        evaluate = partial(
            mixtures.sample, self._parts, self.prior, each, with_log_prob, self.weights
        )
        draws, log_prob = self._in_chunks(evaluate, each, repeated, keys)
        draws = draws.reshape(len(features), -1, self.prior.dim)[:, :n]
        log_prob = log_prob.reshape(len(features), -1)[:, :n]
        found = (draws[0], log_prob[0]) if single else (draws, log_prob)
        # a log density that was not asked for is zero
        return self._solved(jnp.sum(draws, axis=-1) + log_prob, found)

    def _in_chunks(self, evaluate: Any, each: int, features: Array, other: Array) -> tuple:
        """Run over chunks of observations of one padded shape and join the results."""
        total = len(features)
        size = min(total, max(1, ENTRIES // (each * self.prior.dim)))
        if size == total:
            return evaluate(features, other)
        outputs = []
        for start in range(0, total, size):
            rows = np.arange(start, start + size) % total
            outputs.append(evaluate(features[rows], other[rows]))
        return tuple(jnp.concatenate(parts)[:total] for parts in zip(*outputs, strict=True))

    def _solved(self, values: Array, found: Any) -> Any:
        """What was found, unless there is NaN, a failed solve, in values of observations (B, *)."""
        if not self.solved:
            return found
        failed = np.flatnonzero(_any_nan(values))
        if len(failed):
            some = ", ".join(map(str, failed[:5])) + (", ..." if len(failed) > 5 else "")
            raise SolveFailed(
                f"x: the ODE was not solved at {len(failed)} of {len(values)} observations "
                f"(numbers {some}); `.values` holds what was. The density's "
                "sf.Solver(max_steps=...) allows more steps, a larger rtol and atol need fewer",
                values=found,
            )
        return found

    @property
    def _parts(self) -> mixtures.Parts:
        return tuple(zip(self.blueprints, self.shares, strict=True))

    def features(self, x: Obs) -> Array:
        """Standardised features (B, C) of a batch of observations, or (1, C) of one."""
        return self._features(x)[0]

    def spaces(self, x: Obs) -> tuple[np.ndarray, ...]:
        """Features (B, C) and, where there is an embedding, what its first member makes of them."""
        return self._spaces(self.features(x))

    def _spaces(self, features: Array) -> tuple[np.ndarray, ...]:
        return spaces_of(self.blueprints[0], self.weights[0], features)

    def is_single(self, x: Obs) -> bool:
        """Whether x is one observation, and no batch of them."""
        return as_batch(x, self.observation)[1]

    def _features(self, x: Obs) -> tuple[Array, bool]:
        """Validate x; features (B, C), and whether x was a single observation."""
        batch, single = as_batch(x, self.observation)
        return _standardised(self.standardiser, batch), single


@jax.jit
def _any_nan(values: Array) -> Array:
    return jnp.any(jnp.isnan(values.reshape(len(values), -1)), axis=1)


@jax.jit
def _standardised(standardiser: Standardiser, x: Obs) -> Array:
    return standardiser(x)


def as_batch(x: Obs, like: Obs) -> tuple[Obs, bool]:
    """Bring one observation or a batch to (B, *event).

    Args:
        x: What the user gave.
        like: Shape and dtype of one observation.

    Returns:
        The batch, and whether x was a single observation.

    Raises:
        ValueError: x does not fit, holds no real numbers, or is not finite.
    """
    expected = [tuple(leaf.shape) for leaf in jax.tree.leaves(like)]
    x = jax.tree.map(np.asarray, as_real_tree("x", x))
    if jax.tree.structure(x) != jax.tree.structure(like):
        raise ValueError(f"x: expected {_in_words(like)}, got {_in_words(x)}")
    leaves = jax.tree.leaves(x)
    if not all(np.all(np.isfinite(leaf)) for leaf in leaves):
        raise ValueError("x: expected finite values, got NaN or infinity")
    shapes = [leaf.shape for leaf in leaves]
    single = shapes == expected
    lengths = {s[:1] for s in shapes}
    if not single and ([s[1:] for s in shapes] != expected or len(lengths) != 1):
        wanted = expected[0] if len(expected) == 1 else expected
        got = shapes[0] if len(shapes) == 1 else shapes
        raise ValueError(f"x: expected shape {wanted}, or a batch of it, got {got}")
    if not single and () not in lengths and lengths == {(0,)}:
        raise ValueError("x: expected at least one observation, got an empty batch")
    batch = [jnp.asarray(leaf[None] if single else leaf) for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(like), batch), single


def _in_words(x: Obs) -> str:
    if isinstance(x, Mapping):
        return f"a dict of arrays with the keys {sorted(map(str, x))}"
    return f"an array of shape {x.shape}" if hasattr(x, "shape") else type(x).__name__


def _pieces(n: int, dim: int) -> tuple[int, int]:
    """Split n draws into pieces of equal size, each small enough for one call."""
    each = max(1, ENTRIES // dim)
    count = math.ceil(n / each)
    return count, math.ceil(n / count)


def _pad(rows: Array, n: int) -> Array:
    """Repeat the last of the rows (B, m, D) until there are n."""
    missing = n - rows.shape[1]
    return jnp.pad(rows, ((0, 0), (0, missing), (0, 0)), mode="edge") if missing else rows
