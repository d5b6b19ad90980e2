"""Checkpoints of estimators that consist of several fits, and what tells fits from others."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from flax import nnx

import sbi_flows as sf
from sbi_flows.densities.conditional import Blueprint
from sbi_flows.densities.sizes import Sizes
from sbi_flows.estimators import rows as estimator_rows
from sbi_flows.estimators import truncated
from sbi_flows.prior.box import BoxPrior
from sbi_flows.training import ensemble, stream
from sbi_flows.training.fingerprint import differing, parts
from tests.training.test_checkpoint import Killed, kill_before

pytestmark = pytest.mark.promotes

PRIOR = sf.as_prior(dist.Uniform(-1.0, 1.0).expand([2]))
TINY = sf.MAF(transforms=1, hidden=(8,), context_width=0)
MIXTURE = sf.GaussianMixture(components=2, width=8, blocks=1)
EMULATOR = sf.Emulator(densities=(TINY,), training=sf.Training(max_epochs=2), simulations=500)
ROWS = 300


def noisy(key, theta):
    return theta + 0.3 * jax.random.normal(key, (2,))


@pytest.fixture(scope="module")
def simulations():
    return sf.simulate(jax.random.key(0), PRIOR, noisy, ROWS, progress=False)


def npe(path=None, density=TINY, **settings):
    training = sf.Training(max_epochs=2, checkpoint=path, checkpoint_every=1)
    return sf.NPE(PRIOR, density, **{"training": training, "members": 1} | settings)


def fit(estimator, simulations):
    return estimator.fit(jax.random.key(1), simulations, progress=False)


def assert_same(one, other):
    posteriors, histories = zip(one, other, strict=True)
    jax.tree.map(
        np.testing.assert_array_equal, *((p.weights, p.shares, p.standardiser) for p in posteriors)
    )
    np.testing.assert_array_equal(histories[0].held_out_loss, histories[1].held_out_loss)


def killed(number, call):
    with pytest.MonkeyPatch.context() as patch:
        kill_before(patch, number)
        with pytest.raises(Killed):
            call()


@pytest.mark.slow
def test_each_fit_of_a_stack_goes_on(tmp_path, simulations, monkeypatch):
    """Six epochs in all: of an emulator, of the density that trains on its draws, and of another.

    Killed within each of the fits, and then left to end.
    """

    def stack(path):
        return sf.Stack([npe(path, emulator=EMULATOR), npe(path, MIXTURE)])

    whole = fit(stack(None), simulations)
    for number in (2, 3, 3):
        killed(number, lambda: fit(stack(tmp_path), simulations))
    epoch, calls = ensemble.Ensemble.epoch, []
    monkeypatch.setattr(
        ensemble.Ensemble, "epoch", lambda *arguments: calls.append(0) or epoch(*arguments)
    )
    resumed = fit(stack(tmp_path), simulations)
    assert len(calls) == 1
    assert_same(resumed, whole)
    found = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*"))
    assert found == [
        "estimator-0/emulator-0.safetensors",
        "estimator-0/fit.safetensors",
        "estimator-1/fit.safetensors",
    ]
    # what was fitted is there, so that nothing is left to train
    assert_same(fit(stack(tmp_path), simulations), whole)
    assert len(calls) == 1


@pytest.mark.slow
def test_a_fit_to_observations_on_disk_goes_on(tmp_path, simulations, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK_ROWS", 16)
    monkeypatch.setattr(stream, "CHUNK_ROWS", 64)
    monkeypatch.setattr(estimator_rows, "SAMPLE_ROWS", 100)
    np.save(tmp_path / "x.npy", simulations.x)
    stored = sf.Simulations(simulations.theta, np.load(tmp_path / "x.npy", mmap_mode="r"))
    whole = fit(npe(members=2), stored)
    killed(2, lambda: fit(npe(tmp_path, members=2), stored))
    assert_same(fit(npe(tmp_path, members=2), stored), whole)
    with pytest.raises(ValueError, match="data: expected those"):
        fit(npe(tmp_path, members=2), stored[np.arange(ROWS)])


def test_each_round_has_a_folder():
    """As it trains on other rows than the one before."""
    box = BoxPrior(PRIOR, [-0.5, -0.5], [0.5, 0.5])
    one = truncated._of_round(npe("kept"), 0, box)
    both = truncated._of_round(sf.Stack([npe("kept"), npe()]), 12, box)
    assert one.prior is box and both.prior is box
    assert str(one.training.checkpoint) == os.path.join("kept", "round-000")
    folders = [estimator.training.checkpoint for estimator in both.estimators]
    assert folders == [Path("kept", "round-012"), None]


def test_what_is_kept_does_not_change_the_defaults_of_another_estimator():
    """Those of an estimator whose emulator failed."""
    default = sf.NPE(PRIOR, emulator=sf.Emulator())
    kept = dataclasses.replace(default.training, checkpoint="folder", checkpoint_every=2)
    plain = dataclasses.replace(default, training=kept)._without_emulator().training
    assert plain == sf.Training(checkpoint=plain.checkpoint, checkpoint_every=2)
    assert str(plain.checkpoint) == "folder"
    assert default._without_emulator().training == sf.Training()


@pytest.mark.slow
def test_where_a_checkpoint_would_not_be_kept_it_is_refused(tmp_path, simulations):
    training = sf.Training(max_epochs=1, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="checkpoint: expected that of the estimator, got one of"):
        sf.Emulator(training=training)
    posterior, _ = fit(npe(density=MIXTURE), simulations)
    with pytest.raises(ValueError, match="checkpoint: expected none, as a distillation keeps no"):
        sf.distil(jax.random.key(0), posterior, simulations, training=training)


class Scaled(nnx.Module):
    """An embedding with a number that is no weight."""

    def __init__(self, rngs: nnx.Rngs, scale: float = 1.0) -> None:
        self.layer, self.scale = nnx.Linear(2, 3, rngs=rngs), scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scale * jnp.tanh(self.layer(x))


class Unnamed:
    """A density of somebody else's, which says nothing of itself."""

    def __init__(self, settings: sf.MAF) -> None:
        self.build = settings.build


