"""`Simulations`: checks, rows, counts. `simulate`: keys, compiled calls, failures, traces."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from tqdm import tqdm

import sbi_flows as sf
from sbi_flows.core.errors import SbiFlowsError, SbiFlowsWarning, SimulationFailed
from sbi_flows.simulations import batching
from sbi_flows.simulations import simulate as simulating

PRIOR = sf.as_prior(dist.Normal(0.0, 1.0).expand([2]))
NAMED = sf.as_prior({"mean": dist.Normal(0.0, 1.0), "noise": dist.HalfNormal(1.0).expand([2])})


def noisy(key, theta):
    return theta + jax.random.normal(key, (2,))


def failing(key, theta):
    """Simulator that returns NaN where the first parameter is above 1."""
    return jnp.where(theta[0] > 1.0, jnp.nan, noisy(key, theta))


def named(key, theta):
    """Simulator with a dict of parameters and a dict of arrays, one of them integer."""
    counts = jax.random.poisson(key, jnp.exp(theta["mean"]), (3,))
    return {"counts": counts, "total": jnp.sum(theta["noise"])}


@pytest.mark.newest
def test_simulations_follow_the_key():
    first, same, other = (sf.simulate(jax.random.key(seed), PRIOR, noisy, 50) for seed in (0, 0, 1))
    assert first.theta.shape == first.x.shape == (50, 2)
    np.testing.assert_array_equal(first.theta, same.theta)
    np.testing.assert_array_equal(first.x, same.x)
    assert not np.any(first.theta == other.theta)
    assert not np.any(first.x == other.x)


def test_the_text_shows_keys_and_names():
    x = {"image": np.zeros((3, 8, 8)), "spectrum": np.zeros((3, 20))}
    x["spectrum"][1, 0] = np.nan
    sims = sf.Simulations(np.zeros((3, 2)), x)
    arrays = "x={image: float32[8, 8], spectrum: float32[20]}"
    assert repr(sims) == f"Simulations(N=3, D=2, {arrays}, invalid=1)"
    named = sf.Simulations({"b": np.zeros(3), "a": np.zeros(3)}, (np.ones(3), np.ones((3, 2))))
    assert repr(named) == "Simulations(N=3, D=2 (b, a), x=(float32[], float32[2]), invalid=0)"
    many = sf.Simulations({"z": np.zeros((1, 20))}, np.ones(1))
    assert "D=20 (z[0], z[1], z[2], z[3], z[4], z[5], z[6], z[7], ...), x=float32[]" in repr(many)


def test_rows_are_independent_and_belong_together():
    sims = sf.simulate(jax.random.key(0), PRIOR, noisy, 2000)
    noise = sims.x - sims.theta
    assert abs(np.std(noise) - 1) < 0.05
    correlation = np.corrcoef(np.concatenate([sims.theta, noise], axis=1).T)
    assert np.max(np.abs(correlation - np.eye(4))) < 0.1


@pytest.mark.parametrize("chunk", [256, 512])
def test_the_result_does_not_depend_on_the_chunks(chunk, monkeypatch):
    whole = sf.simulate(jax.random.key(0), NAMED, named, 700)
    monkeypatch.setattr(batching, "MAX_CALL_ROWS", chunk)
    pieces = sf.simulate(jax.random.key(0), NAMED, named, 700, progress=False)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_progress_is_shown_for_several_chunks_alone(monkeypatch):
    shown = []

    def spy(*args, disable, **kwargs):
        shown.append(not disable)
        return tqdm(*args, disable=True, **kwargs)

    monkeypatch.setattr(simulating, "tqdm", spy)
    sf.simulate(jax.random.key(0), PRIOR, noisy, 300)
    monkeypatch.setattr(batching, "MAX_CALL_ROWS", 256)
    sf.simulate(jax.random.key(0), PRIOR, noisy, 300)
    sf.simulate(jax.random.key(0), PRIOR, noisy, 300, progress=False)
    assert shown == [False, True, False]


def test_named_parameters_and_observations_stay_named():
    sims = sf.simulate(jax.random.key(0), NAMED, named, 30)
    assert sims.theta.shape == (30, 3)
    assert set(sims.x) == {"counts", "total"}
    assert sims.x["counts"].shape == (30, 3)
    assert jnp.issubdtype(sims.x["counts"].dtype, jnp.integer)
    np.testing.assert_allclose(sims.x["total"], np.sum(sims.theta[:, 1:], axis=1), rtol=1e-5)
    assert repr(sims) == "Simulations(N=30, D=3, x={counts: int32[3], total: float32[]}, invalid=0)"


def test_failed_rows_are_kept_marked_and_counted():
    with pytest.warns(SbiFlowsWarning, match=r"^\d+ of 500 .* failed: \d+ gave NaN") as caught:
        sims = sf.simulate(jax.random.key(0), PRIOR, failing, 500)
    failed = np.asarray(sims.theta[:, 0] > 1.0)
    assert 40 < failed.sum() < 130
    np.testing.assert_array_equal(sims.valid, ~failed)
    assert (len(sims), sims.num_valid) == (500, 500 - failed.sum())
    assert str(caught[0].message).startswith(f"{failed.sum()} of 500")
    assert len(sims.only_valid()) == sims.num_valid
    assert np.all(np.isfinite(sims.only_valid().x))


def test_infinity_counts_as_failure_and_a_clean_run_is_silent():
    sims = sf.Simulations(np.zeros((3, 1)), {"a": np.array([1.0, np.inf, 2.0]), "b": np.arange(3)})
    np.testing.assert_array_equal(sims.valid, [True, False, True])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = sf.simulate(jax.random.key(0), PRIOR, noisy, 20)
    assert whole.only_valid() is whole


def test_no_valid_row_at_all_is_an_error():
    with pytest.raises(
        SimulationFailed, match=r"all 20 simulations failed: 20 gave NaN.* give missing=True"
    ) as error:
        sf.simulate(jax.random.key(0), PRIOR, lambda key, theta: theta * jnp.nan, 20)
    assert isinstance(error.value, SbiFlowsError)


class Shifted:
    """Callable object with state and without a hash."""

    __hash__ = None
    shift = 0.0

    def __call__(self, key, theta):
        return theta + self.shift


def test_a_simulator_with_state_is_run_as_it_is_now():
    simulator = Shifted()
    for run in (simulator, simulator.__call__):
        for shift in (0.0, 100.0):
            simulator.shift = shift
            sims = sf.simulate(jax.random.key(0), PRIOR, run, 10)
            np.testing.assert_allclose(sims.x, sims.theta + shift, rtol=1e-6)


@pytest.mark.parametrize(
    ("simulator", "message"),
    [
        (lambda key, theta: np.asarray(theta), "expected a function that JAX can trace"),
        (lambda key, theta: theta if theta[0] > 0 else -theta, "that JAX can trace"),
        (lambda key, theta: theta[theta > 0], "that JAX can trace"),
        (lambda key, theta: {}, "expected numeric arrays"),
        (lambda key, theta: (), "expected numeric arrays"),
        (lambda key, theta: theta[:0], "expected numeric arrays"),
        (lambda key, theta: theta + 1j, "simulator: expected real numbers, got dtype complex64"),
        (lambda key, theta: key, r"simulator: expected real numbers, got dtype key<fry>"),
    ],
)
def test_a_simulator_that_cannot_be_run_is_refused(simulator, message):
    with pytest.raises(ValueError, match=message):
        sf.simulate(jax.random.key(0), PRIOR, simulator, 10)


@pytest.mark.parametrize("n", [0, -3])
def test_a_number_of_simulations_below_one_is_refused(n):
    with pytest.raises(ValueError, match=f"n: expected a whole number of at least 1, got {n}"):
        sf.simulate(jax.random.key(0), PRIOR, noisy, n)


KEY = jax.random.key(0)
GOOD = np.zeros((4, 2))


@pytest.mark.parametrize(
    ("theta", "x", "message"),
    [
        (np.zeros(4), GOOD, r"theta: expected a numeric array \(N, D\)"),
        (np.zeros((4, 2), bool), GOOD, r"theta: expected a numeric array \(N, D\)"),
        (np.full((4, 2), "a"), GOOD, "theta: expected real numbers, got dtype <U1"),
        (GOOD + 1j, GOOD, "theta: expected real numbers, got dtype complex128"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "theta: expected at least one row"),
        (np.zeros((4, 0)), GOOD, "theta: expected at least one row and column"),
        (np.array([[0.0], [np.nan], [np.inf]]), np.zeros(3), "finite values, got 2 rows"),
        (GOOD, np.zeros((3, 2)), r"x: expected 4 rows as in theta, got shape \(3, 2\)"),
        (GOOD, np.float32(1.0), r"x: expected 4 rows as in theta, got shape \(\)"),
        (GOOD, {"a": GOOD, "b": np.zeros(5)}, r"x: expected 4 rows as in theta, got shape \(5,\)"),
        (GOOD, np.full((4, 1), "a"), "x: expected real numbers"),
        (GOOD, np.array([[None]] * 4), "x: expected real numbers, got dtype object"),
        (GOOD, {"a": GOOD, "b": GOOD + 1j}, "x: expected real numbers, got dtype complex128"),
        (GOOD, np.zeros((4, 1), "m8[s]"), r"x: expected real numbers, got dtype timedelta64\[s\]"),
        (GOOD, {}, "x: expected"),
        (GOOD, np.zeros((4, 0)), "x: expected at least one number in each row, got none"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(theta, x, message):
    with pytest.raises(ValueError, match=message):
        sf.Simulations(theta, x)


@pytest.mark.parametrize("field", ["valid", "round"])
def test_a_field_of_the_wrong_length_is_refused(field):
    with pytest.raises(ValueError, match=rf"{field}: expected shape \(4,\), got"):
        sf.Simulations(GOOD, GOOD, **{field: np.ones(3, int)})


def test_arrays_of_either_library_and_lists_are_accepted():
    for make in (np.asarray, jnp.asarray, list):
        sims = sf.Simulations(make([[1, 2], [3, 4]]), make([[0.5], [1.5]]))
        assert sims.theta.dtype == jnp.float32
        assert isinstance(sims.theta, jax.Array)
        assert sims.num_valid == 2
        np.testing.assert_array_equal(sims.round, [0, 0])


def test_numbers_beyond_single_precision_keep_their_size():
    """JAX's own conversion would overflow, to 5, 0 and infinity."""
    sims = sf.Simulations(np.zeros((2, 1)), {"a": np.array([2**40 + 5, 1])})
    np.testing.assert_allclose(sims.x["a"], [2.0**40, 1.0])
    sims = sf.Simulations(np.zeros((2, 1)), np.array([2**63, 1], np.uint64))
    np.testing.assert_allclose(sims.x, [2.0**63, 1.0])
    sims = sf.Simulations(np.zeros((2, 1)), np.array([1e300, 1.0]))
    np.testing.assert_array_equal(sims.valid, [True, True])
    np.testing.assert_array_equal(sims.x, [1e300, 1.0])
    assert sf.Simulations(np.zeros((2, 1)), np.array([7, 1])).x.dtype == jnp.int32


