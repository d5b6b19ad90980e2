"""Stores take simulations that were made elsewhere, completely or not at all."""

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
import zarr

import sbi_flows as sf

pytestmark = pytest.mark.promotes

PRIOR = {"rate": dist.LogNormal(0.0, 1.0), "place": dist.Uniform(-1.0, 1.0).expand([2])}
LABELS = ["rate", "place[0]", "place[1]"]


def noisy(key, theta):
    curve = theta["place"] + jax.random.normal(key, (2,))
    return {"curve": curve, "size": curve[0]}


def made(n, seed):
    return sf.simulate(jax.random.key(seed), PRIOR, noisy, n, progress=False)


def store_of(path, n=20, *, chunk=8):
    store = sf.SimulationStore(path, chunk=chunk)
    if n:
        store.simulate(jax.random.key(0), PRIOR, noisy, n, progress=False)
    return store


def require_rows(sims, *parts):
    """Raise AssertionError unless simulations have the rows of the parts, one after the other."""
    expected = sf.concatenate(parts)
    assert len(sims) == len(expected)
    for name in ("theta", "valid"):
        np.testing.assert_array_equal(getattr(sims, name), getattr(expected, name))
    for name, array in sims.x.items():
        np.testing.assert_array_equal(array[:], expected.x[name][:])


def test_rows_are_added_and_the_store_goes_on_from_there(tmp_path):
    store, other = store_of(tmp_path / "s"), store_of(tmp_path / "other", 0)
    before, added = store.simulations(), made(21, 1)
    sims = store.extend(added)
    require_rows(sims, before, added)
    assert sims.on_disk and len(store) == 41
    again = sf.SimulationStore(tmp_path / "s")
    require_rows(again.simulations(), before, added)
    again.verify()
    # the rows of a store on another machine
    other.simulate(jax.random.key(2), PRIOR, noisy, 10, progress=False)
    require_rows(store.extend(other.simulations()), before, added, other.simulations())
    # finished rows are not simulated again; the others depend on the key and the row only
    grown = store.simulate(jax.random.key(0), PRIOR, noisy, 60, progress=False)
    whole = store_of(tmp_path / "whole", 60).simulations()
    require_rows(grown, before, added, other.simulations(), whole[51:])


def test_arrays_are_read_in_the_order_of_their_names(tmp_path, monkeypatch):
    """A file system lists the arrays of a chunk in any order."""
    store, read = store_of(tmp_path / "s"), zarr.Group.arrays
    for step in (1, -1):
        with monkeypatch.context() as patch:
            patch.setattr(zarr.Group, "arrays", lambda self, s=step: sorted(read(self))[::s])
            assert list(store.simulations().x) == ["curve", "size"]
            store.verify()


class Killed(Exception):
    pass


def extend_until_killed(store, simulations, monkeypatch, chunks):
    """Extend a store in a process that ends after some chunks."""
    write, written = type(store)._write, []

    def write_or_die(self, chunk, extension=None):
        if len(written) == chunks:
            raise Killed
        written.append(chunk)
        write(self, chunk, extension)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(type(store), "_write", write_or_die)
        store.extend(simulations)


@pytest.mark.parametrize("chunks", [0, 2])
@pytest.mark.parametrize("chunk", [8, 11])
def test_a_killed_extension_adds_nothing(tmp_path, monkeypatch, chunks, chunk):
    before, added = store_of(tmp_path / "s").simulations(), made(24, 1)
    store = store_of(tmp_path / "s", 0)
    extend_until_killed(store, added, monkeypatch, chunks)
    assert len(store) == 20
    require_rows(store.simulations(), before)
    # chunks of another size do not collide with what was left
    again = sf.SimulationStore(tmp_path / "s", chunk=chunk)
    require_rows(again.extend(added), before, added)
    again.verify()


@pytest.mark.parametrize("chunk", [8, 11])
def test_a_store_simulates_on_after_a_killed_extension(tmp_path, monkeypatch, chunk):
    store = store_of(tmp_path / "s")
    extend_until_killed(store, made(24, 1), monkeypatch, 2)
    whole = store_of(tmp_path / "whole", 50).simulations()
    require_rows(store_of(tmp_path / "s", 50, chunk=chunk).simulations(), whole)


