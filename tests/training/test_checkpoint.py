"""A fit that was killed and started again ends where one that was not does, bit for bit."""

import dataclasses
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import sbi_flows as sf
from sbi_flows import training
from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.training import FitKeys, TrainingData, checkpoint, ensemble
from tests.cases import unchecked
from tests.training import test_training
from tests.training.test_training import COMPILED, MEMBERS

ROOT = Path(__file__).parents[2]
EPOCHS, LONG = 6, 200


def fit(path, **settings):
    return test_training.fit(**{"checkpoint": path, "checkpoint_every": 1} | settings)


class Killed(Exception):
    """What ends a fit in the place of a signal."""


def kill_before(patch, number, where="epoch"):
    """Let a fit end before its epoch of this number, or before its last member's."""
    before, calls = getattr(ensemble.Ensemble, where), []

    def killed(self, *arguments):
        if where == "epoch" or (arguments[-1] and arguments[0] == MEMBERS - 1):
            calls.append(arguments)
        if len(calls) == number:
            raise Killed
        return before(self, *arguments)

    patch.setattr(ensemble.Ensemble, where, killed)


def killed(path, number, where="epoch", **settings):
    """A fit that does not come to the epoch of this number."""
    with pytest.MonkeyPatch.context() as patch:
        kill_before(patch, number, where)
        with pytest.raises(Killed):
            fit(path, **settings)


def assert_same(one, other):
    """Weights and histories, but for the time."""
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])
    histories = [dataclasses.replace(history, seconds=0.0) for _, history in (one, other)]
    for field in dataclasses.fields(histories[0]):
        a, b = (getattr(history, field.name) for history in histories)
        np.testing.assert_array_equal(a, b, err_msg=field.name)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None), field.name


def epochs_of(path) -> int:
    file = path / "fit.safetensors"
    return len(safetensors.numpy.load(file.read_bytes())["train"]) if file.exists() else 0


@pytest.fixture(scope="module")
def whole():
    return test_training.fit()


@pytest.fixture
def left(tmp_path):
    """What a fit left that was killed before its fourth epoch."""
    killed(tmp_path, 4)
    return tmp_path


@pytest.mark.parametrize("where", ["epoch", "_advance"])
@pytest.mark.parametrize("number", [1, 2, EPOCHS])
def test_a_fit_goes_on_where_it_was(tmp_path, whole, number, where):
    killed(tmp_path, number, where)
    assert epochs_of(tmp_path) == number - 1
    COMPILED.clear()
    assert_same(fit(tmp_path), whole)
    assert COMPILED == []
    assert [file.name for file in tmp_path.iterdir()] == ["fit.safetensors"]


def test_a_fit_that_is_killed_again_and_again(tmp_path, whole):
    for _ in range(EPOCHS - 1):
        killed(tmp_path, 2)
    assert_same(fit(tmp_path), whole)


def test_a_fit_that_ended_is_not_trained_again(tmp_path, whole):
    assert_same(fit(tmp_path), whole)
    with pytest.MonkeyPatch.context() as patch:
        kill_before(patch, 1)
        assert_same(fit(tmp_path), whole)


@pytest.mark.slow
def test_a_fit_that_ended_is_read_without_compiling_anything(tmp_path, whole):
    """As in a new process, where no program is compiled yet."""
    assert_same(fit(tmp_path), whole)
    keys, data = FitKeys.of(jax.random.key(0)), TrainingData.of_rows(*test_training.uneven(0))
    settings = sf.Training(
        batch_size=test_training.BATCH, max_epochs=6, learning_rate=3e-2, checkpoint=tmp_path
    )
    arguments = keys, test_training.blueprint(), settings, data
    jax.clear_caches()
    COMPILED.clear()
    again = training.fit(*arguments, members=MEMBERS, progress=False)
    assert COMPILED == []
    assert_same(again, whole)
    test_training.fit()  # other tests count on compiled programs


def test_the_folder_is_no_constant_of_the_programs(tmp_path, whole):
    COMPILED.clear()
    fit(tmp_path / "one" / "within", seed=1)
    fit(tmp_path / "two", seed=1, checkpoint_every=3)
    assert COMPILED == []


