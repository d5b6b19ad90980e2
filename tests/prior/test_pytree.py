"""Priors as pytrees: jit, grad, vmap, arguments of jitted functions, number of compilations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.prior.box import BoxPrior
from sbi_flows.prior.site_prior import SitePrior
from tests import cases
from tests.compilations import count_compilations

# numpyro promotes ranks in many distributions and transforms
pytestmark = pytest.mark.promotes

KEY = jax.random.key(0)
BASE = {
    "rate": lambda: dist.LogNormal(0.0, 1.0),
    "p": lambda: dist.Uniform(0.0, 1.0).expand([2]),
    "wait": lambda: dist.Gamma(2.0, 3.0),
    "offset": lambda: dist.TruncatedNormal(1.0, 2.0, low=0.0),
}


def made(shift: float = 0.0) -> sf.Prior:
    """Make a new prior, its parameters moved by `shift`."""
    return sf.as_prior(
        {
            "rate": dist.LogNormal(0.1 + shift, 1.0),
            "p": dist.Uniform(0.0, 1.0 + shift).expand([2]),
            "wait": dist.Gamma(2.0, 3.0 + shift),
        }
    )


def box(share: float = 1.0) -> BoxPrior:
    """Make a new box of a new prior."""
    return BoxPrior(made(), share * np.array([-1.0, -1.0, 0.2, 0.3]), [2.0, 1.0, 1.5, 2.5])


PRIORS: dict[str, Callable[[], sf.Prior]] = {
    **{name: (lambda name=name: sf.as_prior(cases.PRIORS[name]())) for name in cases.PRIORS},
    "box": box,
}


@pytest.fixture(scope="module", params=PRIORS)
def case(request) -> tuple[str, sf.Prior, jax.Array]:
    prior = PRIORS[request.param]()
    return request.param, prior, prior.sample(KEY, 6)


METHODS: dict[str, Callable] = {
    "log_prob": lambda prior, theta: prior.log_prob(theta),
    "contains": lambda prior, theta: prior.contains(theta),
    "to_standard": lambda prior, theta: prior.to_standard(theta),
    "from_standard": lambda prior, theta: prior.from_standard(prior.to_standard(theta)),
    "standard_log_det": lambda prior, t: prior.standard_log_det(prior.to_standard(t), t),
    "structured": lambda prior, theta: prior.structured(theta),
    "flatten": lambda prior, theta: prior.flatten(prior.unflatten(theta)),
    "site_log_probs": lambda prior, theta: prior.site_log_probs(theta),
}


@pytest.mark.slow
def test_every_method_works_under_jit_with_the_prior_closed_over_or_as_an_argument(case):
    _, prior, theta = case

    def every(prior: sf.Prior, theta: jax.Array) -> dict:
        return {name: method(prior, theta) for name, method in METHODS.items()}

    expected = every(prior, theta)
    argument = jax.jit(every)(prior, theta)
    closed = jax.jit(lambda theta: every(prior, theta))(theta)
    for compiled in (argument, closed):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), compiled, expected
        )


@pytest.mark.slow
def test_draws_under_jit_and_vmap_over_keys(case):
    _, prior, theta = case
    drawn = jax.jit(lambda prior, key: prior.sample(key, 6))(prior, KEY)
    np.testing.assert_allclose(drawn, theta, rtol=1e-4, atol=1e-5)
    several = jax.vmap(lambda key: prior.sample(key, 2))(jax.random.split(KEY, 3))
    assert several.shape == (3, 2, prior.dim)
    assert np.all(prior.contains(several))


@pytest.mark.slow
def test_the_density_under_vmap_and_grad(case):
    _, prior, theta = case
    expected = prior.log_prob(theta)
    np.testing.assert_allclose(jax.vmap(prior.log_prob)(theta), expected, rtol=1e-4, atol=1e-4)

    def total(prior: sf.Prior, theta: jax.Array) -> jax.Array:
        return jnp.sum(prior.log_prob(theta))

    slopes = jax.jit(jax.grad(total, argnums=1))(prior, theta)
    assert slopes.shape == theta.shape
    assert np.all(np.isfinite(slopes))


def test_gradients_with_respect_to_the_parameters_of_a_prior():
    def log_prob(prior: sf.Prior) -> jax.Array:
        return prior.log_prob(jnp.array([1.5]))

    prior = sf.as_prior(dist.Normal(1, 2))
    (slope,) = jax.tree.leaves(jax.grad(log_prob)(prior))[:1]
    np.testing.assert_allclose(slope, 0.5 / 4.0, rtol=1e-5)


def test_a_prior_passes_through_jit(case):
    _, prior, theta = case
    passed = jax.jit(lambda prior: prior)(prior)
    assert type(passed) is type(prior) and isinstance(passed, sf.Prior)
    assert passed.labels == prior.labels and passed.bounded == prior.bounded
    assert repr(passed) == repr(prior)
    assert passed.matches(passed)
    np.testing.assert_allclose(passed.log_prob(theta), prior.log_prob(theta), rtol=1e-4, atol=1e-5)


def test_a_prior_made_anew_has_the_same_structure(case):
    name, prior, _ = case
    again = PRIORS[name]()
    assert jax.tree.structure(again) == jax.tree.structure(prior)
    assert hash(jax.tree.structure(again)) == hash(jax.tree.structure(prior))
    assert again.matches(prior)


def test_several_priors_are_one_batch():
    several = [sf.as_prior(dist.Normal(loc, 1.0)) for loc in (0.0, 1.0)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    densities = jax.vmap(lambda prior: prior.log_prob(jnp.ones(1)))(batch)
    expected = [prior.log_prob(jnp.ones(1)) for prior in several]
    np.testing.assert_allclose(densities, expected, rtol=1e-6)


OTHERS = {
    "shape": lambda: sf.as_prior(dist.Normal(jnp.zeros(2), 1.0)),
    "distribution": lambda: sf.as_prior(dist.Cauchy(0.0, 1.0)),
    "name": lambda: sf.as_prior({"a": dist.Normal(0.0, 1.0)}),
    "a dict": lambda: sf.as_prior({"theta": dist.Normal(0.0, 1.0)}),
    "a box": lambda: BoxPrior(sf.as_prior(dist.Normal(0.0, 1.0)), [-1.0], [1.0]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_priors_have_other_structures(name):
    prior = sf.as_prior(dist.Normal(0.0, 1.0))
    assert jax.tree.structure(OTHERS[name]()) != jax.tree.structure(prior)


def test_a_support_that_depends_on_a_sign_survives_a_trace():
    """Numpyro assumes that a traced scale is positive, which would reverse the support."""
    prior = sf.as_prior(cases.PRIORS["negative lognormal"]())
    theta = jnp.array([[0.5], [2.0]])
    inside = jax.jit(lambda prior: prior.contains(theta))(prior)
    np.testing.assert_array_equal(inside, [True, False])


class Powered(dist.Normal):
    """A user's distribution with an attribute that is no leaf."""

    power = 1.0

    def __init__(self, power: float) -> None:
        super().__init__(0.0, 1.0)
        self.power = power

    def log_prob(self, value, intermediates=None):
        return self.power * super().log_prob(value)


