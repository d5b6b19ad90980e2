"""Properties of every task, stored references, and the registry."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import simulators
from sbi_flows.prior import as_prior
from simulators import ReferenceFailed, Task
from simulators.adapters import stored

SHAPES = {  # flat theta and x
    "bernoulli_glm": ((10,), (10,)),
    "bernoulli_glm_raw": ((10,), (100,)),
    "drift_diffusion": ((4,), (300, 2)),
    "eight_schools": ((10,), (8,)),
    "g_and_k": ((4,), (1000,)),
    "gaussian_linear": ((10,), (10,)),
    "gaussian_linear_uniform": ((10,), (10,)),
    "gaussian_mixture": ((2,), (2,)),
    "hodgkin_huxley": ((4,), (600,)),
    "influenza": ((4,), (14,)),
    "influenza_ode": ((5,), (14,)),
    "lens": ((5,), (32, 32)),
    "lotka_volterra": ((4,), (20,)),
    "lynx_hare": ((8,), (21, 2)),
    "normal_set": ((2,), (100,)),
    "ornstein_uhlenbeck": ((3,), (1000,)),
    "random_field": ((2,), (64, 64)),
    "sensors": ((5,), (30,)),
    "sir": ((2,), (10,)),
    "slcp": ((5,), (8,)),
    "slcp_distractors": ((5,), (100,)),
    "stochastic_volatility": ((3,), (500,)),
    "two_instruments": ((3,), {"spectrum": (100,), "redshift": ()}),
    "two_moons": ((2,), (2,)),
}
WITH_MISSING = {"ornstein_uhlenbeck"}  # tasks whose simulator makes NaN
REAL = {"eight_schools", "influenza", "influenza_ode", "lynx_hare"}
SIMULATED = sorted(SHAPES.keys() - REAL)
TRACED = sorted(SHAPES.keys() - {"influenza"})


def are_equal(a, b):
    """Return True if two observations are equal; NaN equals NaN."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(left, right, equal_nan=True) for left, right in pairs)


def toy(**changes):
    fields = {
        "name": "toy",
        "prior": dist.Normal(0.0, 1.0).expand([2]).to_event(1),
        "simulator": lambda key, theta: theta + jax.random.normal(key, (2,)),
        "citation": "",
        "num_observations": 3,
    }
    return Task(**{**fields, **changes})


def test_registry_names_every_task():
    assert simulators.names() == tuple(sorted(SHAPES))
    for name in simulators.names():
        assert simulators.get(name).name == name
        assert simulators.get(name) is getattr(simulators, name)()


def test_unknown_name():
    with pytest.raises(ValueError, match=r"expected one of bernoulli_glm, .*got 'three_moons'"):
        simulators.get("three_moons")


@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize("name", TRACED)
def test_shapes_under_jit_and_vmap(name):
    task, (theta_shape, x_shape) = simulators.get(name), SHAPES[name]
    prior, keys = as_prior(task.prior), jax.random.split(jax.random.key(0), 6)
    theta = prior.sample(jax.random.key(1), 6)
    assert theta.shape == (6, *theta_shape)
    assert len(task.labels) == task.dim == theta_shape[0]
    assert jnp.all(prior.contains(theta))
    x = jax.jit(jax.vmap(task.simulator))(keys, prior.structured(theta))
    dtype = jnp.int32 if name == "influenza_ode" else jnp.float32
    alone = task.simulator(keys[2], prior.structured(theta[2]))
    assert jax.tree.map(jnp.shape, alone) == x_shape
    for rows, row in zip(jax.tree.leaves(x), jax.tree.leaves(alone), strict=True):
        assert (rows.shape, rows.dtype) == ((6, *row.shape), dtype)
        assert name in WITH_MISSING or jnp.all(jnp.isfinite(rows))
        np.testing.assert_allclose(rows[2], row, rtol=1e-4, atol=1e-4)
        assert len({values.tobytes() for values in np.asarray(rows)}) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", SIMULATED)
def test_observations_are_fixed_and_differ(name):
    task = simulators.get(name)
    first, second = task.observation(1), task.observation(2)
    assert jax.tree.map(jnp.shape, first) == SHAPES[name][1]
    assert are_equal(first, task.observation(1))
    assert not are_equal(first, second)
    with jax.enable_x64(True):
        assert are_equal(first, task.observation(1))
        assert np.array_equal(task.true_parameters(2), jnp.asarray(task.true_parameters(2)))
    theta = task.true_parameters(1)
    assert theta.shape == (task.dim,)
    assert bool(as_prior(task.prior).contains(theta))


def test_observations_come_from_their_parameters():
    task = toy(simulator=lambda key, theta: 2 * theta)
    for i in (1, 3):
        np.testing.assert_array_equal(task.observation(i), 2 * task.true_parameters(i))


