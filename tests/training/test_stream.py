"""Observations on disk: the same fit, a chunk at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.estimators import rows as estimator_rows
from sbi_flows.training import Stream, stream

ROWS, DIM = 4_000, 2
PRIOR = sf.as_prior(dist.Uniform(-1, 1).expand([DIM]))
DENSITY = sf.MAF(transforms=1, hidden=(8,), context_width=0)
TRAINING = sf.Training(batch_size=64, max_epochs=4, learning_rate=1e-2)


@pytest.fixture
def small(monkeypatch):
    """Chunks and samples that small data have several of."""
    monkeypatch.setattr(stream, "BLOCK_ROWS", 32)
    monkeypatch.setattr(stream, "CHUNK_ROWS", 512)
    monkeypatch.setattr(estimator_rows, "SAMPLE_ROWS", 1_000)


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    theta = random.uniform(-1, 1, (ROWS, DIM)).astype(np.float32)
    x = theta**2 + np.exp(theta) * random.normal(size=(ROWS, DIM)) * 0.3
    return theta, x.astype(np.float32)


@pytest.fixture
def stored(tmp_path, data):
    np.save(tmp_path / "x.npy", data[1])
    return sf.Simulations(data[0], np.load(tmp_path / "x.npy", mmap_mode="r"))


def fit(sims, **settings):
    npe = sf.NPE(PRIOR, DENSITY, **({"training": TRAINING, "members": 2} | settings))
    return npe.fit(jax.random.key(0), sims, progress=False)


def test_simulations_leave_on_disk_what_is_memory_mapped(stored, data):
    assert stored.on_disk
    assert isinstance(stored.x, np.memmap)
    assert repr(stored) == "Simulations(N=4000, D=2, x=float32[2], invalid=0)"
    assert not sf.Simulations(*data).on_disk
    some = stored[np.array([3, 1])]
    assert not some.on_disk
    np.testing.assert_array_equal(some.x, data[1][[3, 1]])


def test_rows_on_disk_that_are_not_finite_are_invalid(tmp_path, data):
    x = data[1].copy()
    x[[5, 3_999]] = np.nan
    np.save(tmp_path / "x.npy", {"whole": x}["whole"])
    sims = sf.Simulations(data[0], {"a": np.load(tmp_path / "x.npy", mmap_mode="r")})
    assert sims.num_valid == ROWS - 2
    np.testing.assert_array_equal(np.flatnonzero(~np.asarray(sims.valid)), [5, 3_999])


@pytest.mark.promotes  # numpyro's densities
@pytest.mark.slow
def test_a_fit_to_a_file_is_as_good_as_one_in_memory(small, stored, data):
    posterior, history = fit(stored)
    _, whole = fit(sf.Simulations(*data))
    assert np.all(history.best_loss < history.start_loss - 0.05)
    np.testing.assert_allclose(history.best_loss, whole.best_loss, atol=0.1)
    assert history.held_out.shape == (2, 100)
    np.testing.assert_array_equal(history.held_out[0], history.held_out[1])
    # in the units of theta: what the posterior says of the held-out rows
    own = np.asarray(stored.theta)[history.held_out[0]]
    said = posterior.log_prob(own, np.asarray(stored.x)[history.held_out[0]])
    assert abs(-np.mean(said) - history.best_loss.mean()) < 0.1


@pytest.mark.slow
def test_the_same_key_gives_the_same_fit(small, stored):
    first, second = fit(stored)[1], fit(stored)[1]
    np.testing.assert_array_equal(first.train_loss, second.train_loss)


@pytest.mark.slow
def test_failed_rows_are_left_out(small, tmp_path, data):
    x = data[1].copy()
    x[::3] = np.nan
    np.save(tmp_path / "x.npy", x)
    _, history = fit(sf.Simulations(data[0], np.load(tmp_path / "x.npy", mmap_mode="r")))
    assert np.all(np.isfinite(history.train_loss))
    assert np.all(history.best_loss < history.start_loss)


def test_an_emulator_of_observations_on_disk_is_refused(stored):
    with pytest.raises(ValueError, match="emulator: expected none with observations on disk"):
        fit(stored, emulator=sf.Emulator())


def test_few_long_rows_are_in_memory(stored, monkeypatch):
    monkeypatch.setattr(estimator_rows, "SAMPLE_ENTRIES", 700 * DIM)
    monkeypatch.setattr(estimator_rows, "MIN_SAMPLE_ROWS", 10)
    rows, sample = estimator_rows.rows_in_memory(jax.random.key(0), stored)
    assert len(rows) == len(sample) == 700
    np.testing.assert_array_equal(rows.x, np.asarray(stored.x)[sample])


class TestStream:
    def stream(self, rows=100):
        def read(places):
            return jnp.asarray(places)[:, None], jnp.asarray(places)[:, None]

        return Stream(np.arange(rows), np.arange(0, rows, 10), read)

    def test_an_epoch_has_every_row_at_most_once_and_few_are_left_over(self, small, monkeypatch):
        monkeypatch.setattr(stream, "BLOCK_ROWS", 8)
        monkeypatch.setattr(stream, "CHUNK_ROWS", 32)
        rows = self.stream()
        chunks = [np.ravel(y) for y, _ in rows.chunks(jax.random.key(0))]
        assert [len(c) for c in chunks] == [32, 32, 32]
        seen = np.concatenate(chunks)
        assert len(set(seen)) == 96
        other = np.concatenate([np.ravel(y) for y, _ in rows.chunks(jax.random.key(1))])
        assert not np.array_equal(seen, other)
        again = np.concatenate([np.ravel(y) for y, _ in rows.chunks(jax.random.key(0))])
        np.testing.assert_array_equal(seen, again)

    def test_fewer_rows_than_a_chunk_are_one(self):
        ((y, _),) = self.stream(50).chunks(jax.random.key(0))
        assert sorted(np.ravel(y)) == list(range(50))

    def test_chunks_of_long_rows_are_small_and_mix_the_file(self):
        rows = dataclasses.replace(self.stream(2_000), max_rows=64)
        chunks = [np.ravel(y) for y, _ in rows.chunks(jax.random.key(0))]
        assert {len(c) for c in chunks} == {64} and len(chunks) == 31
        assert len(set(np.concatenate(chunks))) == 31 * 64
        assert min(np.ptp(c) for c in chunks) > 500

    def test_held_out_rows_are_never_read(self):
        rows = self.stream().without(np.array([0, 9]))
        assert len(rows.rows) == 98
        assert not {0, 90} & set(rows.rows)

    def test_what_fails_to_be_read_ends_the_epoch(self):
        def read(places):
            raise OSError("disk on fire")

        broken = dataclasses.replace(self.stream(), read=read)
        with pytest.raises(OSError, match="disk on fire"):
            list(broken.chunks(jax.random.key(0)))
