"""The draw pass agrees with NumPy, in one chunk and in several."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import Array

from sbi_flows.core.errors import SbiFlowsError
from sbi_flows.diagnostics import ranks
from sbi_flows.diagnostics.ranks import Ranks, draw_pass
from sbi_flows.diagnostics.references import References, crude_posterior, prior_scale
from sbi_flows.diagnostics.sharpness import sharpness_of
from sbi_flows.posteriors import passes
from sbi_flows.prior.prior import Prior, as_prior
from sbi_flows.simulations.simulations import Simulations

N, D, DRAWS = 70, 2, 20


@dataclasses.dataclass
class Grid:
    """Posterior with fixed draws around x, whatever the key; density decreases with distance."""

    prior: Prior
    sizes: list[int] = dataclasses.field(default_factory=list)

    def sample_and_log_prob(self, key: Array, x: Array, n: int) -> tuple[Array, Array]:
        assert jnp.all(jnp.isfinite(x))
        self.sizes.append(len(x))
        draws = x[:, None] + jnp.linspace(-1.0, 1.0, n)[None, :, None] * jnp.array([[[1.0, 2.0]]])
        return draws, self.log_prob(draws, x)

    def sample(self, key: Array, x: Array, n: int) -> Array:
        return self.sample_and_log_prob(key, x, n)[0]

    def log_prob(self, theta: Array, x: Array) -> Array:
        x = x[:, None] if theta.ndim > x.ndim else x
        return -jnp.sum((theta - x) ** 2, axis=-1)


@pytest.fixture
def posterior():
    return Grid(as_prior(dist.Normal(0, 1).expand([D])))


@pytest.fixture(scope="module")
def simulations():
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(N + 5, D))
    x = theta + 0.5 * rng.normal(size=theta.shape)
    x[[3, 10, 11, 40, N + 4]] = np.nan
    return Simulations(theta, x)


def test_pass_is_what_numpy_counts(posterior, simulations):
    points, scale = np.ones((N, D)), np.array([1.0, 3.0])
    result = draw_pass(
        jax.random.key(0),
        posterior,
        simulations,
        draws=DRAWS,
        references=References(points, scale),
        halves=True,
    )
    valid = simulations.only_valid()
    theta, x = np.asarray(valid.theta)[:, None], np.asarray(valid.x)
    draws, log_prob = map(np.asarray, posterior.sample_and_log_prob(None, valid.x, DRAWS))
    log_truth = np.asarray(posterior.log_prob(valid.theta, valid.x))
    away, truth_away = (np.sum(((a - 1.0) / scale) ** 2, axis=-1) for a in (draws, theta))

    def integer(uniform):
        return np.floor(uniform * (DRAWS + 1)).astype(int)

    assert len(x) == N and result.num_failed == 5
    assert (integer(result.uniform) == np.sum(draws < theta, axis=1)).all()
    assert (integer(result.density) == np.sum(log_prob > log_truth[:, None], axis=1)).all()
    assert (integer(result.distance) == np.sum(away < truth_away, axis=1)).all()
    np.testing.assert_allclose(result.mean, draws.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(result.sd, draws.std(axis=1), rtol=1e-5)
    np.testing.assert_allclose(result.log_prob, log_truth, rtol=1e-5)
    first, other = draws[:, : DRAWS // 2], draws[:, DRAWS // 2 :]
    half = np.floor(result.half.uniform * (DRAWS // 2 + 1)).astype(int)
    assert (half == np.sum(first < theta, axis=1)).all()
    # the first residual is the first parameter; the second is the residual of a regression
    slope = [np.cov(each.T)[0, 1] / np.var(each[:, 0], ddof=1) for each in other]
    slope = np.array(slope)[:, None]
    second = first[..., 1] - slope * first[..., 0]
    residual = np.floor(result.half.residual * (DRAWS // 2 + 1)).astype(int)
    below = np.sum(second < theta[..., 1] - slope * theta[..., 0], axis=1)
    assert (residual[:, 0] == half[:, 0]).mean() > 0.99
    assert np.abs(residual[:, 1] - below).max() <= 1
    np.testing.assert_allclose(result.half.mean, other.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(result.half.sd, other.std(axis=1), rtol=1e-4)


def test_chunks_of_one_shape_change_nothing(posterior, simulations, monkeypatch):
    whole = draw_pass(jax.random.key(0), posterior, simulations, draws=DRAWS)
    assert posterior.sizes == [N]
    monkeypatch.setattr(passes, "MAX_CHUNK_ENTRIES", 25 * DRAWS * D)
    split = draw_pass(jax.random.key(0), posterior, simulations, draws=DRAWS)
    assert posterior.sizes[1:] == [24, 24, 24]
    for name in ("uniform", "density", "log_prob", "mean", "sd", "theta"):
        np.testing.assert_allclose(getattr(split, name), getattr(whole, name), rtol=1e-6)


def test_a_posterior_with_its_own_regions_ranks_no_densities(posterior, simulations):
    levels = np.linspace(0.01, 0.99, N)
    posterior.credible_levels = lambda key, theta, x: levels
    calls = []
    log_prob = posterior.log_prob
    posterior.log_prob = lambda theta, x: calls.append(theta.shape) or log_prob(theta, x)
    result = draw_pass(jax.random.key(0), posterior, simulations, draws=DRAWS)
    np.testing.assert_array_equal(result.density, levels)
    assert result.log_prob is None
    assert calls == [(N, DRAWS, D)]  # by `Grid.sample` itself


def test_a_posterior_that_gives_nan_is_an_error(posterior, simulations, monkeypatch):
    monkeypatch.setattr(
        Grid, "log_prob", lambda self, theta, x: jnp.full(theta.shape[:-1], jnp.nan)
    )
    with pytest.raises(SbiFlowsError, match=f"the posterior of {N} of {N} data sets gave NaN"):
        draw_pass(jax.random.key(0), posterior, simulations, draws=DRAWS)


def test_bad_input_is_refused(posterior, simulations):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="draws: expected at least 20, got 10"):
        draw_pass(key, posterior, simulations, draws=10)
    with pytest.raises(ValueError, match="at least 50 that succeeded, got 37 of 41"):
        draw_pass(key, posterior, simulations[:41], draws=DRAWS)
    wrong = References(np.zeros((75, D)), np.ones(D))
    with pytest.raises(ValueError, match=r"references: expected shape \(70, 2\), got \(75, 2\)"):
        draw_pass(key, posterior, simulations, draws=DRAWS, references=wrong)
    narrow = Simulations(np.zeros((60, 1)), np.zeros((60, 1)))
    with pytest.raises(ValueError, match=r"expected 2 parameters .*theta\[1\].* got 1"):
        draw_pass(key, posterior, narrow, draws=DRAWS)


def test_crude_posterior_follows_the_data_whatever_its_units():
    rng = np.random.default_rng(1)
    theta = np.exp(2 * rng.normal(size=(400, 2)))
    loud = {"a": 1e6 * theta[:, :1] ** 3, "b": rng.normal(size=(400, 1)), "c": np.ones((400, 2))}
    points = crude_posterior(jax.random.key(0), Simulations(theta, loud))
    near, far = rank_correlations(points, theta)
    assert near > 0.6 and abs(far) < 0.2  # x depends on the first parameter only


def rank_correlations(points, theta):
    ranks = np.argsort(np.argsort(np.concatenate([points, theta], axis=1), axis=0), axis=0)
    matrix = np.corrcoef(ranks.T)
    return matrix[0, 2], matrix[1, 3]


def test_a_reference_does_not_depend_on_its_own_truth():
    rng = np.random.default_rng(2)
    theta, x = rng.normal(size=(2, 100, 1))
    base = crude_posterior(jax.random.key(0), Simulations(theta, x))
    moved = theta.copy()
    moved[7] += 0.01 * np.sign(moved[7])  # does not change median and quartiles
    other = crude_posterior(jax.random.key(0), Simulations(moved, x))
    assert other[7] == base[7]
    assert (other != base).any()


def test_prior_scale_of_a_heavy_tail_and_of_a_constant():
    rng = np.random.default_rng(3)
    scale = prior_scale(np.c_[rng.normal(0, 3, 4000), rng.standard_cauchy(4000), np.ones(4000)])
    assert scale == pytest.approx([3.0, 2 / 1.349, 1.0], rel=0.1)


def test_one_posterior_with_a_huge_variance_does_not_dominate_the_contraction():
    rng = np.random.default_rng(0)
    sd = np.full((100, 1), 0.1, np.float32)
    sd[7] = 1e6
    theta = rng.normal(size=(100, 1))
    none = np.zeros((100, 1))
    ranks = Ranks(theta, none, None, None, None, None, theta, sd, 500, ("a",), 0)
    assert sharpness_of(ranks).contraction[0] == pytest.approx(0.99, abs=0.01)


def test_fewer_densities_are_ranked_if_each_needs_an_ode(posterior, simulations):
    asked = []
    log_prob = posterior.log_prob

    def counted(theta, x):
        asked.append(theta.shape[1:-1])
        return log_prob(theta, x)

    posterior.log_prob = counted
    for needs_ode, count in ((False, DRAWS), (True, ranks.ODE_DENSITY_DRAWS)):
        posterior.needs_ode = needs_ode
        # `Grid.sample` calls log_prob once; the two later calls are made by `draw_pass`
        asked.clear()
        result = draw_pass(jax.random.key(0), posterior, simulations, draws=DRAWS)
        assert asked[1:] == [(count,), (1,)]
        # each entry is random within a step of 1 / (count + 1)
        theta, x = simulations.only_valid().theta, simulations.only_valid().x
        draws = posterior.sample(jax.random.key(0), x, DRAWS)[:, :count]
        denser = np.sum(log_prob(draws, x) > log_prob(theta, x)[:, None], axis=1)
        np.testing.assert_array_equal(np.floor(result.density * (count + 1)), denser)
