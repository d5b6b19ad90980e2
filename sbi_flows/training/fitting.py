"""The loop over epochs: progress, early stopping, and what is left when it ends otherwise."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm.auto import tqdm

from sbi_flows.core.errors import SbiFlowsWarning, TrainingDiverged
from sbi_flows.core.typing import Key
from sbi_flows.densities.conditional import Blueprint, Weights, has_likelihood_loss, needs_ode
from sbi_flows.densities.ode import SolverStats
from sbi_flows.training.checkpoint import Checkpoint
from sbi_flows.training.devices import to_host
from sbi_flows.training.ensemble import Ensemble
from sbi_flows.training.fingerprint import parts
from sbi_flows.training.history import History
from sbi_flows.training.members import Best
from sbi_flows.training.settings import Training
from sbi_flows.training.stream import Stream


def fit(
    key: Key,
    blueprint: Blueprint,
    training: Training,
    y: Array,
    features: Array,
    *,
    members: int = 1,
    offset: Array | None = None,
    own: int = 0,
    stream: Stream | None = None,
    progress: bool = True,
    label: str = "fit",
    name: str = "fit",
) -> tuple[Weights, History]:
    """Train `members` models with different initial weights, data orders and validation rows.

    Args:
        key: Random key.
        blueprint: What to build.
        training: Settings.
        y: Parameters in standard coordinates, shape (N, d).
        features: Standardised observations, shape (N, C).
        members: Number of models M.
        offset: Log Jacobian of each row from y to theta's units, shape (N,), for the losses that
            are reported; none by default.
        own: Number of rows that each member has for itself, to train on beside those that all
            share: the last M * own rows, in order.
        stream: Rows to train on instead, of which those above are a sample; see `Ensemble`.
        progress: Show a progress bar.
        label: What it says.
        name: Name of the fit's file in the folder `training.checkpoint`.

    Returns:
        The best weights of each member, and the history.

    Raises:
        ValueError: Too few rows to hold any out, or the checkpoint is that of another fit.
        TrainingDiverged: A loss was not finite; its `state` holds the best `Weights` so far.
        CheckpointSpoilt: The checkpoint is not what was written.
    """
    began = time.perf_counter()
    start_key, epoch_key = jax.random.split(key)
    offset = jnp.zeros(len(y), y.dtype) if offset is None else offset
    file = None
    if training.checkpoint is not None:
        data = {"y": y, "features": features, "offset": offset}
        rows = None if stream is None else len(stream.rows)
        numbers = {"members": members, "own": own, "rows": rows}
        file = Checkpoint(training, name, parts(key, blueprint, training, data, **numbers))
    saved = file.read() if file else None
    with Ensemble(
        start_key, blueprint, training, y, features, offset, members, own, stream
    ) as ensemble:
        row_units = np.asarray(ensemble.units.held_out)
        likelihood = has_likelihood_loss(blueprint)
        units = np.stack([ensemble.units.train, row_units.mean(axis=1)]) * likelihood
        start_loss = ensemble.best_loss + units[1]
        _require_finite(start_loss, 0, ensemble)
        losses = _resumed(ensemble, file, saved) if file and saved else ()
        # weights and losses are replaced as one, so an interrupt never finds them epochs apart
        done, first = (ensemble.best, losses), len(losses)
        total = training.max_epochs if ensemble.running.any() else first
        bar = tqdm(
            range(first, total),
            desc=label,
            unit="epoch",
            disable=not progress,
            initial=first,
            total=training.max_epochs,
        )
        try:
            for epoch in bar:
                means = ensemble.epoch(jax.random.fold_in(epoch_key, epoch))
                train, validation = np.stack(means) + units
                _require_finite(np.concatenate([train, validation]), epoch + 1, ensemble)
                done = ensemble.best, (*done[1], (train, validation))
                bar.set_postfix(train=f"{train.mean():.3f}", validation=f"{validation.mean():.3f}")
                ended = not ensemble.running.any()
                if file:
                    last = ended or epoch + 1 == total
                    file.keep(epoch + 1, partial(_kept, ensemble, done[1]), last=last)
                if ended:
                    break
            reason = "max_epochs" if ensemble.running.any() else "patience"
        except KeyboardInterrupt:
            reason = "interrupted"
        finally:
            bar.close()
        best, losses = done
        try:
            crossed, effort = _held_out(ensemble, best, blueprint)
        except KeyboardInterrupt:  # the weights are there
            reason, crossed, effort = "interrupted", np.full(row_units.shape, np.nan), None
    crossed = crossed + row_units
    seconds = time.perf_counter() - began
    history = _history(losses, start_loss, ensemble.held_out, crossed, seconds, reason)
    if effort is not None:
        history = dataclasses.replace(
            history, solver_steps=effort.steps, solver_evaluations=effort.evaluations
        )
    return ensemble.weights(best), dataclasses.replace(history, likelihood=likelihood)


def _kept(ensemble: Ensemble, losses: tuple) -> dict[str, Any]:
    """What a checkpoint holds: losses have shape (epochs, members)."""
    train, validation = (np.stack(values) for values in zip(*losses, strict=True))
    return {"train": train, "validation": validation, "members": ensemble.snapshot()}


def _resumed(ensemble: Ensemble, file: Checkpoint, arrays: Mapping[str, np.ndarray]) -> tuple:
    """Put the members where they were; the losses of each epoch until then."""
    ensemble.resume(file.filled({"members": ensemble.snapshot()}, arrays)["members"])
    return tuple(zip(arrays["train"], arrays["validation"], strict=True))


def _held_out(
    ensemble: Ensemble, best: tuple[Best, ...], blueprint: Blueprint
) -> tuple[np.ndarray, SolverStats | None]:
    """Negative log density (M, V) of each validation row before `units` are added, and its work."""
    if not needs_ode(blueprint):
        return np.concatenate([to_host(b.crossed) for b in best]), None
    losses, effort = ensemble.densities(best)
    if has_likelihood_loss(blueprint):
        return np.concatenate([to_host(b.crossed) for b in best]), effort
    unsolved = int(np.sum(np.isnan(losses)))
    if unsolved:
        said = f"held_out_loss: the ODE was not solved for {unsolved} of {losses.size} rows"
        warnings.warn(said, SbiFlowsWarning, stacklevel=4)
    return losses, effort


def _require_finite(values: np.ndarray, epoch: int, ensemble: Ensemble) -> None:
    if not np.all(np.isfinite(values)):
        raise TrainingDiverged(
            f"the loss was not finite in epoch {epoch}; the last finite weights are kept in "
            f"`.state`. A smaller learning rate or clip_norm may help{ensemble.more_advice}",
            epoch=epoch,
            state=ensemble.weights(ensemble.best),
        )


def _history(
    losses: tuple,
    start_loss: np.ndarray,
    held_out: np.ndarray,
    crossed: np.ndarray,
    seconds: float,
    reason: str,
) -> History:
    shape = (0, len(start_loss))
    train = np.stack([a for a, _ in losses]) if losses else np.zeros(shape)
    validation = np.stack([b for _, b in losses]) if losses else np.zeros(shape)
    stacked = np.concatenate([start_loss[None], validation])
    return History(
        train_loss=train,
        validation_loss=validation,
        start_loss=start_loss,
        held_out=held_out,
        held_out_loss=crossed,
        best_epoch=np.argmin(stacked, axis=0),
        epochs=len(losses),
        seconds=seconds,
        stop_reason=reason,
    )
