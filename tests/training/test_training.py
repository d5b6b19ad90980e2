"""Fitting: reproducible, compiled once, stopped in time; what a failed fit leaves behind."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sbi_flows as sf
from sbi_flows import training
from sbi_flows.core.errors import SbiFlowsError, TrainingDiverged
from sbi_flows.densities.conditional import Blueprint, Weights
from sbi_flows.densities.sizes import Sizes
from sbi_flows.training import FitKeys, TrainingData, ensemble, fitting, members
from sbi_flows.training.group import Best, updated

ROWS, DIM, MEMBERS, BATCH = 300, 2, 2, 64
STEPS = (ROWS - ROWS // 10) // BATCH

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if "backend_compile" in event else None
)


def blueprint() -> Blueprint:
    """A new description each time, equal to all the others."""
    density = sf.MAF(transforms=1, hidden=(8,), context_width=0)
    return Blueprint(density, None, Sizes((False,) * DIM, jax.tree.structure(0), ((DIM,),)))


def uneven(seed: int) -> tuple[jax.Array, jax.Array]:
    """Parameters whose spread depends on the features, which no linear regression can tell."""
    features_key, noise_key = jax.random.split(jax.random.key(seed))
    features = jax.random.normal(features_key, (ROWS, DIM))
    return jnp.exp(features) * jax.random.normal(noise_key, (ROWS, DIM)), features


def fit(seed=0, *, data=0, progress=False, **settings):
    settings = {"batch_size": BATCH, "max_epochs": 6, "learning_rate": 3e-2} | settings
    y, features = uneven(data)
    return training.fit(
        FitKeys.of(jax.random.key(seed)),
        blueprint(),
        sf.Training(**settings),
        TrainingData.of_rows(y, features),
        members=MEMBERS,
        progress=progress,
    )


def kernels(weights: Weights) -> np.ndarray:
    """What the context alone adds to the parameters of the last entry: zero before training."""
    return np.asarray(weights.params["density"]["layers"]["rest"]["leave_context"]["kernel"])


@pytest.fixture(scope="module")
def first():
    return fit()


def test_a_second_fit_of_the_same_shapes_compiles_nothing(first):
    COMPILED.clear()
    fit(seed=1, data=1)
    assert COMPILED == []
    jax.jit(lambda x: x * 1.2345)(1.0)
    assert len(COMPILED) == 1


def test_other_settings_of_the_training_do_not_compile_the_start_anew(first):
    programs = members._start._cache_size(), members.epoch._cache_size()
    fit(max_epochs=1)
    assert members._start._cache_size() == programs[0] > 0
    assert members.epoch._cache_size() == programs[1] + 1


def test_learning_rates_are_no_constants_of_the_programs(first):
    COMPILED.clear()
    _, history = fit(learning_rate=1e-3)
    assert COMPILED == []
    assert np.all(history.best_loss > first[1].best_loss)


def test_each_member_takes_its_own_learning_rate(first):
    COMPILED.clear()
    weights, history = fit(learning_rate=(3e-2, 1e-3))
    assert COMPILED == []
    np.testing.assert_array_equal(history.train_loss[:, 0], first[1].train_loss[:, 0])
    np.testing.assert_array_equal(kernels(weights)[0], kernels(first[0])[0])
    np.testing.assert_array_equal(
        history.train_loss[:, 1], fit(learning_rate=1e-3)[1].train_loss[:, 1]
    )


def test_the_history_tells_what_happened(first):
    _, history = first
    assert history.train_loss.shape == history.validation_loss.shape == (6, MEMBERS)
    assert history.start_loss.shape == history.best_epoch.shape == (MEMBERS,)
    assert (history.epochs, history.stop_reason) == (6, "max_epochs")
    assert history.seconds > 0
    losses = np.concatenate([history.start_loss[None], history.validation_loss])
    np.testing.assert_array_equal(history.best_epoch, losses.argmin(axis=0))
    np.testing.assert_array_equal(history.best_loss, losses.min(axis=0))
    assert np.all(history.best_loss < history.start_loss - 0.1)
    expected = r"History(6 epochs in .* s, stopped by max_epochs; validation loss ["
    assert repr(history).startswith("History(6 epochs in ")
    assert expected.split(" s, ")[1] in repr(history)


def test_the_same_key_gives_the_same_fit_and_another_key_another(first):
    weights, history = first
    again, again_history = fit()
    for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(history.train_loss, again_history.train_loss)
    other, other_history = fit(seed=1)
    assert np.max(np.abs(kernels(weights) - kernels(other))) > 1e-3
    assert not np.any(history.train_loss == other_history.train_loss)


def test_members_differ_and_hold_out_different_rows(first):
    weights, history = first
    one, two = kernels(weights)
    assert np.max(np.abs(one - two)) > 1e-3
    assert np.all(history.validation_loss[:, 0] != history.validation_loss[:, 1])
    # the start is fitted to each member's own training rows
    assert np.any(weights.rest["start"].weight[0] != weights.rest["start"].weight[1])


def test_folds_of_the_members_do_not_overlap():
    train, held_out = ensemble._folds(jax.random.key(0), 100, 10, 4)
    assert len(set(np.asarray(held_out).ravel())) == 40
    for a, b in zip(train, held_out, strict=True):
        assert sorted([*np.asarray(a), *np.asarray(b)]) == list(range(100))


def test_rows_of_a_member_are_added_to_its_training_rows_alone():
    shared_train, shared_held_out = ensemble._folds(jax.random.key(0), 100, 10, 4)
    train, held_out = ensemble._folds(jax.random.key(0), 100, 10, 4, 7)
    np.testing.assert_array_equal(held_out, shared_held_out)
    np.testing.assert_array_equal(train[:, :90], shared_train)
    np.testing.assert_array_equal(train[:, 90:].ravel(), 100 + np.arange(28))


def test_a_fit_learns_from_the_rows_of_its_own():
    """The first of two members is given more draws of the same law, the second misleading ones."""
    y, features = uneven(0)
    more, more_features = uneven(1)
    rows = jnp.concatenate([y, more, -20.0 + 0.0 * more])
    all_features = jnp.concatenate([features, more_features, more_features])
    _, history = training.fit(
        FitKeys.of(jax.random.key(0)),
        blueprint(),
        sf.Training(batch_size=BATCH, max_epochs=6, learning_rate=3e-2),
        TrainingData(rows, all_features, jnp.zeros(len(rows)), member_rows=ROWS),
        members=MEMBERS,
        progress=False,
    )
    assert history.held_out.max() < ROWS
    _, plain = fit()
    assert abs(history.best_loss[0] - plain.best_loss[0]) < 0.5
    assert history.best_loss[1] > plain.best_loss[1] + 0.5


def test_held_out_losses_are_of_the_epoch_that_the_other_half_chose():
    losses = jnp.array([[3.0, 9.0], [2.0, 4.0], [5.0, 1.0]])  # an epoch a row; two validation rows
    best = Best(jnp.zeros(()), jnp.inf, jnp.zeros((), int), jnp.full(2, jnp.inf), jnp.zeros(2))
    for epoch, values in enumerate(losses):
        best = updated(best, jnp.asarray(float(epoch)), values, jnp.asarray(True))
    # row 0 by the epoch that is best for row 1, and the other way round
    np.testing.assert_array_equal(best.cross_losses, [5.0, 4.0])
    np.testing.assert_array_equal(best.half_losses, [2.0, 1.0])
    assert (float(best.params), float(best.loss), int(best.age)) == (1.0, 3.0, 1)
    stopped = updated(best, jnp.asarray(9.0), jnp.zeros(2), jnp.asarray(False))
    np.testing.assert_array_equal(stopped.cross_losses, best.cross_losses)
    assert float(stopped.loss) == 3.0
    # a single row is both halves
    one = best._replace(cross_losses=jnp.zeros(1), half_losses=jnp.full(2, jnp.inf))
    np.testing.assert_array_equal(
        updated(one, jnp.zeros(()), jnp.array([0.5]), jnp.asarray(True)).cross_losses, [0.5]
    )


def test_held_out_losses_are_honest_and_in_the_units_of_the_others(first):
    _, history = first
    assert history.held_out_loss.shape == history.held_out.shape
    honest = history.held_out_loss.mean(axis=1)
    # two halves cannot both do better than the best epoch, up to how they were weighed
    assert np.all(honest >= history.best_loss - 1e-4)
    assert np.all(honest < history.best_loss + 0.3)


def test_an_offset_moves_the_reported_losses_alone(first):
    """Each by the mean over its own rows."""
    _, history = first
    offset = 5.0 + np.exp(np.random.default_rng(3).normal(size=ROWS)).astype(np.float32)
    y, features = uneven(0)
    settings = sf.Training(batch_size=BATCH, max_epochs=6, learning_rate=3e-2)
    keys, data = FitKeys.of(jax.random.key(0)), TrainingData(y, features, jnp.asarray(offset))
    _, moved = training.fit(keys, blueprint(), settings, data, members=MEMBERS, progress=False)
    rows = ensemble._folds(keys.folds, ROWS, ROWS // 10, MEMBERS)
    train, held_out = (np.mean(offset[r], axis=1) for r in map(np.asarray, rows))
    assert abs(train[0] - held_out[0]) > 0.1
    np.testing.assert_allclose(moved.train_loss, history.train_loss + train, rtol=1e-4)
    np.testing.assert_allclose(moved.validation_loss, history.validation_loss + held_out, rtol=1e-4)
    np.testing.assert_allclose(moved.start_loss, history.start_loss + held_out, rtol=1e-4)
    np.testing.assert_array_equal(moved.best_epoch, history.best_epoch)


def test_a_fit_that_gets_worse_stops_early_and_keeps_the_start():
    uphill = optax.chain(optax.clip_by_global_norm(5.0), optax.scale(1.0))
    weights, history = fit(optimizer=uphill, patience=2, max_epochs=50)
    assert (history.epochs, history.stop_reason) == (2, "patience")
    np.testing.assert_array_equal(history.best_epoch, [0, 0])
    np.testing.assert_array_equal(history.best_loss, history.start_loss)
    np.testing.assert_array_equal(kernels(weights), 0.0)


def test_a_member_that_has_stopped_waits_for_the_others(monkeypatch):
    """One member gets worse at once and stops, the other learns to the end."""
    epoch = members.epoch

    def worse(plan, state, group, features, keys, is_active):
        state, best, train, validation = epoch(plan, state, group, features, keys, is_active)
        if is_active and group.train_rows[0, 0] == first_row:
            best, validation = group.best._replace(age=group.best.age + 1), validation + 100.0
        return state, best, train, validation

    keys = FitKeys.of(jax.random.key(0))
    first_row = ensemble._folds(keys.folds, ROWS, ROWS // 10, MEMBERS)[0][0, 0]
    monkeypatch.setattr(members, "epoch", worse)
    monkeypatch.setattr(ensemble.Ensemble, "_compile", lambda *_: None)
    _, history = fit(patience=2)
    assert history.epochs > 2
    assert history.best_epoch[0] == 0
    assert history.best_epoch[1] > 2
    np.testing.assert_array_equal(history.train_loss[2:, 0], history.train_loss[1, 0])
    assert len(set(history.train_loss[:, 1])) == history.epochs


def test_the_number_of_cores_changes_nothing(first, monkeypatch):
    weights, history = first
    monkeypatch.setattr(ensemble.os, "cpu_count", lambda: 1)
    alone, alone_history = fit()
    jax.tree.map(np.testing.assert_array_equal, weights, alone)
    np.testing.assert_array_equal(history.train_loss, alone_history.train_loss)


def test_all_members_in_one_program_train_as_well(first, monkeypatch):
    """As on an accelerator."""
    monkeypatch.setattr(ensemble, "_slices", lambda members, together: [slice(0, members)])
    weights, history = fit()
    _, apart = first
    np.testing.assert_allclose(history.start_loss, apart.start_loss, rtol=1e-5)
    np.testing.assert_allclose(history.validation_loss, apart.validation_loss, atol=1e-3)
    assert np.all(history.best_loss < history.start_loss - 0.1)
    assert kernels(weights).shape == kernels(first[0]).shape


def test_the_average_of_the_weights_is_kept():
    """After one step of an optimiser of one's own, from zero: a known fraction of that step."""
    one_step = {"batch_size": ROWS, "max_epochs": 1, "optimizer": optax.sgd(1e-1)}
    plain, history = fit(**one_step, ema_decay=None)
    averaged, _ = fit(**one_step, ema_decay=0.75)
    np.testing.assert_array_equal(history.best_epoch, [1, 1])
    assert np.max(np.abs(kernels(plain))) > 1e-3
    np.testing.assert_allclose(kernels(averaged), 0.25 * kernels(plain), rtol=1e-4)


