"""Random numbers of JAX simulators that do not come from the key, and constant observations."""

import random
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf

PRIOR = dist.Normal(0.0, 1.0).expand([2])
KEY = jax.random.key(0)
FIXED = jax.random.key(5)
DESIGN = np.array([[1.0, 0.5], [0.0, 2.0]], np.float32)
GENERATOR = np.random.default_rng(1)


def run(simulator, n=5):
    return sf.simulate(KEY, PRIOR, simulator, n, progress=False)


def use_numpy(key, theta):
    return theta + np.random.normal(size=2)  # noqa: NPY002


def use_python(key, theta):
    return theta + random.gauss(0.0, 1.0)


class Callable:
    def __call__(self, key, theta):
        return use_numpy(key, theta)


@jax.jit
def jitted(key, theta):
    return use_numpy(key, theta)


GLOBAL = {
    "numpy.random": use_numpy,
    "object": Callable(),
    "lambda": lambda key, theta: use_numpy(key, theta) + jax.random.normal(key),
    "jit": jitted,
}


@pytest.mark.parametrize("name", GLOBAL)
def test_draws_from_numpys_global_generator_are_refused_at_every_call(name):
    if name == "jit":
        jitted(KEY, jnp.zeros(2))  # now JAX has the trace in its cache
    for n in (5, 5, 300):
        with pytest.raises(ValueError, match=r"got draws of numpy\.random, .*use simulators\.ext"):
            run(GLOBAL[name], n)


@pytest.mark.parametrize(
    "simulator",
    [
        use_python,
        lambda key, theta: theta + GENERATOR.normal(size=2),
        lambda key, theta: theta + GENERATOR.normal(),
        lambda key, theta: theta + GENERATOR.normal() + jax.random.normal(key, (2,)),
        jax.jit(lambda key, theta: theta + GENERATOR.normal()),
        lambda key, theta: jax.lax.fori_loop(0, 2, lambda i, t: t + GENERATOR.normal(), theta),
    ],
)
def test_draws_of_a_generator_object_are_refused(simulator):
    for _ in range(2):
        with pytest.raises(ValueError, match="got constants that differ from one trace to the"):
            run(simulator)


def inside(key, theta):
    return theta + jax.random.normal(jax.random.key(0), (2,))


def in_one_branch(key, theta):
    return jax.lax.cond(theta[0] > 0, lambda: theta + jax.random.normal(FIXED), lambda: theta)


def in_a_loop(key, theta):
    def step(i, value):
        return value + jax.random.normal(jax.random.fold_in(FIXED, i), (2,))

    return jax.lax.fori_loop(0, 3, step, theta)


CONSTANT = {
    "inside": inside,
    "outside": lambda key, theta: theta + jax.random.normal(FIXED, (2,)),
    "old form": lambda key, theta: theta + jax.random.normal(jax.random.PRNGKey(1), (2,)),
    "gamma": lambda key, theta: theta * jax.random.gamma(FIXED, 2.0, (2,)),
    "jit": lambda key, theta: jax.jit(inside)(key, theta),
    "branch": in_one_branch,
    "loop": in_a_loop,
    "split, not used": lambda key, theta: inside(jax.random.split(key)[0], theta),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_noise_from_a_constant_key_is_refused(name):
    for n in (5, 300):
        with pytest.raises(ValueError, match="got an output x with random numbers from a constant"):
            run(CONSTANT[name], n)


def test_the_array_with_noise_from_a_constant_key_is_named():
    def simulator(key, theta):
        return {"a": theta + jax.random.normal(key, (2,)), "b": inside(key, theta)}

    with pytest.raises(ValueError, match="got an output b with random numbers from a constant"):
        run(simulator)


def test_a_store_refuses_the_same_simulators(tmp_path):
    for name, simulator in {"a": use_numpy, "b": inside}.items():
        store = sf.SimulationStore(tmp_path / name, chunk=10)
        with pytest.raises(ValueError, match="random numbers only from its argument `key`"):
            store.simulate(KEY, PRIOR, simulator, 20, progress=False)
        with pytest.raises(ValueError, match="expected a store with rows, got none"):
            store.simulations()


def type_checked(key, theta):
    random.random()  # as beartype does, to choose the items that it checks
    return theta + jax.random.normal(key, (2,))


def on_the_host(key, theta):
    result = jax.ShapeDtypeStruct((2,), jnp.float32)
    noisy = lambda t: (np.asarray(t) + use_numpy(None, np.zeros(2))).astype(np.float32)  # noqa: E731
    return jax.pure_callback(noisy, result, theta, vmap_method="sequential")


ACCEPTED = {
    "noise": lambda key, theta: theta + jax.random.normal(key, (2,)),
    "deterministic": lambda key, theta: 2.0 * theta,
    "design": lambda key, theta: DESIGN @ theta,
    "random design and noise": lambda key, theta: (
        jax.random.normal(FIXED, (2, 2)) @ theta + jax.random.normal(key, (2,))
    ),
    "jit": jax.jit(lambda key, theta: DESIGN @ theta + jax.random.normal(key, (2,))),
    "NaN constant": lambda key, theta: jnp.where(theta > 5.0, jnp.nan, theta),
    "host": on_the_host,
    "draw without effect": type_checked,
    "scan": lambda key, theta: jax.lax.scan(
        lambda t, k: (t + jax.random.normal(k, (2,)), None), theta, jax.random.split(key, 3)
    )[0],
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_simulators_with_noise_from_the_key_or_without_noise_are_accepted(name):
    assert run(ACCEPTED[name]).num_valid == 5


def warned(simulator, n=150, theta=None):
    """Messages of warnings from a simulation."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if theta is None:
            run(simulator, n)
        else:
            sf.simulate_at(KEY, PRIOR, simulator, theta, progress=False)
    return [str(w.message) for w in found if issubclass(w.category, sf.errors.SbiFlowsWarning)]


def with_grid(key, theta):
    return {"time": jnp.arange(3.0), "y": theta + jax.random.normal(key, (2,))}


def test_an_array_that_never_varies_is_named():
    assert warned(lambda key, theta: jnp.ones(2)) == [
        "x: expected values that differ between simulations, got the same in all 150; compute "
        "them from theta and key, or leave constants out of x"
    ]
    (message,) = warned(with_grid)
    assert message.startswith("time: expected values that differ between simulations, got the")


def test_a_rare_value_in_the_last_row_prevents_the_warning():
    theta = np.linspace(0.0, 1.0, 6000).reshape(3000, 2).astype(np.float32)
    last = theta[-1, 0]
    assert warned(lambda key, t: 1.0 * (t[0] >= last), theta=theta) == []
    assert len(warned(lambda key, t: 1.0 * (t[0] > last), theta=theta)) == 1


def test_no_warning_for_single_columns_few_rows_or_equal_parameters():
    assert warned(lambda key, theta: jnp.concatenate([theta, jnp.ones(3)])) == []
    assert warned(lambda key, theta: jnp.ones(2), n=50) == []
    assert warned(lambda key, theta: 2.0 * theta, theta=np.ones((150, 2))) == []


def test_a_store_names_an_array_that_never_varies(tmp_path):
    store = sf.SimulationStore(tmp_path / "s", chunk=100)
    with pytest.warns(sf.errors.SbiFlowsWarning, match="time: expected values that differ"):
        store.simulate(KEY, PRIOR, with_grid, 150, progress=False)
