"""Distillation: train a student network that draws from a continuous flow in a few evaluations.

Public names: `distil`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from types import MappingProxyType
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
from sbi_flows.core.record import to_json_data
from sbi_flows.core.typing import Key
from sbi_flows.densities.conditional import Blueprint, Weights, graph_of
from sbi_flows.densities.distilled import Distilled, add_student
from sbi_flows.densities.matching import Diffusion, FlowMatching
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.simulations.simulations import Simulations
from sbi_flows.training import Training
from sbi_flows.training.members import State

ROWS, PASSES = 2**12, 4
"""Maximum number of paths in an epoch, and number of passes over these paths.

Every epoch solves the teacher's ODE for new paths, which start at new noise.
"""

TRAINING = Training(max_epochs=30, batch_size=128, learning_rate=1e-3, ema_decay=0.999)


def distil(
    key: Key,
    posterior: Posterior,
    simulations: Simulations,
    *,
    steps: int = 2,
    training: Training | None = None,
    progress: bool = True,
) -> tuple[Posterior, np.ndarray]:
    """Distil a fitted posterior: train a student network whose draws take a few evaluations.

    The fitted posterior is the teacher. The student learns the solutions of the teacher's ODE, as
    the sampler `Heun` computes them, even if the teacher has another sampler. The student only
    makes the draws; log densities are still computed by the teacher. Use `c2st` to measure how
    much the draws of the student and of the teacher differ. If the returned errors still fall in
    the last epochs, train for more epochs.

    Args:
        key: Random key.
        posterior: Fitted posterior whose density is `FlowMatching` or `Diffusion`, or a stack of
            such posteriors.
        simulations: Simulations that the posterior was fitted to. Only their observations are used.
        steps: Number of evaluations of the student for each draw.
        training: Training settings, by default 30 epochs with a batch size of 128. The number of
            epochs, the batch size, the optimiser settings, the precision of matrix products and
            the weight average (`ema_decay`) are used. Settings of validation are ignored: no rows
            are held out, because every epoch draws new noise. A checkpoint is not supported.
        progress: Show a progress bar.

    Returns:
        The distilled posterior, and the errors of the student, shape (epochs, members). An error is
        the root mean square distance between the data point that the student predicts and its
        target, in whitened coordinates. It is computed at the start of each epoch, on the new paths
        of that epoch. After an interrupt (Ctrl-C), training ends early and the result of the
        finished epochs is returned; every density of a stack is trained for at least one epoch.

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
    require_object("posterior", posterior, Posterior, "an sf.Posterior")
    require_object("simulations", simulations, Simulations, "sf.Simulations")
    require_count(1, steps=steps)
    training = TRAINING if training is None else training
    if training.checkpoint is not None:
        raise ValueError("checkpoint: expected none, as a distillation keeps no state, got one")
    kinds = (FlowMatching, Diffusion)
    for blueprint in posterior.blueprints:
        wanted = "a posterior of sf.FlowMatching or sf.Diffusion"
        require_object("posterior", blueprint.density, kinds, wanted)
    if not simulations.num_valid:
        raise ValueError(f"simulations: expected valid ones, got none of {len(simulations)}")
    features = posterior.features(simulations.only_valid().x)
    made, errors = [], []
    parts = zip(posterior.blueprints, posterior.weights, strict=True)
    epochs = training.max_epochs
    for i, (blueprint, weights) in enumerate(parts):
        density = Distilled(teacher=blueprint.density, steps=steps)  # type: ignore[arg-type]
        student = _Student(dataclasses.replace(blueprint, density=density), training)
        given, own = blueprint.select_features(features), jax.random.fold_in(key, i)
        weights, found = student.taught(own, weights, given, epochs, progress=progress)
        epochs = len(found)  # after an interrupt, later densities stop at this epoch
        if not np.all(np.isfinite(found)):
            raise TrainingDiverged(
                f"the error was not finite in epoch {len(found)}; the posterior that was given is "
                "kept in `.state`. A smaller learning rate may help, unless that was so in epoch 1",
                epoch=len(found),
                state=posterior,
            )
        made.append((student.blueprint, weights))
        errors.append(found)
    blueprints, weights = zip(*made, strict=True)
    joined = np.concatenate([found[:epochs] for found in errors], axis=1)
    taught = {"steps": steps, "training": to_json_data(training), "errors": to_json_data(joined)}
    record = MappingProxyType({**posterior.record, "distilled": taught})
    made_of = {"blueprints": blueprints, "weights": weights, "record": record}
    return dataclasses.replace(posterior, **made_of), joined


