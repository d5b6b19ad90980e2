"""Every kind of posterior inside jit, grad, vmap and scan."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.densities.distilled import Distilled
from sbi_flows.posteriors.adapter import as_posterior
from sbi_flows.posteriors.quantile_maps import quantile_map
from tests.artefacts import ensemble, posterior
from tests.cases import DENSITIES

pytestmark = pytest.mark.promotes

FILM = sf.Film(width=8, blocks=1, frequencies=2)
FEW = sf.Solver(steps=4)
DIFFUSION = sf.Diffusion(network=FILM, solver=FEW, sampler=sf.Ancestral(steps=2))
ODE_DENSITIES = {
    "CNF": sf.CNF(network=FILM, solver=FEW),
    "flow matching": sf.FlowMatching(network=FILM, solver=FEW, sampler=sf.Heun(steps=2)),
    "diffusion": DIFFUSION,
    "distilled": Distilled(teacher=DIFFUSION),
}
N = 5


def direct(*densities) -> sf.Posterior:
    """An unfitted posterior of two parameters, one of them bounded."""
    prior = sf.as_prior({"a": dist.Normal(1.0, 2.0), "b": dist.Uniform(0.0, 3.0)})
    shares = (1.0,) if len(densities) == 1 else (0.7, 0.3)
    parts = (ensemble(density, prior.bounded) for density in densities)
    return posterior(prior, *parts, shares=shares)


def recalibrated() -> sf.RecalibratedPosterior:
    draws = jax.random.normal(jax.random.key(2), (2, 60))
    correction = quantile_map(draws, 1.5 * draws + 0.1)
    inner = direct(DENSITIES["mixture"])
    return sf.RecalibratedPosterior(inner, correction, 60, 1, 20, jax.random.key(3))


def conformal() -> sf.ConformalPosterior:
    scores = np.sort(np.asarray(jax.random.normal(jax.random.key(4), (59,)), np.float64))
    return sf.ConformalPosterior(recalibrated(), scores, 2, 20, jax.random.key(5))


CASES = {name: lambda d=d: direct(d) for name, d in {**DENSITIES, **ODE_DENSITIES}.items()} | {
    "stack": lambda: direct(DENSITIES["mixture"], DENSITIES["coupling MAF"]),
    "recalibrated": recalibrated,
    "conformal": conformal,
    "composed": lambda: sf.composed(direct(DIFFUSION), levels=3, steps=2),
}
# compiling all takes minutes; tests/densities/test_tracing.py has all densities one by one
QUICK = ("mixture", "flow matching")
SLOW = ("coupling MAF", "distilled", "stack", "recalibrated", "conformal", "composed")
PARAMS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(scope="module", params=PARAMS)
def case(request):
    """Posterior, observation, parameters (2,) and a key, in double precision."""
    with jax.enable_x64(True):
        made = CASES[request.param]()
        x = jnp.array([0.31, 1.2, -0.7])
        x = jnp.stack([x, x + 0.2]) if request.param == "composed" else x
        yield made, x, jnp.array([0.6, 1.1]), jax.random.key(7)


def slope(function, value, step=1e-5):
    """Central difference of a function of an array, along a fixed direction."""
    direction = jnp.cos(jnp.arange(1.0, value.size + 1)).reshape(value.shape)
    ends = function(value + step * direction), function(value - step * direction)
    return (ends[0] - ends[1]) / (2 * step)


def along(gradient):
    """Slope along the same direction, of a gradient."""
    return jnp.sum(gradient * jnp.cos(jnp.arange(1.0, gradient.size + 1)).reshape(gradient.shape))


@jax.jit
def everything(made, x, theta, key):
    """All that a posterior does, with the posterior as an argument of a jitted function."""
    at, keys = made.at(x), jax.random.split(key)
    thetas = jnp.stack([theta, theta + 0.1])
    xs = jnp.stack([x, x + 0.1])
    draws, log_prob = at.sample_and_log_prob(key, N)
    return {
        "log_prob": made.log_prob(theta, x),
        "at": at.log_prob(thetas),
        "grad": jax.tree.map(along, jax.grad(made.log_prob, argnums=(0, 1))(theta, x)),
        "over theta": jax.vmap(at.log_prob)(thetas),
        "over x": jax.vmap(lambda x: made.at(x).log_prob(theta))(xs),
        "over keys": jax.vmap(lambda key: at.sample(key, N))(keys),
        "scan": jax.lax.scan(lambda c, theta: (c, at.log_prob(theta)), None, thetas)[1],
        "draws": draws,
        "draws' log_prob": log_prob,
    }


@pytest.mark.slow
def test_everything_works_under_a_trace_and_gives_what_calls_give(case):
    made, x, theta, key = case
    traced = everything(made, x, theta, key)
    thetas, keys = jnp.stack([theta, theta + 0.1]), jax.random.split(key)
    draws, log_prob = made.sample_and_log_prob(key, x, N)
    expected = {
        "log_prob": made.log_prob(theta, x),
        "at": made.log_prob(thetas, x),
        "grad": (
            slope(lambda t: made.log_prob(t, x), theta),
            slope(lambda v: made.log_prob(theta, v), x),
        ),
        "over theta": made.log_prob(thetas, x),
        "over x": jnp.stack([made.log_prob(theta, x), made.log_prob(theta, x + 0.1)]),
        "over keys": jnp.stack([made.sample(k, x, N) for k in keys]),
        "scan": made.log_prob(thetas, x),
        "draws": draws,
        "draws' log_prob": log_prob,
    }
    assert traced.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-4 if name == "grad" else 1e-6
        for a, b in zip(jax.tree.leaves(traced[name]), jax.tree.leaves(value), strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["mixture", "conformal", *ODE_DENSITIES],
)
def test_modes_are_found_under_a_trace(name):
    made, x = CASES[name](), jnp.array([0.31, 1.2, -0.7])
    traced = jax.jit(lambda made, x: made.map(x, starts=4, steps=2))(made, x)
    np.testing.assert_allclose(traced, made.map(x, starts=4, steps=2), rtol=1e-4, atol=1e-4)


def test_it_is_a_pytree_and_goes_through_a_jitted_function(case):
    made, x, theta, _ = case
    leaves, tree = jax.tree.flatten(made)
    assert all(isinstance(leaf, jax.Array | np.ndarray | float) for leaf in leaves)
    again = jax.tree.unflatten(tree, leaves)
    assert type(again) is type(made)
    assert (repr(again), again.record) == (repr(made), made.record)
    np.testing.assert_allclose(again.log_prob(theta, x), made.log_prob(theta, x))
    at = jax.jit(lambda made, x: made.at(x))(made, x)
    np.testing.assert_allclose(at.log_prob(theta), made.log_prob(theta, x), rtol=1e-6)


def test_an_equal_posterior_made_anew_compiles_nothing():
    calls = []

    @jax.jit
    def density(made, theta, x):
        calls.append(1)
        return made.log_prob(theta, x)

    theta, x = jnp.array([0.6, 1.1]), jnp.array([0.3, 1.2, -0.7])
    first, second = (density(recalibrated(), theta, x) for _ in range(2))
    assert (first, len(calls)) == (second, 1)


@pytest.mark.slow
def test_a_failed_solve_is_nan_inside_a_trace_and_an_error_outside():
    made = direct(sf.CNF(network=FILM, solver=sf.Solver(rtol=1e-6, atol=1e-6, max_steps=1)))
    theta, x = jnp.array([0.6, 1.1]), jnp.array([0.3, 1.2, -0.7])
    assert np.isnan(jax.jit(lambda t: made.log_prob(t, x))(theta))
    with pytest.raises(sf.SolveFailed, match="the ODE was not solved at 1 of 1 observations"):
        made.log_prob(theta, x)
    with pytest.raises(sf.SolveFailed):
        made.at(x).sample(jax.random.key(0), 3)


def test_at_takes_a_batch_and_checks_it_once():
    made = recalibrated()
    xs = jnp.array([[0.3, 1.2, -0.7], [2.0, -0.1, 0.4]])
    at, key = made.at(xs), jax.random.key(0)
    assert not at.is_single
    assert repr(at).endswith("2 observations)")
    np.testing.assert_array_equal(at.sample(key, 3), made.sample(key, xs, 3))
    theta = at.sample(key, 3)
    np.testing.assert_array_equal(at.log_prob(theta), made.log_prob(theta, xs))
    with pytest.raises(ValueError, match=r"theta: expected \(2, 2\) or \(2, n, 2\)"):
        at.log_prob(theta[0])
    with pytest.raises(ValueError, match="expected one observation for a numpyro distribution"):
        at.to_numpyro()
    with pytest.raises(ValueError, match=r"x: expected shape \(3,\), or a batch of it"):
        jax.jit(lambda x: made.at(x).sample(key, 3))(jnp.zeros(4))
    with pytest.raises(ValueError, match="x: expected finite values"):
        made.at(jnp.array([0.0, jnp.nan, 1.0]))


def test_the_result_of_a_jitted_function_has_no_facts_of_another_posterior():
    identity = jax.jit(lambda made: made)
    first, second = (
        dataclasses.replace(direct(DENSITIES["mixture"]), record={"number": i}) for i in (1, 2)
    )
    assert (identity(first).record, identity(second).record) == ({}, {})
    leaves, tree = jax.tree.flatten(second)
    assert jax.tree.unflatten(tree, leaves).record == {"number": 2}


def test_a_batch_of_bound_posteriors_is_refused_by_name():
    xs = jnp.array([[0.3, 1.2, -0.7], [2.0, -0.1, 0.4]])
    many = jax.vmap(direct(DENSITIES["mixture"]).at)(xs)
    with pytest.raises(ValueError, match=r"call posterior\.at inside the function"):
        many.sample(jax.random.key(0), 3)


@pytest.mark.slow
def test_an_object_of_another_library_has_modes():
    inner = direct(DENSITIES["mixture"])

    class Other:
        prior, sample, log_prob = inner.prior, inner.sample, inner.log_prob

    made = as_posterior(Other(), inner.observation)
    x = jnp.array([0.3, 1.2, -0.7])
    mode = made.map(x, starts=20, steps=20)
    assert (
        inner.log_prob(mode, x) >= inner.log_prob(inner.sample(jax.random.key(0), x, 20), x).max()
    )