def described(*, y=None, embedding=None, density=TINY):
    sizes = Sizes((True, True), jax.tree.structure(0), ((2,),))
    y = np.linspace(-1.0, 1.0, 2 * ROWS, dtype=np.float32).reshape(ROWS, 2) if y is None else y
    blueprint = Blueprint(density, embedding, sizes)
    return parts(jax.random.key(0), blueprint, sf.Training(), {"y": y})


def different(one, other):
    return [name for name in one if differing(one[name], other[name])]


@pytest.mark.parametrize("large", [1.0, 1e6])
def test_data_are_the_same_up_to_rounding(large):
    y = large * np.asarray(np.random.default_rng(0).normal(size=(ROWS, 2)), np.float32)
    first, one_row, swapped = described(y=y), y.copy(), y.copy()
    assert different(first, described(y=y * np.float32(1 + 1e-7))) == []
    one_row[17, 1] += 0.01 * large
    swapped[[3, 4]] = y[[4, 3]]
    others = [one_row, swapped, y[:-1], y.astype(np.float64), y[:, ::-1], y.reshape(-1)]
    for other in others:
        assert different(first, described(y=other)) == ["data"]


def test_blocks_of_rows_add_up(monkeypatch):
    whole = described()
    monkeypatch.setattr("sbi_flows.training.fingerprint.BLOCK_ROWS", 7)
    assert different(whole, described()) == []


def test_an_embedding_is_told_from_others():
    """By what it computes, whatever makes it."""
    first = described(embedding=Scaled)
    assert different(first, described(embedding=lambda rngs: Scaled(rngs, 1.0))) == []
    assert different(first, described(embedding=lambda rngs: Scaled(rngs, 2.0))) == ["density"]
    assert different(first, described()) == ["density"]
    ones = [described(embedding=Scaled(nnx.Rngs(0), scale)) for scale in (1.0, 1.0, 2.0)]
    assert different(ones[0], ones[1]) == []
    assert different(ones[0], ones[2]) == ["density"]
    assert different(ones[0], described(embedding=Scaled(nnx.Rngs(1)))) == ["density"]


def test_a_density_that_says_nothing_is_told_by_its_programs():
    wider = dataclasses.replace(TINY, hidden=(9,))
    first, again, other = (described(density=Unnamed(d)) for d in (TINY, TINY, wider))
    assert different(first, again) == []
    assert different(first, other) == ["density"]
