"""Any value for an array or a store is accepted, or raises an error with a clear message."""

import inspect
import json
import random
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sbi_flows as sf
from tests.artefact.test_gate import PRIOR, gated
from tests.artefacts import ensemble, posterior
from tests.cases import unchecked
from tests.hostile_inputs import Stores, anything, outcome

pytestmark = pytest.mark.promotes

GOOD = np.arange(15.0, dtype=np.float32).reshape(5, 3)
X, KEY = np.array([0.3, 1.2, -0.7], np.float32), jax.random.key(0)
SEEDS = st.integers(0, 2**32)


def simulations(field, value):
    fields = {"theta": GOOD, "x": GOOD} | {field: value}
    return unchecked(sf.Simulations, fields.pop("theta"), fields.pop("x"), **fields)


@pytest.mark.slow
@settings(max_examples=60)
@given(field=st.sampled_from(["theta", "x", "valid", "round"]), seed=SEEDS)
def test_simulations_of_anything(field, seed):
    found = outcome(lambda: simulations(field, anything(random.Random(seed))))
    if found != "refused":
        assert np.all(np.isfinite(found.theta))
        # what counts as valid is finite when it has become features
        leaves = [np.asarray(a, np.float32)[found.valid] for a in jax.tree.leaves(found.x)]
        assert all(np.all(np.isfinite(leaf)) for leaf in leaves)


@settings(max_examples=40)
@given(seed=SEEDS)
def test_rows_of_anything(seed):
    sims = simulations("x", GOOD)
    part = outcome(lambda: inspect.unwrap(sf.Simulations.__getitem__)(sims, rows(seed)))
    assert part == "refused" or len(part) == len(part.x)


def rows(seed):
    draw = random.Random(seed)
    value = anything(draw)
    return slice(value, draw.choice([None, 2])) if draw.random() < 0.2 else value


@pytest.fixture(scope="module")
def posteriors():
    like = {"n": jax.ShapeDtypeStruct((), jnp.int32), "y": jax.ShapeDtypeStruct((2,), jnp.float32)}
    mixture = sf.GaussianMixture(components=2, width=4, blocks=1)
    return gated(), posterior(PRIOR, ensemble(mixture, PRIOR.bounded, like), like=like)


@pytest.mark.slow
@settings(max_examples=40)
@given(seed=SEEDS)
def test_observations_of_anything(posteriors, seed):
    value = anything(random.Random(seed))
    plain, named = posteriors
    single = inspect.unwrap(sf.Posterior.is_single)
    outcome(lambda: single(plain, value))
    outcome(lambda: single(named, value))
    outcome(lambda: single(named, {"n": value, "y": np.zeros(2)}))
    found = outcome(lambda: inspect.unwrap(sf.Posterior.misspecification)(plain, value))
    if found != "refused":  # a batch has a p-value for each observation
        p_values = np.asarray(found.p_value)
        assert np.all((p_values > 0.0) & (p_values <= 1.0))


