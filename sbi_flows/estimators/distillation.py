"""Distillation of a continuous flow into a network that draws in a few steps.

Public names: `distil`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from tqdm.auto import tqdm

from sbi_flows.core.checks import require_count, require_object
from sbi_flows.core.errors import TrainingDiverged
from sbi_flows.core.precision import full_precision, precision_context
from sbi_flows.core.record import ReadOnlyDict, to_json_data
from sbi_flows.core.typing import Key
from sbi_flows.densities.conditional import Blueprint, Weights, graph_of
from sbi_flows.densities.distilled import Distilled, add_student
from sbi_flows.densities.matching import Diffusion, FlowMatching
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.posteriors.fresh import hidden_as_in_fit
from sbi_flows.simulations.fingerprints import UsedRows
from sbi_flows.simulations.simulations import Simulations
from sbi_flows.training import Training
from sbi_flows.training.group import State

MAX_PATHS, PASSES = 2**12, 4
"""Maximum number of paths in an epoch, and passes over them. Each epoch has paths of new noise."""

DEFAULT_TRAINING = Training(max_epochs=30, batch_size=128, learning_rate=1e-3, ema_decay=0.999)


def distil(
    key: Key,
    posterior: Posterior,
    simulations: Simulations,
    *,
    steps: int = 2,
    training: Training | None = None,
    progress: bool = True,
) -> tuple[Posterior, np.ndarray]:
    """Train a second network to follow the ODE of a fitted posterior in a few steps.

    The new posterior has other draws, but the same densities as the given posterior. The network
    learns from solutions of the ODE by `Heun`; the posterior's own sampler is not used. Use `c2st`
    to compare the new draws with the old ones. The returned errors show whether training ended
    too early.

    Args:
        key: Random key.
        posterior: A posterior of `FlowMatching` or `Diffusion`, or a mixture of these, from any
            estimator.
        simulations: The simulations to which the posterior was fitted. Only their observations are
            used.
        steps: Number of evaluations of the network in a draw.
        training: Training settings. Only the epochs, the batch size, the optimiser, the precision
            of products and the average of the weights are used. No rows are held out, because
            every epoch draws new noise. Checkpoints are not supported. The default is 30 epochs
            with batches of 128.
        progress: Show a progress bar.

    Returns:
        The posterior that draws in a few steps, and the errors, shape (epochs, members). An error
        is the root mean square distance between the end points that the new network predicts and
        the end points of the ODE, in whitened units. It is computed before each epoch, on paths
        that the network has not seen. An interrupt (Ctrl-C) ends training early; each component
        of a mixture is still trained for at least one epoch.

    Raises:
        ValueError: A density of the posterior is neither `FlowMatching` nor `Diffusion`, no
            simulation is valid, or `training` has a checkpoint.
        TrainingDiverged: An error is not finite. The attribute `state` of the exception holds the
            posterior that was passed in.

    References:
        Knowledge distillation, arXiv:2101.02388; progressive distillation, arXiv:2202.00512.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0.0, 1.0).expand([1])
        >>> noisy = lambda key, theta: theta + jax.random.normal(key, (1,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 200, progress=False)
        >>> brief = sf.Training(max_epochs=1, batch_size=64)
        >>> flow = sf.FlowMatching(network=sf.Film(width=8, blocks=1))
        >>> npe = sf.NPE(prior, flow, training=brief, members=1)
        >>> posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
        >>> fast, errors = sf.distil(
        ...     jax.random.key(2), posterior, sims, steps=1, training=brief, progress=False
        ... )
        >>> fast.sample(jax.random.key(3), sims.x[0], 5).shape, errors.shape
        ((5, 1), (1, 1))
    """
    training = DEFAULT_TRAINING if training is None else training
    _check(posterior, simulations, steps, training)
    valid = hidden_as_in_fit(key, posterior, simulations.only_valid())
    features = posterior.features(valid.x)
    parts, errors, epochs = [], [], training.max_epochs
    for i, (blueprint, teacher) in enumerate(
        zip(posterior.blueprints, posterior.weights, strict=True)
    ):
        density = Distilled(teacher=blueprint.density, steps=steps)  # type: ignore[arg-type]  # checked above
        student = _Student(dataclasses.replace(blueprint, density=density), training)
        selected, part_key = blueprint.inputs(features), jax.random.fold_in(key, i)
        weights, part_errors = student.train(part_key, teacher, selected, epochs, progress=progress)
        epochs = len(part_errors)  # an interrupt ends the training of all parts
        if not np.all(np.isfinite(part_errors)):
            raise TrainingDiverged(
                f"the error was not finite in epoch {epochs}; the posterior that was given is kept "
                "in `.state`. A smaller learning rate may help, unless this was epoch 1",
                epoch=epochs,
                state=posterior,
            )
        parts.append((student.blueprint, weights))
        errors.append(part_errors)
    blueprints, weights = zip(*parts, strict=True)
    joined = np.concatenate([part_errors[:epochs] for part_errors in errors], axis=1)
    entry = {"steps": steps, "training": to_json_data(training), "errors": to_json_data(joined)}
    record = ReadOnlyDict({**posterior.record, "distilled": entry})
    rows = UsedRows.of(simulations, posterior.prior).union(posterior.used_rows)
    changed = {"blueprints": blueprints, "weights": weights, "record": record, "used_rows": rows}
    return dataclasses.replace(posterior, **changed), joined


def _check(posterior: Posterior, simulations: Simulations, steps: int, training: Training) -> None:
    """Raise ValueError if the posterior cannot be distilled with these settings."""
    require_object("posterior", posterior, Posterior, "an sf.Posterior")
    require_object("simulations", simulations, Simulations, "sf.Simulations")
    require_count(1, steps=steps)
    if training.checkpoint is not None:
        raise ValueError("checkpoint: expected none, as a distillation keeps no state, got one")
    kinds = (FlowMatching, Diffusion)
    for blueprint in posterior.blueprints:
        expected = "a posterior of sf.FlowMatching or sf.Diffusion"
        require_object("posterior", blueprint.density, kinds, expected)
    if not simulations.num_valid:
        raise ValueError(f"simulations: expected valid ones, got none of {len(simulations)}")


class _Student(NamedTuple):
    """Settings and sizes of a distillation; its compiled program depends on them."""

    blueprint: Blueprint
    training: Training

    def train(
        self, key: Key, weights: Weights, features: Array, epochs: int, *, progress: bool
    ) -> tuple[Weights, np.ndarray]:
        """Train the student of each member.

        Args:
            key: Random key.
            weights: Weights of the teacher.
            features: Features of the observations, shape (N, C).
            epochs: Number of epochs.
            progress: Show a progress bar.

        Returns:
            Weights of teacher and student, and the errors, shape (epochs, M). Training stops at
            the first error that is not finite.
        """
        weights = weights._replace(rest=add_student(weights.rest))
        student = add_student(weights.params)["density"]["student"]
        optimiser = self.training.transform(1, 1.0)
        state = State(student, student, jax.vmap(optimiser.init)(student))
        errors: list[np.ndarray] = []
        bar = tqdm(range(epochs), desc="distil", unit="epoch", disable=not progress)
        with bar:
            try:
                for epoch in bar:
                    epoch_key = jax.random.fold_in(key, epoch)
                    new, error = _epoch(self, weights, state, features, epoch, epoch_key)
                    state, last = new, np.asarray(error)
                    errors.append(last)
                    bar.set_postfix(error=f"{last.mean():.3f}")
                    if not np.all(np.isfinite(last)):
                        break
            except KeyboardInterrupt:  # the epochs before it count
                if not errors:
                    raise
        density = {**weights.params["density"], "student": state.average}
        count = len(jax.tree.leaves(weights)[0])
        return (
            weights._replace(params={**weights.params, "density": density}),
            np.asarray(errors).reshape(-1, count),
        )

    # its density is that of `Distilled`, which has more methods than `Density`
    def model(self, weights: Weights, student: Any) -> Any:
        """Return the model of one member, with the given weights of the student."""
        density = {**weights.params["density"], "student": student}
        params = {**weights.params, "density": density}
        return nnx.merge(graph_of(self.blueprint), params, weights.rest)

    def loss(self, weights: Weights, student: Any, paths: Array, context: Array) -> Array:
        """Return the mean squared error of the student's predicted end points of ODE solutions."""
        with precision_context(self.training.matmul_precision):
            return jnp.mean(self.model(weights, student).density.student_errors(paths, context))


@partial(jax.jit, static_argnums=0)
@full_precision
def _epoch(
    student: _Student, weights: Weights, state: State, features: Array, epoch: int | Array, key: Key
) -> tuple[State, Array]:
    """Train for one epoch on new paths; also return the earlier averaged weights' error on them."""
    members = len(jax.tree.leaves(weights)[0])
    rates = jnp.asarray(np.resize(student.training.learning_rate, members), features.dtype)
    one = partial(_member_epoch, student, features, epoch)
    return jax.lax.map(one, (weights, state, jax.random.split(key, members), rates))


def _member_epoch(
    student: _Student,
    features: Array,
    epoch: int | Array,
    inputs: tuple[Weights, State, Key, Array],
) -> tuple[State, Array]:
    weights, state, key, learning_rate = inputs
    blueprint, training = student
    batch_size = training.batch(MAX_PATHS)
    count = MAX_PATHS // batch_size  # steps in a pass
    optimiser = training.transform(PASSES * count * training.max_epochs, learning_rate)
    row_key, noise_key, order_key = jax.random.split(key, 3)
    rows = jax.random.randint(row_key, (count * batch_size,), 0, len(features))
    shape = (count * batch_size, blueprint.sizes.dim)
    noise = jax.random.normal(noise_key, shape, features.dtype)
    teacher = student.model(weights, state.params)
    context = teacher.context(features[rows])
    paths = teacher.density.teacher_paths(noise, context)
    orders = jax.random.split(order_key, PASSES)
    order = jnp.stack([jax.random.permutation(k, count * batch_size) for k in orders])
    loss = partial(student.loss, weights)

    def step(state: State, inputs: tuple[Array, Array]) -> tuple[State, None]:
        number, places = inputs
        gradient = jax.grad(loss)(state.params, paths[:, places], context[places])
        updates, optimiser_state = optimiser.update(gradient, state.optimiser, state.params)
        params = optax.apply_updates(state.params, updates)
        # a short average at first, so that it forgets the weights of the teacher
        decay = jnp.minimum(training.ema_decay or 0.0, (1.0 + number) / (10.0 + number))
        average = optax.incremental_update(params, state.average, 1.0 - decay)
        return State(params, average, optimiser_state), None

    error = jnp.sqrt(loss(state.average, paths, context))
    numbers = epoch * PASSES * count + jnp.arange(PASSES * count)
    batches = order.reshape(PASSES * count, batch_size)
    return jax.lax.scan(step, state, (numbers, batches))[0], error