class _Student(NamedTuple):
    """Static settings of a distillation; they are compiled into its program."""

    blueprint: Blueprint
    training: Training

    def taught(
        self, key: Key, weights: Weights, features: Array, epochs: int, *, progress: bool
    ) -> tuple[Weights, np.ndarray]:
        """Train the student.

        Returns:
            Weights of teacher and student, and the errors (epochs, M). Training ends at the first
            error that is not finite.
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
                    own = jax.random.fold_in(key, epoch)
                    new, error = _epoch(self, weights, state, features, epoch, own)
                    state, found = new, np.asarray(error)
                    errors.append(found)
                    bar.set_postfix(error=f"{found.mean():.3f}")
                    if not np.all(np.isfinite(found)):
                        break
            except KeyboardInterrupt:  # keep the result of the finished epochs
                if not errors:
                    raise
        density = {**weights.params["density"], "student": state.average}
        count = len(jax.tree.leaves(weights)[0])
        return (
            weights._replace(params={**weights.params, "density": density}),
            np.asarray(errors).reshape(-1, count),
        )


@partial(jax.jit, static_argnums=0)
@full_precision
def _epoch(
    student: _Student, weights: Weights, state: State, features: Array, epoch: int | Array, key: Key
) -> tuple[State, Array]:
    """Train all members for one epoch on new paths.

    Returns:
        The new state, and the error (M,) of the averaged weights at the start of the epoch.
    """
    blueprint, training = student
    batch = training.batch(ROWS)
    count = ROWS // batch  # number of steps in a pass
    decay = training.ema_decay or 0.0

    def model(weights: Weights, params: Any) -> Any:
        density = {**weights.params["density"], "student": params}
        full = {**weights.params, "density": density}
        return nnx.merge(graph_of(blueprint), full, weights.rest)

    def one(inputs: tuple[Weights, State, Key, Array]) -> tuple[State, Array]:
        weights, state, key, rate = inputs
        transform = training.transform(PASSES * count * training.max_epochs, rate)
        row_key, noise_key, order_key = jax.random.split(key, 3)
        chosen = jax.random.randint(row_key, (count * batch,), 0, len(features))
        noise = jax.random.normal(noise_key, (count * batch, blueprint.sizes.dim), features.dtype)
        teacher = model(weights, state.params)
        context = teacher.context(features[chosen])
        paths = teacher.density.teacher_paths(noise, context)
        orders = jax.random.split(order_key, PASSES)
        order = jnp.stack([jax.random.permutation(k, count * batch) for k in orders])

        def loss(params: Any, paths: Array, context: Array) -> Array:
            with precision_context(training.matmul_precision):
                return jnp.mean(model(weights, params).density.student_errors(paths, context))

        def step(state: State, inputs: tuple[Array, Array]) -> tuple[State, None]:
            number, places = inputs
            gradient = jax.grad(loss)(state.params, paths[:, places], context[places])
            updates, optimiser = transform.update(gradient, state.optimiser, state.params)
            params = optax.apply_updates(state.params, updates)
            # average over few steps at first, so that the initial weights lose their influence
            kept = jnp.minimum(decay, (1.0 + number) / (10.0 + number))
            average = optax.incremental_update(params, state.average, 1.0 - kept)
            return State(params, average, optimiser), None

        error = jnp.sqrt(loss(state.average, paths, context))
        numbers = epoch * PASSES * count + jnp.arange(PASSES * count)
        batches = order.reshape(PASSES * count, batch)
        return jax.lax.scan(step, state, (numbers, batches))[0], error

    members = len(jax.tree.leaves(weights)[0])
    rates = jnp.asarray(np.resize(training.learning_rate, members), features.dtype)
    return jax.lax.map(one, (weights, state, jax.random.split(key, members), rates))