SAME = {
    "big-endian": X.astype(">f4"),
    "double and big-endian": X.astype(">f8"),
    "long double": X.astype(np.longdouble),
    "a list": X.tolist(),
    "strided": np.stack([X, X], axis=1)[:, 0],
    "read-only": np.broadcast_to(X, (3,)),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_numbers_give_the_same_draws(posteriors, name):
    draws = posteriors[0].sample(KEY, X, 5)
    np.testing.assert_array_equal(posteriors[0].sample(KEY, SAME[name], 5), draws)


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i4", np.longdouble, np.int64])
def test_arrays_of_any_order_of_bytes_become_simulations(dtype, tmp_path):
    there = simulations("x", GOOD.astype(dtype))
    np.testing.assert_array_equal(there.x, GOOD)
    large = GOOD.astype(dtype)
    large[0, 0] = 2**30
    file = np.memmap(tmp_path / "x", large.dtype, "w+", shape=(5, 3))
    file[:] = large
    mapped = simulations("x", file)
    assert mapped.on_disk and mapped.num_valid == 5
    np.testing.assert_array_equal(mapped[np.array([4, 0])].x, large[[4, 0]].astype(float))


def test_integers_on_disk_do_not_wrap_round(tmp_path):
    file = np.memmap(tmp_path / "x", np.int64, "w+", shape=(5, 1))
    file[:] = 2**40
    np.testing.assert_array_equal(simulations("x", file)[:2].x, np.full((2, 1), 2.0**40))


@pytest.mark.parametrize(
    "dtype",
    ["<i8", ">i8", "<u8", "<i4", ">i4", "<i2", "<f2", ">f4", "<f8", ">f8", "?", np.longdouble],
)
@pytest.mark.parametrize("largest", [1, 2**31 - 1, 2**31])
def test_an_array_has_one_dtype_in_memory_and_on_disk(dtype, largest, tmp_path, monkeypatch):
    monkeypatch.setattr("sbi_flows.simulations.disk.MAX_READ_ENTRIES", 4)
    values = np.zeros((5, 3))
    values[4, 1] = largest
    with np.errstate(over="ignore", invalid="ignore"):
        values = values.astype(dtype)
    file = np.memmap(tmp_path / "x", values.dtype, "w+", shape=values.shape)
    file[:] = values
    in_memory, mapped = simulations("x", values), simulations("x", file)
    assert mapped.on_disk and mapped.x.dtype == in_memory.x.dtype
    np.testing.assert_array_equal(mapped.valid, in_memory.valid)
    for rows in (slice(0, 2), np.array([4, 0])):
        part = mapped[rows]
        assert part.x.dtype == in_memory.x.dtype
        np.testing.assert_array_equal(part.x[:], in_memory[rows].x)


def test_what_is_on_disk_may_stand_beside_what_is_not(tmp_path):
    file = np.memmap(tmp_path / "x", np.float32, "w+", shape=(5, 3))
    found = simulations("x", {"a": file, "b": [1.0, 2.0, float("nan"), 4.0, 5.0]})
    assert found.on_disk and found.valid.tolist() == [True, True, False, True, True]
    with pytest.raises(ValueError, match="got dtype object"):
        simulations("x", {"a": file, "b": None})


ARGUMENTS = {
    "masked": (
        lambda: simulations("x", np.ma.masked_array(GOOD, GOOD > 3)),
        "got 11 masked entries",
    ),
    "None in a dict": (lambda: simulations("x", {"a": GOOD, "b": None}), "got dtype object"),
    "keys": (lambda: simulations("x", {"a": GOOD, 1: GOOD}), "names as keys, got int, str"),
    "beyond": (lambda: simulations("x", GOOD)[np.array([5])], "numbers from -5 to 4, got 5"),
    "before": (lambda: simulations("x", GOOD)[np.array([-6, 3])], "to 4, got -6"),
    "half": (lambda: simulations("valid", np.full(5, 0.5)), "valid: expected whole numbers from 0"),
    "NaN": (lambda: simulations("valid", np.full(5, np.nan)), "valid: expected whole numbers"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_would_be_taken_for_something_else_is_refused(name):
    call, message = ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_list_of_rows_will_do():
    np.testing.assert_array_equal(simulations("x", GOOD)[[0, -1]].x, GOOD[[0, -1]])


@pytest.mark.parametrize("n", [0, 1.5, True, "a", None, 2**45, 10**400])
def test_numbers_of_draws_that_cannot_be(posteriors, n):
    for call, own in (
        (sf.Posterior.sample, (posteriors[0], KEY, X)),
        (sf.Prior.sample, (PRIOR, KEY)),
    ):
        if n != 0 or len(own) == 3:
            assert outcome(lambda: inspect.unwrap(call)(*own, n)) == "refused"  # noqa: B023


@pytest.mark.parametrize("key", [3, None, "a", np.zeros(2), jax.random.split(KEY, 3)])
def test_keys_that_are_none(posteriors, key):
    assert (
        outcome(lambda: inspect.unwrap(sf.Posterior.sample)(posteriors[0], key, X, 3)) == "refused"
    )
    assert outcome(lambda: inspect.unwrap(sf.Prior.sample)(PRIOR, key, 3)) == "refused"


def test_older_keys_of_numpy_are_keys():
    old = jax.random.PRNGKey(1)
    first, second = (inspect.unwrap(sf.Prior.sample)(PRIOR, k, 3) for k in (old, np.asarray(old)))
    np.testing.assert_array_equal(first, second)


def wrong(kind, *parameters):
    return kind(*parameters, validate_args=False)


NAN, INF, ONE = float("nan"), float("inf"), dist.Normal(0.0, 1.0)
REFUSED = {
    "NaN": lambda: wrong(dist.Normal, NAN, 1.0),
    "a scale that is infinite": lambda: dist.Normal(0.0, INF),
    "a scale beyond single precision": lambda: {"a": dist.HalfNormal(1e300)},
    "a concentration that is infinite": lambda: dist.Gamma(INF, 1.0).expand([2]),
    "an entry that is infinite": lambda: dist.Normal(np.zeros(2), np.array([1.0, INF])).to_event(1),
    "an infinite transform": lambda: dist.TransformedDistribution(
        ONE, dist.transforms.AffineTransform(0.0, INF)
    ),
    "infinite": lambda: wrong(dist.Normal, INF, 1.0),
    "no scale": lambda: {"a": wrong(dist.Normal, 0.0, 0.0)},
    "negative": lambda: wrong(dist.Gamma, -1.0, 1.0),
    "bounds in no order": lambda: wrong(dist.Uniform, 1.0, 0.0),
    "no width": lambda: wrong(dist.Uniform, 1.0, 1.0),
    "no end": lambda: wrong(dist.Uniform, 0.0, INF),
    "a width that is infinite": lambda: wrong(dist.Uniform, -3e38, 3e38),
    "cut in no order": lambda: dist.TruncatedNormal(0.0, 1.0, low=2.0, high=1.0),
    "big-endian": lambda: wrong(dist.Normal, np.zeros(2, ">f4"), 1.0),
    "text": lambda: wrong(dist.Normal, "a", 1.0),
    "complex": lambda: wrong(dist.Normal, 1j, 1.0),
    "a list": lambda: wrong(dist.Normal, [0.0, 1.0], 1.0),
    "no entries": lambda: {"a": ONE.expand([0]), "b": ONE},
    "many entries": lambda: ONE.expand([2**40]),
    "a point": lambda: dist.Delta(0.0),
    "improper": lambda: dist.ImproperUniform(dist.constraints.real, (), ()),
    "discrete": lambda: dist.Poisson(3.0),
    "labels twice": lambda: {"a": ONE.expand([2]), "a[0]": ONE},
    "no name": lambda: {"": ONE},
    "half a character": lambda: {"\ud800": ONE},
    "a long name": lambda: {"x" * 300: ONE},
    "a number for a name": lambda: {1: ONE},
    "a class": lambda: dist.Normal,
    "a class in a dict": lambda: {"a": dist.Normal},
    "a prior in a dict": lambda: {"a": sf.as_prior(ONE)},
    "None": lambda: None,
    "text for a prior": lambda: "Normal",
    "nothing": dict,
    "a model with arguments": lambda: lambda data: numpyro.sample("a", ONE),
    "a model that fails": lambda: lambda: 1 / 0,
    "a model of one name twice": lambda: lambda: [numpyro.sample("a", ONE) for _ in range(2)],
    "a model of numbers": lambda: lambda: numpyro.sample("a", 3),
    "a model that branches": lambda: lambda: numpyro.sample("a", ONE) > 0 or None,
}


@pytest.mark.filterwarnings("ignore:.* requires ndarray or scalar arguments:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_priors_that_are_none(name):
    given = REFUSED[name]()
    assert outcome(lambda: inspect.unwrap(sf.as_prior)(given)) == "refused"


NAMED = {"a": ONE.expand([2]), "b": dist.Uniform(0.0, 1.0)}
METHODS = ("contains", "unflatten", "structured", "from_standard", "to_standard")


@settings(max_examples=30)
@given(method=st.sampled_from(METHODS), seed=SEEDS)
def test_parameters_of_anything(method, seed):
    prior, value = sf.as_prior(NAMED), anything(random.Random(seed))
    outcome(lambda: inspect.unwrap(getattr(sf.Prior, method))(prior, value))
    outcome(lambda: inspect.unwrap(sf.Prior.flatten)(prior, {"a": value, "b": np.zeros(5)}))


def test_no_parameters_are_in_no_support():
    prior = sf.as_prior(NAMED)
    assert prior.contains(np.zeros((0, 3))).shape == prior.log_prob(np.zeros((0, 3))).shape == (0,)
    assert prior.to_standard(np.zeros((0, 3))).shape == (0, 3)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return Stores(tmp_path_factory.mktemp("stores"))


@pytest.mark.filterwarnings("ignore:Object at .* is not recognized as a component")
@settings(max_examples=20)
@given(seed=SEEDS)
def test_spoilt_stores(stores, seed):
    outcome(lambda: stores.read(stores.spoilt(seed)))
    outcome(lambda: stores.simulate(stores.spoilt(seed)))


@pytest.mark.parametrize("path", ["", "a\0b", None, 3, b"x", "nothing://x"])
def test_paths_of_no_store(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert outcome(lambda: unchecked(sf.SimulationStore, path)) == "refused"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "x\0", "x" * 300])
def test_names_of_observations_are_no_paths(name, tmp_path):
    store = sf.SimulationStore(tmp_path / "inner" / "s")
    with pytest.raises(ValueError, match="x: expected names without slashes"):
        store.simulate(KEY, ONE, lambda key, theta: {name: theta, "b": theta}, 3, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["inner"] and len(store) == 0


def test_a_store_of_the_second_format_of_zarr_runs_nothing(tmp_path):
    """In format 2, a codec of object arrays runs code that it reads."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
    store = sf.SimulationStore(tmp_path / "s")
    assert store._root.metadata.zarr_format == 3 and len(store) == 0


@pytest.mark.release
def test_two_thousand_inputs():
    """In a process of its own, without the type checks of the tests."""
    command = [sys.executable, "-m", "tests.hostile_inputs", "300"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert sum(seen.values()) == 2_100 and seen["refused"] > 900 and seen["accepted"] > 90