def updates_of(settings: sf.Training, gradient: float) -> float:
    """Sum of two updates: of a gradient of this norm, and of a small one."""
    optimiser, params = settings.transform(10, 1e-2), jnp.zeros(1)
    state = optimiser.init(params)
    for value in (gradient, 1e-3):
        update, state = optimiser.update(jnp.full(1, value), state, params)
        params = params + update
    return float(params[0])


def test_the_default_optimiser_clips_gradients():
    clipped = sf.Training(clip_norm=1.0)
    assert updates_of(clipped, 50.0) == updates_of(clipped, 1.0)
    assert updates_of(clipped, 0.5) != updates_of(clipped, 1.0)


def test_the_optimiser_of_the_user_is_used_as_it_is():
    """Whatever `clip_norm` is: only a clip that is part of the optimiser has an effect."""
    one_step = {"batch_size": ROWS, "max_epochs": 1, "ema_decay": None, "clip_norm": 1e-3}
    weights, _ = fit(**one_step, optimizer=optax.sgd(1e-1))
    other, _ = fit(**one_step | {"clip_norm": 5.0}, optimizer=optax.sgd(1e-1))
    np.testing.assert_array_equal(kernels(weights), kernels(other))
    clip = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1e-1))
    clipped, _ = fit(**one_step, optimizer=clip)
    for member in range(MEMBERS):
        assert np.linalg.norm(kernels(weights)[member]) > 1e-3
        assert 0 < np.linalg.norm(kernels(clipped)[member]) <= 1e-4