@pytest.mark.parametrize("number", [6, 9, 12])
def test_members_that_stopped_early_stay_so(tmp_path, number):
    """One member learns and then gets no better, the other learns slowly to the end."""
    settings = {"patience": 2, "max_epochs": 14, "learning_rate": (1.0, 3e-3)}
    expected = test_training.fit(**settings)
    losses = expected[1].train_loss
    np.testing.assert_array_equal(losses[9:, 0], losses[8, 0])
    assert losses[8, 0] != losses[7, 0] and losses[-1, 1] != losses[-2, 1]
    killed(tmp_path, number, **settings)
    assert_same(fit(tmp_path, **settings), expected)


def test_a_fit_that_ran_out_of_patience_has(tmp_path):
    uphill = optax.chain(optax.clip_by_global_norm(5.0), optax.scale(1.0))
    settings = {"optimizer": uphill, "patience": 3, "max_epochs": 50}
    killed(tmp_path, 3, **settings)
    first, second = fit(tmp_path, **settings), fit(tmp_path, **settings)
    assert first[1].stop_reason == "patience"
    assert first[1].epochs == 3
    assert_same(first, second)


def test_an_interrupted_fit_goes_on(tmp_path, whole):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "Killed", KeyboardInterrupt)
        kill_before(patch, 4)
        _, history = fit(tmp_path)
    assert (history.epochs, history.stop_reason) == (3, "interrupted")
    assert_same(fit(tmp_path), whole)


def test_any_state_of_an_optimiser_is_kept(tmp_path):
    """Keys, numbers of a type that NumPy does not have, and none."""
    noise = optax.add_noise(1e-3, 0.5, jax.random.key(1))
    optimizer = optax.chain(noise, optax.adamw(1e-2, mu_dtype=jnp.bfloat16))
    expected = test_training.fit(optimizer=optimizer, max_epochs=3)
    killed(tmp_path, 2, optimizer=optimizer, max_epochs=3)
    COMPILED.clear()
    assert_same(fit(tmp_path, optimizer=optimizer, max_epochs=3), expected)
    assert COMPILED == []