def test_a_distribution_of_a_users_own_class_is_static():
    first, second = (sf.as_prior(Powered(2.0)) for _ in range(2))
    expected = 2.0 * dist.Normal(0.0, 1.0).log_prob(0.3)
    at = jax.jit(lambda prior: prior.log_prob(jnp.array([0.3])))(first)
    np.testing.assert_allclose(at, expected, rtol=1e-6)
    assert jax.tree.leaves(first) == []
    assert jax.tree.structure(first) != jax.tree.structure(second)


SCALE = {"value": 1.0}


def changing() -> None:
    """Model that reads a variable which can change."""
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    numpyro.sample("effect", dist.Normal(level, SCALE["value"]))


def test_a_model_that_draws_otherwise_is_another_structure(monkeypatch):
    first = sf.as_prior(changing)
    assert jax.tree.structure(first) == jax.tree.structure(sf.as_prior(changing))
    narrow = np.std(np.diff(first.sample(KEY, 500), axis=1))
    monkeypatch.setitem(SCALE, "value", 10.0)
    second = sf.as_prior(changing)
    assert jax.tree.structure(first) != jax.tree.structure(second)
    assert np.std(np.diff(second.sample(KEY, 500), axis=1)) > 5 * narrow


def test_priors_are_one_abstract_class_and_two_final_ones():
    assert isinstance(made(), sf.Prior) and isinstance(box(), sf.Prior)
    assert issubclass(type(made()), sf.Prior)
    with pytest.raises(TypeError, match="abstract"):
        sf.Prior()  # type: ignore[abstract]  # the test
    concrete = {n for n, v in vars(sf.Prior).items() if not getattr(v, "__isabstractmethod__", 0)}
    for kind in (SitePrior, BoxPrior):
        overridden = {n for n in vars(kind) if not n.startswith("__")} & concrete
        assert overridden <= {"layout", "_abc_impl"}


def noisy(key, theta):
    return sum(jnp.sum(v) for v in theta.values()) + jax.random.normal(key)


def everything(prior: sf.Prior) -> None:
    theta = prior.sample(KEY, 8)
    jax.jit(METHODS["log_prob"])(prior, theta)
    sf.simulate(KEY, prior, noisy, 8, progress=False)
    sf.simulate_at(KEY, prior, noisy, theta, progress=False)


SAME: dict[str, tuple[Callable[[], sf.Prior], Callable[[], sf.Prior]]] = {
    "made anew": (made, made),
    "with other parameters": (made, lambda: made(0.5)),
    "a box made anew": (box, box),
    "another box": (box, lambda: box(0.5)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_a_prior_of_the_same_structure_compiles_nothing(name):
    first, second = SAME[name]
    everything(first())
    with count_compilations() as compiled:
        everything(second())
    assert compiled == []


def test_an_unequal_prior_is_counted_as_compiled():
    with count_compilations() as compiled:
        sf.as_prior(dist.Laplace(0.0, 1.5).expand([3])).sample(KEY, 17)
    assert compiled