def test_a_fit_that_diverges_names_the_epoch_and_keeps_finite_weights():
    """Good steps in the first epoch, then one that is no number."""
    schedule = optax.scale_by_schedule(lambda step: jnp.where(step < STEPS + 2, -1e-2, jnp.nan))
    with pytest.raises(TrainingDiverged, match="not finite in epoch 2; the last finite") as caught:
        fit(optimizer=schedule)
    assert isinstance(caught.value, SbiFlowsError)
    assert caught.value.epoch == 2
    assert isinstance(caught.value.state, Weights)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(caught.value.state))
    assert np.max(np.abs(kernels(caught.value.state))) > 1e-4


def test_data_that_are_not_finite_are_found_before_the_first_epoch(first):
    y, features = uneven(0)
    settings = sf.Training(batch_size=BATCH, max_epochs=6, learning_rate=3e-2)
    with pytest.raises(TrainingDiverged, match="not finite in epoch 0") as caught:
        training.fit(
            FitKeys.of(jax.random.key(0)),
            blueprint(),
            settings,
            TrainingData.of_rows(y.at[0, 0].set(jnp.nan), features),
            members=MEMBERS,
            progress=False,
        )
    assert caught.value.epoch == 0


@pytest.mark.parametrize("arrives", ["before an epoch", "within an epoch", "after an epoch"])
def test_an_interrupted_fit_keeps_the_best_so_far(first, arrives, monkeypatch):
    """Weights and losses of two epochs, even where the third was begun or done."""
    _, whole = first
    epoch, advance = ensemble.Ensemble.epoch, ensemble.Ensemble._advance
    check, best = fitting._require_finite, []

    def interrupted(self, key):
        if len(best) == 2 and arrives == "before an epoch":
            raise KeyboardInterrupt
        means = epoch(self, key)
        best.append(kernels(self.weights(self.best)))
        return means

    def interrupted_member(self, i, keys, active):
        if len(best) == 2 and i == MEMBERS - 1 and arrives == "within an epoch":
            raise KeyboardInterrupt
        return advance(self, i, keys, active)

    def interrupted_check(values, epoch, *args):
        if epoch == 3:
            raise KeyboardInterrupt
        check(values, epoch, *args)

    monkeypatch.setattr(ensemble.Ensemble, "epoch", interrupted)
    monkeypatch.setattr(ensemble.Ensemble, "_advance", interrupted_member)
    monkeypatch.setattr(fitting, "_require_finite", interrupted_check)
    weights, history = fit()
    assert (history.epochs, history.stop_reason) == (2, "interrupted")
    np.testing.assert_allclose(history.validation_loss, whole.validation_loss[:2], rtol=1e-6)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(weights))
    assert np.max(np.abs(kernels(weights))) > 1e-4
    np.testing.assert_array_equal(kernels(weights), best[1])
    assert arrives != "after an epoch" or np.any(best[2] != best[1])


def test_an_interrupt_before_the_first_epoch_keeps_the_start(first, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ensemble.Ensemble, "epoch", interrupted)
    weights, history = fit()
    assert (history.epochs, history.stop_reason) == (0, "interrupted")
    assert history.train_loss.shape == (0, MEMBERS)
    np.testing.assert_array_equal(history.best_loss, history.start_loss)
    np.testing.assert_array_equal(kernels(weights), 0.0)


def test_progress_shows_both_losses_and_can_be_silenced(first, capsys):
    _, history = fit(progress=True)
    shown = capsys.readouterr().err
    assert f"train={history.train_loss[-1].mean():.3f}" in shown
    assert f"validation={history.validation_loss[-1].mean():.3f}" in shown
    assert "epoch" in shown
    fit()
    assert capsys.readouterr().err == ""