def test_observations_do_not_change():
    """A change of these numbers makes earlier results incomparable."""
    np.testing.assert_allclose(
        simulators.two_moons().observation(1), [-0.248140, 0.317128], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("i", [0, 4, -1])
@pytest.mark.parametrize("method", ["observation", "true_parameters", "reference"])
def test_index_out_of_range(method, i):
    with pytest.raises(ValueError, match=f"expected 1 to 3 for toy, got {i}"):
        getattr(toy(), method)(i)


@pytest.mark.parametrize("i", [1.0, True, "1"])
def test_index_that_is_no_integer(i):
    with pytest.raises(ValueError, match="expected an integer, got"):
        toy().observation(i)


def test_real_observations():
    task = toy(observed=np.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(task.observation(2), [2.0, 3.0])
    with pytest.raises(ValueError, match="toy: observation 2 is real data"):
        task.true_parameters(2)


def test_wrong_number_of_observations():
    with pytest.raises(ValueError, match="observed: expected 3 rows, got 2"):
        toy(observed=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="num_observations: expected at least one, got 0"):
        toy(num_observations=0)


def test_reference_errors():
    with pytest.raises(ValueError, match="toy: expected a task with an exact sampler, got none"):
        toy().reference(1)
    with pytest.raises(ValueError, match="n: expected at least one draw, got 0"):
        toy(sample_reference=lambda key, x, n: jnp.zeros((n, 2))).reference(1, n=0)
    failing = toy(sample_reference=lambda key, x, n: jnp.zeros((n, 2)).at[:2].set(jnp.nan))
    with pytest.raises(ReferenceFailed, match="toy: 2 of 5 reference draws could not be made"):
        failing.reference(1, n=5)


def test_reference_keys_are_fixed_and_differ():
    task = toy(sample_reference=lambda key, x, n: jax.random.normal(key, (n, 2)))
    first = task.reference(1, n=4)
    assert jnp.array_equal(first, task.reference(1, n=4))
    assert not jnp.array_equal(first, task.reference(2, n=4))


def test_named_prior_gives_the_simulator_a_dict():
    prior = {"rate": dist.LogNormal(0.0, 1.0), "shift": dist.Normal(0.0, 1.0).expand([2])}
    task = toy(prior=prior, simulator=lambda key, theta: theta["rate"] * theta["shift"])
    rate, *shift = task.true_parameters(1)
    assert task.labels == ("rate", "shift[0]", "shift[1]")
    np.testing.assert_allclose(task.observation(1), rate * jnp.stack(shift), rtol=1e-6)


def stored_toy(**changes):
    """A task with stored draws whose sampler raises."""

    def fail(key, x, n):
        raise AssertionError("sampled")

    return toy(sample_reference=fail, stored_as="toy", **changes)


def test_stored_references_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("SBI_FLOWS_CACHE", str(tmp_path))
    task, draws = stored_toy(), np.arange(20.0).reshape(10, 2)
    x = task.stored_observation(1)
    stored.save(tmp_path, "toy", 1, x, draws, {"rhat": 1.0})
    np.testing.assert_array_equal(task.reference(1, n=10), draws)
    np.testing.assert_array_equal(task.reference(1, n=2), draws[[0, 9]])
    # not read: too few draws, draws for another observation, an unreadable file
    stored.save(tmp_path, "toy", 2, x, draws, {})
    (tmp_path / "toy-3.npz").write_text("nothing")
    for i, n in ((1, 11), (2, 5), (3, 5)):
        with pytest.raises(AssertionError, match="sampled"):
            task.reference(i, n=n)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy-1.npz", "toy-2.npz", "toy-3.npz"]


@pytest.mark.parametrize("name", ["sir", "lotka_volterra", "bernoulli_glm"])
def test_shipped_references_match_the_observations_and_have_converged(name):
    task = simulators.get(name)
    for i in range(1, 11):
        path = stored.FOLDER / f"{name}-{i}.npz"
        with np.load(path, allow_pickle=False) as file:
            assert file["rhat"] < 1.01 and file["ess"] > 1000 and file["diverged"] < 0.01
        x = task.stored_observation(i)
        draws = stored.load(name, i, x, (stored.FOLDER,))
        assert draws is not None and draws.shape == (10_000, task.dim)
        assert np.all(np.isfinite(draws))
        # the posterior covers the true parameters
        z = (task.true_parameters(i) - draws.mean(axis=0)) / draws.std(axis=0)
        assert np.max(np.abs(z)) < 4.5


@pytest.mark.slow
def test_both_spike_trains_share_their_references():
    raw, summed = simulators.bernoulli_glm_raw(), simulators.bernoulli_glm()
    np.testing.assert_allclose(raw.stored_observation(3), summed.stored_observation(3), atol=1e-5)
    assert raw.stored_as == summed.stored_as == "bernoulli_glm"
