"""All kinds of priors: names, density, support and the map to standard coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.stats import norm

import sbi_flows as sf
from sbi_flows.prior.maps import HALF_WIDTH
from tests import cases

# numpyro promotes ranks in many distributions and transforms
pytestmark = pytest.mark.promotes

# priors that standard coordinates turn into independent normals or uniforms
THROUGH_CDF = [
    "uniform",
    "uniform, own faces",
    "normal",
    "lognormal",
    "negative lognormal",
    "truncated below",
    "truncated on both sides",
    "half normal",
    "half Cauchy",
    "exponential",
    "beta",
    "gamma",
    "Student t",
    "dict",
]


@pytest.fixture(scope="module", params=cases.PRIORS)
def case(request):
    name = request.param
    prior = cases.prior(name)
    return name, prior, prior.sample(jax.random.key(0), 300)


@pytest.mark.slow
@pytest.mark.newest
def test_draws_are_inside_the_support(case):
    _, prior, theta = case
    assert theta.shape == (300, prior.dim)
    assert theta.dtype == jnp.float32
    inside = prior.contains(theta)
    assert inside.dtype == bool
    assert np.all(inside)
    assert np.all(np.isfinite(prior.log_prob(theta)))


def test_the_density_is_that_of_numpyro(case):
    name, prior, theta = case
    given, values = cases.PRIORS[name](), prior.unflatten(theta)
    if isinstance(given, dist.Distribution):
        expected = given.log_prob(values["theta"]).reshape(300, -1).sum(axis=1)
    elif isinstance(given, dict):
        expected = sum(given[n].log_prob(v).reshape(300, -1).sum(axis=1) for n, v in values.items())
    else:
        expected = [
            numpyro.infer.util.log_density(given, (), {}, {n: v[i] for n, v in values.items()})[0]
            for i in range(2)
        ]
        theta = theta[:2]
    np.testing.assert_allclose(prior.log_prob(theta), expected, rtol=1e-4, atol=1e-4)


def test_flat_and_named_values_are_the_same(case):
    _, prior, theta = case
    batch = theta.reshape(3, 100, prior.dim)
    values = prior.unflatten(batch)
    assert tuple(values) == prior.names
    for name, value in values.items():
        assert value.shape == (3, 100, *prior.event_shapes[name])
    np.testing.assert_array_equal(prior.flatten(values), batch)
    assert len(prior.labels) == prior.dim == len(set(prior.labels))


def test_standard_coordinates_and_back(case):
    _, prior, theta = case
    y = prior.to_standard(theta)
    assert y.shape == (300, prior.standard_dim) == (300, len(prior.bounded))
    scale = 1e-3 + np.std(theta, axis=0) + np.abs(theta)
    np.testing.assert_array_less(np.abs(prior.from_standard(y) - theta), 1e-3 * scale)
    assert np.all(np.abs(np.asarray(y)[:, np.asarray(prior.bounded)]) < HALF_WIDTH)


def test_the_prior_is_standard_in_standard_coordinates(case):
    name, prior, theta = case
    y = prior.to_standard(theta)
    pushed = prior.log_prob(theta) + prior.standard_log_det(y, theta)
    if name in THROUGH_CDF:
        uniform = jnp.full_like(y, -np.log(2 * HALF_WIDTH))
        expected = jnp.where(jnp.asarray(prior.bounded)[None], uniform, norm.logpdf(y))
        np.testing.assert_allclose(pushed, jnp.sum(expected, axis=-1), atol=5e-3)
    else:
        assert not any(prior.bounded)
        assert np.all(np.isfinite(pushed))


@pytest.mark.slow
def test_no_standard_coordinates_lead_outside(case):
    """Extreme coordinates of both signs map to the outermost number inside the support."""
    name, prior, _ = case
    # one that the support alone gives meets numbers of many sizes, which round to their sum
    elementwise = name in [*THROUGH_CDF, "Weibull", "model"]
    sizes = [6.0, 12.0, 1e3, 1e30] if elementwise else [2.0, 4.0]
    y = sizes[0] * jax.random.normal(jax.random.key(1), (149, prior.standard_dim))
    y = jnp.concatenate([y, *(jnp.full((1, prior.standard_dim), size) for size in sizes[1:])])
    y = jnp.concatenate([y, -y])
    edge = np.float32(HALF_WIDTH)
    y = jnp.where(jnp.asarray(prior.bounded)[None], jnp.clip(y, -edge, edge), y)
    theta = prior.from_standard(y)
    assert np.all(prior.contains(theta))
    assert not np.any(np.isnan(prior.log_prob(theta)))


TAILS = {  # a prior, and places where 1 - cdf has no digits left in single precision
    "exponential": (dist.Exponential(1.0), [1e-6, 4.0, 20.0, 80.0]),
    "half normal": (dist.HalfNormal(2.0), [1e-3, 10.0, 16.0]),
    "half Cauchy": (dist.HalfCauchy(2.0), [1e-4, 1e3, 1e9]),
    "truncated below": (dist.TruncatedNormal(1.0, 0.5, low=0.0), [1e-3, 4.0, 6.0]),
    "a tail of a normal": (dist.TruncatedNormal(0.0, 1.0, low=4.0), [4.0001, 5.0, 8.0]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TAILS)
def test_both_tails_keep_their_digits(name):
    given, places = TAILS[name]
    prior, theta = sf.as_prior(given), jnp.asarray(places)[:, None]
    y = prior.to_standard(theta)
    np.testing.assert_allclose(prior.from_standard(y), theta, rtol=2e-3)
    pushed = prior.log_prob(theta) + prior.standard_log_det(y, theta)
    np.testing.assert_allclose(pushed, norm.logpdf(y[:, 0]), atol=2e-3)
    draws = prior.sample(jax.random.key(0), 4000)
    assert np.std(prior.to_standard(draws)) == pytest.approx(1.0, abs=0.05)
    back = prior.from_standard(prior.to_standard(draws))
    np.testing.assert_allclose(back, draws, rtol=2e-3)


def test_a_density_without_a_survival_function_still_decays():
    prior = sf.as_prior(dist.Gamma(2.0, 3.0))
    theta = jnp.array([[1.0], [10.0], [30.0]])
    y = prior.to_standard(theta)
    density = norm.logpdf(y[:, 0]) - prior.standard_log_det(y, theta)
    np.testing.assert_allclose(density, prior.log_prob(theta), rtol=1e-3)


def test_ordered_draws_that_round_to_ties_are_set_apart():
    wide = dist.Normal(0.0, 3.0).expand([4]).to_event(1)
    prior = sf.as_prior(dist.TransformedDistribution(wide, dist.transforms.OrderedTransform()))
    assert np.all(prior.contains(prior.sample(jax.random.key(0), 20_000)))


def test_a_folded_distribution_goes_through_its_support():
    prior = sf.as_prior(dist.FoldedDistribution(dist.Normal(1.0, 1.0)))
    theta = prior.sample(jax.random.key(0), 50)
    np.testing.assert_allclose(prior.from_standard(prior.to_standard(theta)), theta, rtol=1e-3)


def test_no_rows_have_no_densities():
    prior = cases.prior("dict")
    assert prior.log_prob(jnp.zeros((0, prior.dim))).shape == (0,)


ROUNDED = {
    "gamma": lambda: dist.Gamma(0.01, 1.0),
    "beta": lambda: dist.Beta(jnp.full(2, 0.01), 0.01),
    "below 1": lambda: dist.TransformedDistribution(
        dist.Gamma(0.01, 1.0),
        dist.transforms.AffineTransform(1.0, -1.0, domain=dist.constraints.positive),
    ),
    "lognormal": lambda: dist.LogNormal(0.0, 50.0),
    "dict": lambda: {"a": dist.Gamma(0.01, 1.0).expand([2]).to_event(1), "b": dist.Normal(0, 1)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUNDED)
def test_draws_that_round_to_a_bound_stay_inside(name):
    prior = sf.as_prior(ROUNDED[name]())
    theta = prior.sample(jax.random.key(0), 1000)
    assert np.all(prior.contains(theta))
    assert np.all(np.isfinite(prior.log_prob(theta)))


OUTSIDE = {
    "uniform": [[-2.1, 0.0], [0.0, 5.1], [jnp.nan, 0.0], [jnp.inf, 0.0]],
    "uniform, own faces": [[0.2, 7.1], [0.4, 0.0]],
    "normal": [[jnp.nan], [jnp.inf]],
    "lognormal": [[-1.0, 1.0]],
    "negative lognormal": [[2.0]],
    "truncated on both sides": [[1.3], [-0.1]],
    "simplex": [[0.5, 0.5, 0.5], [1.2, -0.1, -0.1]],
    "ordered": [[2.0, 1.0, 3.0]],
    "dict": [[-1.0, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0], [1.0, 0.5, 0.5, 0.5, 1.5, 0.0, 0.0]],
    "model": [[0.0, 0.0, 0.0, -1.0]],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_the_support_the_density_is_zero(name):
    prior = cases.prior(name)
    theta = jnp.asarray(OUTSIDE[name])
    assert not np.any(prior.contains(theta))
    np.testing.assert_array_equal(prior.log_prob(theta), -np.inf)
    assert prior.log_prob(prior.center()) > -np.inf


def test_gradients_are_finite_outside_too():
    prior = cases.prior("dict")
    rows = jnp.asarray([*OUTSIDE["dict"], *np.asarray(prior.center((2,)))])
    assert np.all(np.isfinite(jax.grad(lambda t: jnp.sum(prior.log_prob(t)[2:]))(rows)))


def test_labels_name_every_entry():
    assert cases.prior("normal").labels == ("theta",)
    assert cases.prior("uniform").labels == ("theta[0]", "theta[1]")
    prior = cases.prior("dict")
    assert prior.names == ("rate", "p", "offset")
    entries = ("p[0,0]", "p[0,1]", "p[1,0]", "p[1,1]")
    assert prior.labels == ("rate", *entries, "offset[0]", "offset[1]")
    assert prior.event_shapes == {"rate": (), "p": (2, 2), "offset": (2,)}
    assert cases.prior("model").labels == ("level", "effect[0]", "effect[1]", "noise")
    assert repr(prior) == "Prior(rate: LogNormal[], p: Uniform[2, 2], offset: Normal[2])"


def test_intervals_are_bounded_and_half_lines_are_not():
    assert cases.prior("dict").bounded == (False, True, True, True, True, False, False)
    assert cases.prior("beta").bounded == (True,)
    assert cases.prior("truncated below").bounded == (False,)


def test_supports_of_fewer_degrees_of_freedom():
    assert (cases.prior("simplex").dim, cases.prior("simplex").standard_dim) == (3, 2)
    factor = cases.prior("Cholesky factor")
    assert (factor.dim, factor.standard_dim) == (9, 3)
    assert factor.labels[:4] == ("theta[0,0]", "theta[0,1]", "theta[0,2]", "theta[1,0]")


def test_the_simulator_gets_an_array_or_the_named_dict():
    assert cases.prior("uniform").structured(jnp.zeros((5, 2))).shape == (5, 2)
    assert cases.prior("normal").structured(jnp.zeros(1)).shape == ()
    named = cases.prior("dict").structured(jnp.zeros(7))
    assert {n: v.shape for n, v in named.items()} == {"rate": (), "p": (2, 2), "offset": (2,)}


def test_draws_of_a_model_keep_its_dependence():
    theta = cases.prior("model").sample(jax.random.key(0), 4000)
    level, effect = theta[:, 0], theta[:, 1]
    assert abs(np.corrcoef(level, effect)[0, 1] - 2 / np.hypot(2, 0.5)) < 0.03
    assert abs(np.std(effect - level) - 0.5) < 0.03


def test_draws_follow_the_key_and_arrays_of_numpy_are_accepted():
    prior = cases.prior("dict")
    first, same, other = (prior.sample(jax.random.key(seed), 4) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.any(first == other)
    theta = np.asarray(first)
    np.testing.assert_array_equal(prior.log_prob(theta), prior.log_prob(first))
    assert np.all(prior.contains(theta))
    np.testing.assert_array_equal(prior.flatten(prior.unflatten(theta)), theta)


def test_a_prior_is_returned_unchanged():
    prior = cases.prior("dict")
    assert sf.as_prior(prior) is prior


def observed_site():
    numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.sample("b", dist.Normal(0.0, 1.0), obs=1.0)


def dependent_support():
    a = numpyro.sample("a", dist.Uniform(0.0, 1.0))
    numpyro.sample("b", dist.Uniform(0.0, a))


def discrete_site():
    numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.sample("count", dist.Poisson(3.0))


def no_sites():
    numpyro.deterministic("a", 1.0)


REFUSED = {
    "discrete": (lambda: dist.Poisson(3.0), "'theta': expected a continuous .* discrete Poisson"),
    "discrete in a dict": (
        lambda: {"a": dist.Normal(0.0, 1.0), "k": dist.Bernoulli(0.3).expand([2])},
        "'k': expected a continuous distribution, got the discrete Bernoulli",
    ),
    "discrete in a model": (lambda: discrete_site, "'count': expected a continuous .* Poisson"),
    "observed site": (lambda: observed_site, r"latent sample sites only, got observed \['b'\]"),
    "dependent support": (lambda: dependent_support, "'b': its support depends on another"),
    "no sites": (lambda: no_sites, "expected at least one sample site, got none"),
    "empty dict": (dict, "expected at least one parameter, got an empty dict"),
    "number in a dict": (lambda: {"a": 3.0}, r"prior\['a'\]: expected a str name .* got float"),
    "name of another type": (lambda: {1: dist.Normal(0.0, 1.0)}, r"prior\[1\]: expected a str"),
    "another type": (lambda: 3.0, "expected a numpyro Distribution, a dict .* got float"),
    "a list": (lambda: [dist.Normal(0.0, 1.0)], "expected a numpyro Distribution, .* got list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_prior_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        sf.as_prior(make())


@pytest.mark.parametrize("method", ["log_prob", "contains", "unflatten", "to_standard"])
def test_vectors_of_the_wrong_length_are_refused(method):
    prior = cases.prior("uniform")
    for theta in (jnp.zeros(3), jnp.zeros((2, 1)), jnp.zeros(())):
        with pytest.raises(ValueError, match=r"theta: expected shape \(\*, 2\) for .*theta\[0\]"):
            getattr(prior, method)(theta)


@pytest.mark.parametrize("method", ["log_prob", "contains", "unflatten", "to_standard"])
def test_vectors_that_are_not_real_are_refused(method):
    for theta in (np.array([0.1, 1j]), np.array(["a", "b"]), np.array([None, 1.0])):
        with pytest.raises(ValueError, match="theta: expected real numbers, got dtype"):
            getattr(cases.prior("uniform"), method)(theta)


def test_whole_numbers_and_double_precision_are_real():
    prior = cases.prior("dict")
    theta = np.array([1, 0, 1, 0, 1, 2, 5])
    for given in (theta, theta.astype(float), jnp.asarray(theta)):
        np.testing.assert_array_equal(prior.log_prob(given), prior.log_prob(theta / np.float32(1)))
        assert prior.contains(given)
        assert prior.to_standard(given).dtype == jnp.float32


def test_values_that_do_not_fit_are_refused():
    prior = cases.prior("dict")
    values = prior.unflatten(prior.center())
    with pytest.raises(ValueError, match=r"expected parameters \['offset', 'p', 'rate'\], got"):
        prior.flatten({"rate": values["rate"]})
    with pytest.raises(ValueError, match=r"p: expected shape \(\*, \*\(2, 2\)\), got \(4,\)"):
        prior.flatten({**values, "p": jnp.zeros(4)})


NOT_FINITE = {
    "scale": (lambda: dist.Normal(0.0, np.inf), "finite numbers as scale of Normal, got inf"),
    "entry": (
        lambda: {"a": dist.Normal(np.zeros(2), np.array([1.0, np.inf]))},
        r"'a': expected finite numbers as scale of Normal, got \[ *1. *inf\]",
    ),
    "base": (
        lambda: dist.Gamma(np.inf, 1.0).expand([2]).to_event(1),
        "finite numbers as concentration of Gamma, got inf",
    ),
    "precision": (lambda: dist.HalfNormal(1e300), "finite numbers as scale of .*Normal, got 1e"),
    "transform": (
        lambda: dist.TransformedDistribution(
            dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(np.inf, 1.0)
        ),
        "finite numbers as a parameter of AffineTransform, got inf",
    ),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_parameters_that_are_not_finite_are_refused(name):
    make, message = NOT_FINITE[name]
    with pytest.raises(ValueError, match=message):
        sf.as_prior(make())


def test_a_truncated_distribution_may_have_an_infinite_bound():
    bounds = {"low": np.array([0.0, -np.inf]), "high": np.array([np.inf, 1.0])}
    prior = sf.as_prior(dist.TruncatedNormal(np.zeros(2), 1.0, **bounds))
    theta = prior.sample(jax.random.key(0), 100)
    assert np.all(prior.contains(theta)) and np.all(np.isfinite(prior.log_prob(theta)))