def test_a_new_store_takes_the_layout_of_the_simulations(tmp_path, monkeypatch):
    added = made(20, 1)
    store = store_of(tmp_path / "s", 0)
    columns = dict(zip(LABELS, np.asarray(added.theta).T, strict=True))
    named = sf.Simulations(columns, added.x)
    extend_until_killed(store, sf.Simulations(np.zeros((20, 1)), np.zeros(20)), monkeypatch, 1)
    assert len(store) == 0
    require_rows(store.extend(named), named)
    assert store.failures().labels == tuple(LABELS)
    # it takes a simulator with these arrays and no other
    with pytest.raises(ValueError, match=r"simulator: expected that of the store .* got .*lambda"):
        store.simulate(jax.random.key(0), PRIOR, lambda key, theta: theta["place"], 30)
    with pytest.raises(ValueError, match=r"prior: expected that of .*, of rate, .* got of a"):
        store.simulate(jax.random.key(0), {"a": dist.Normal(0, 1)}, lambda key, theta: theta, 30)
    grown = store.simulate(jax.random.key(0), PRIOR, noisy, 30, progress=False)
    require_rows(grown, added, store_of(tmp_path / "whole", 30).simulations()[20:])
    # from now on it has a key
    with pytest.raises(ValueError, match="key: expected that of the store"):
        store.simulate(jax.random.key(5), PRIOR, noisy, 40)


def test_columns_are_matched_with_the_parameters_of_the_store(tmp_path):
    store, added = store_of(tmp_path / "s"), made(6, 1)
    columns = dict(zip(LABELS, np.asarray(added.theta).T, strict=True))
    backwards = sf.Simulations({name: columns[name] for name in LABELS[::-1]}, added.x)
    require_rows(store.extend(backwards)[20:], added)


@pytest.mark.filterwarnings("ignore:x. .* rows contain NaN")
def test_failed_rows_stay_failed(tmp_path):
    store, added = store_of(tmp_path / "s"), made(6, 1)
    x = dict(added.x, size=np.where(np.arange(6) == 4, np.nan, added.x["size"]))
    failed = sf.Simulations(added.theta, x, valid=[1, 0, 1, 1, 1, 1])
    require_rows(store.extend(failed), store_of(tmp_path / "t").simulations(), failed)
    failures = store.failures()
    assert failures.rows.tolist() == [21, 24]
    assert "marked invalid when it was added" in failures.reasons[0]
    assert failures.reasons[1] == "gave NaN or infinity"


def test_integers_and_doubles_keep_their_values(tmp_path):
    store = sf.SimulationStore(tmp_path / "s", chunk=3)
    dates = 2459000.5 + np.arange(8.0)[:, None] / 1000
    first = sf.Simulations(dates, {"date": dates, "count": np.arange(8)})
    store.extend(first)
    sims = store.extend(sf.Simulations(dates + 1, {"date": dates, "count": np.arange(8)}))
    assert sims.x["count"].dtype == np.int32 and sims.x["date"].dtype == np.float64
    np.testing.assert_array_equal(sims.theta, np.concatenate([dates, dates + 1]))
    np.testing.assert_array_equal(sims.x["date"][:], np.tile(dates, (2, 1)))


def test_simulations_that_are_there_already_are_noticed(tmp_path):
    store = store_of(tmp_path / "s")
    with pytest.warns(sf.SbiFlowsWarning, match="20 of 20 rows have the same parameters as rows"):
        store.extend(store.simulations())


X = {"curve": np.zeros((4, 2)), "size": np.zeros(4)}


@pytest.mark.parametrize(
    ("theta", "x", "message"),
    [
        (np.zeros((4, 2)), X, r"theta: expected 3 columns, rate, place\[0\], place\[1\], got 2"),
        (dict.fromkeys("abc", np.zeros(4)), X, "theta: expected the columns rate, .* got a, b, c"),
        (np.zeros((4, 3)), np.zeros((4, 2)), r"x: expected arrays of the shapes {'curve': \(2,\)"),
        (np.zeros((4, 3)), X | {"size": np.zeros((4, 1))}, r"x: .* got .*'size': \(1,\)}"),
        (np.zeros((4, 3)), X | {"size": (np.zeros(4),)}, "x: expected an array or a dict of arra"),
        (np.zeros((4, 3)), X | {"size": np.arange(4)}, "x size: expected .* float32 .* got int32"),
        (2459000.5 + np.arange(12.0).reshape(4, 3) / 1e3, X, "theta: .* float32 .* got float64"),
    ],
)
def test_simulations_that_do_not_fit_are_refused(tmp_path, theta, x, message):
    store = store_of(tmp_path / "s")
    with pytest.raises(ValueError, match=message):
        store.extend(sf.Simulations(theta, x))
    assert len(store) == 20


def test_rounds_and_other_writers_are_refused(tmp_path):
    import fcntl

    store = store_of(tmp_path / "s")
    with pytest.raises(ValueError, match="simulations: expected draws from the prior of the store"):
        store.extend(sf.Simulations(np.zeros((4, 3)), X, round=[0, 0, 1, 1]))
    with open(tmp_path / "s" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(sf.StoreBusy, match="another process is simulating into it"):
            store.extend(made(4, 1))