def test_no_row_that_is_not_finite_is_valid_whatever_the_user_says():
    x = np.array([1.0, np.nan, 3.0])
    sims = sf.Simulations(np.zeros((3, 1)), x, valid=[True, True, False])
    np.testing.assert_array_equal(sims.valid, [True, False, False])


def test_rows_are_taken_from_every_field():
    x = {"a": np.arange(6.0), "b": np.array([[1.0], [2.0], [np.nan], [4.0], [5.0], [6.0]])}
    sims = sf.Simulations(np.arange(12.0).reshape(6, 2), x, round=np.arange(6))
    for rows in (slice(1, 4), np.array([1, 2, 3]), np.isin(np.arange(6), [1, 2, 3])):
        part = sims[rows]
        assert isinstance(part, sf.Simulations)
        assert (len(part), part.num_valid) == (3, 2)
        np.testing.assert_array_equal(part.theta, [[2, 3], [4, 5], [6, 7]])
        np.testing.assert_array_equal(part.x["a"], [1, 2, 3])
        np.testing.assert_array_equal(part.round, [1, 2, 3])
    assert len(sims[sims.round > 9]) == 0
    with pytest.raises(ValueError, match="rows: expected a slice or an index array, or 6"):
        sims[3]


def test_a_pytree_that_jit_takes_and_returns():
    sims = sf.Simulations(np.arange(4.0)[:, None], {"a": np.array([1.0, np.nan, 3.0, 4.0])})
    leaves, structure = jax.tree.flatten(sims)
    back = jax.tree.unflatten(structure, leaves)
    returned = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf, s))(sims)
    for other in (back, returned):
        assert isinstance(other, sf.Simulations)
        np.testing.assert_array_equal(other.theta, sims.theta)
        np.testing.assert_array_equal(other.valid, [True, False, True, True])