REFUSED = {
    "data": ({"data": 1}, "data: expected those .and the prior. of the checkpoint .*, got others;"),
    "key": ({"seed": 1}, "key: expected that of the checkpoint .*fit.safetensors, got others; rem"),
    "rate": ({"learning_rate": 1e-2}, "settings: .*, learning_rate=0.03, got learning_rate=0.01;"),
    "two": ({"max_epochs": 7, "patience": 3}, "max_epochs=6.*, got .*patience=3"),
    "optimiser": ({"optimizer": optax.sgd(1e-2)}, "settings: expected those .*, got others;"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_another_fit_is_refused_before_it_begins(left, settings, message):
    before = (left / "fit.safetensors").read_bytes()
    COMPILED.clear()
    with pytest.raises(ValueError, match=message):
        fit(left, **settings)
    assert not [event for event in COMPILED if "epoch" in event]
    assert (left / "fit.safetensors").read_bytes() == before


def test_another_density_is_refused(left, monkeypatch):
    plain = test_training.blueprint()
    other = dataclasses.replace(plain, density=sf.MAF(transforms=2, hidden=(8,), context_width=0))
    monkeypatch.setattr(test_training, "blueprint", lambda: other)
    with pytest.raises(ValueError, match=r"density: .*transforms=1, .*, got density=MAF.*=2, "):
        fit(left)


def test_another_version_is_refused(left, monkeypatch):
    monkeypatch.setattr("sbi_flows.training.fingerprint.version", lambda name: "9.9")
    with pytest.raises(ValueError, match=r"versions: expected those of .*jax=.*, got .*jax=9.9"):
        fit(left)


def test_another_format_is_refused(left, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    with pytest.raises(ValueError, match="expected a checkpoint of format 3, got 2; remove it"):
        fit(left)


def test_where_a_fit_is_kept_and_runs_is_no_other_fit(left, whole):
    moved = left.rename(left.with_name("moved"))
    assert_same(fit(moved, devices=1, checkpoint_every=None), whole)


def test_a_file_that_is_cut_or_changed_is_refused(left):
    file = left / "fit.safetensors"
    written = file.read_bytes()
    places = np.random.default_rng(0).integers(0, len(written), 25)
    spoilt = [written[:n] for n in (0, 4, 8, 300, len(written) - 1, *places[:5])]
    spoilt += [written[:p] + bytes([written[p] ^ 16]) + written[p + 1 :] for p in (0, 9, *places)]
    for content in spoilt:
        file.write_bytes(content)
        with pytest.raises(sf.CheckpointSpoilt, match=r"fit.safetensors is not .* Remove it"):
            fit(left)


def test_arrays_of_another_shape_are_refused(left):
    """Which no fit of ours writes."""
    training = sf.Training(checkpoint=left)
    file = checkpoint.Checkpoint(training, "fit", {})
    with pytest.raises(sf.CheckpointSpoilt, match="train is missing or of another shape"):
        file.filled({"train": np.zeros(3)}, {"train": np.zeros(4)})
    with pytest.raises(sf.CheckpointSpoilt, match="train is missing or of another shape"):
        file.filled({"train": np.zeros(3)}, {"train": np.zeros(3, np.float32)})


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"checkpoint: cannot write to .*file"):
        fit(tmp_path / "file")
    (tmp_path / "fit.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint: cannot read .*fit.safetensors: Is a"):
        fit(tmp_path)


def test_a_full_disk_costs_a_warning_and_no_fit(left, whole, monkeypatch):
    before = (left / "fit.safetensors").read_bytes()

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.warns(SbiFlowsWarning, match="cannot write .*: No space left.*; the fit") as said:
        assert_same(fit(left), whole)
    assert len(said) == 1
    assert [file.name for file in left.iterdir()] == ["fit.safetensors"]
    assert (left / "fit.safetensors").read_bytes() == before


def test_by_default_writing_takes_a_hundredth_of_the_time(tmp_path, monkeypatch):
    """Epochs of a second each, and files that take half a second to write."""
    now, written = [0.0], []
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: now[0])
    file = checkpoint.Checkpoint(sf.Training(checkpoint=tmp_path), "fit", {})

    def tree():
        now[0] += 0.5
        written.append(epoch)
        return {"train": np.zeros(3)}

    for epoch in range(1, 201):
        now[0] += 1.0
        file.save(epoch, tree)
    assert written == [1, 51, 101, 151]
    file.save_now(tree)
    assert written == [1, 51, 101, 151, 200]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("checkpoint", 3, "checkpoint: expected a folder or None, got 3"),
        ("checkpoint", "s3://bucket/fit", "checkpoint: expected a local folder, got 's3://bucket"),
        ("checkpoint", "", "checkpoint: expected a local folder, got ''"),
        ("checkpoint_every", 0, "checkpoint_every: expected a whole number of at least 1, got 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(setting, value, message):
    with pytest.raises(ValueError, match=message):
        unchecked(sf.Training, **{setting: value})


CHILD = """
import sys
import tests.conftest
from tests.training.test_checkpoint import LONG, fit
print("began", flush=True)
fit(sys.argv[1], max_epochs=LONG, patience=LONG)
"""


def kill_after(path: Path, epochs: int, delay: float) -> int:
    """Kill a process while it fits, after so many epochs and a while; those that it left."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "began\n"
    while child.poll() is None and epochs_of(path) < epochs:
        time.sleep(1e-3)
    time.sleep(delay)
    child.kill()
    child.communicate()
    assert child.returncode == -9
    return epochs_of(path)


@pytest.fixture(scope="module")
def long():
    return test_training.fit(max_epochs=LONG, patience=LONG)


def check_kill(path, long, chance):
    """Wherever it is killed, it ends with the same weights."""
    reached = kill_after(path, chance.randrange(LONG // 2), chance.uniform(0.0, 0.1))
    assert reached < LONG
    for partial in path.glob("*.partial"):
        partial.unlink()
    assert_same(fit(path, max_epochs=LONG, patience=LONG), long)


@pytest.mark.slow
def test_a_process_that_was_killed(tmp_path, long):
    check_kill(tmp_path, long, random.Random(0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_a_process_killed_at_twenty_random_moments(tmp_path, long, seed):
    check_kill(tmp_path, long, random.Random(seed))