def test_the_fields_are_frozen():
    sims = sf.Simulations(GOOD, GOOD)
    with pytest.raises(AttributeError):
        sims.theta = GOOD


def test_given_parameters_are_simulated_row_by_row():
    theta = jnp.linspace(-1.0, 1.0, 600).reshape(300, 2)
    prior = dist.Normal(0, 1).expand([2])
    sims = sf.simulate_at(jax.random.key(0), prior, lambda key, t: 2.0 * t, theta, progress=False)
    np.testing.assert_array_equal(sims.theta, theta)
    np.testing.assert_array_equal(sims.x, 2.0 * theta)
    with pytest.raises(ValueError, match=r"theta: expected 2 columns for .*, got 3"):
        sf.simulate_at(jax.random.key(0), prior, lambda key, t: t, jnp.zeros((4, 3)))


class Counting:
    """A simulator that counts how often Python runs it: once for each trace."""

    def __init__(self):
        self.traces = 0

    def function(self):
        """Return a plain function, whose programs JAX reuses."""

        def simulator(key, theta):
            self.traces += 1
            return theta + jax.random.normal(key, theta.shape)

        return simulator


@pytest.mark.parametrize("n", [5, 300, 2_000])
def test_a_simulator_is_traced_once_to_run_and_once_to_compare(n):
    counting = Counting()
    simulator = counting.function()
    sf.simulate(KEY, PRIOR, simulator, n, progress=False)
    assert counting.traces == 2
    theta = sf.simulate(KEY, PRIOR, simulator, n, progress=False).theta
    sf.simulate_at(KEY, PRIOR, simulator, theta, progress=False)
    assert counting.traces == 2


def test_a_simulator_is_traced_twice_for_a_store(tmp_path):
    counting = Counting()
    simulator = counting.function()
    store = sf.SimulationStore(tmp_path / "s", chunk=100)
    store.simulate(KEY, PRIOR, simulator, 600, progress=False)
    store.simulate(KEY, PRIOR, simulator, 900, progress=False)
    assert counting.traces == 2


def test_what_simulate_returns_is_not_checked_again(monkeypatch):
    def checked(*_):
        raise AssertionError("checked again")

    for name in ("as_parameters", "require_rows", "as_tree"):
        monkeypatch.setattr(f"sbi_flows.simulations.simulations.{name}", checked)
    assert sf.simulate(KEY, PRIOR, noisy, 20).num_valid == 20
