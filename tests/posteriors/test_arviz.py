"""Chains and groups of ArviZ data, and names that ArviZ or netCDF files reserve or forbid."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.posteriors.adapter import as_posterior
from sbi_flows.posteriors.arviz import Groups, arviz_groups
from sbi_flows.prior.prior import as_prior


def groups(prior):
    draws = prior.sample(jax.random.key(0), 8)
    return Groups(draws, np.zeros(8), draws[:4], np.zeros(3))


def test_slashes_become_underscores_in_files(tmp_path):
    prior = sf.as_prior({"rate/s": dist.Normal(0, 1), " b ": dist.Normal(0, 1).expand([2])})
    with pytest.warns(sf.SbiFlowsWarning, match="'rate/s' to 'rate_s', ' b ' to 'b'"):
        data = arviz_groups(prior, groups(prior), coords=None, dims={"b": ["axis"]})
    path = tmp_path / "data.nc"
    data.to_netcdf(path)
    assert data["posterior"]["rate_s"].shape == (4, 2)
    np.testing.assert_array_equal(
        np.swapaxes(data["posterior"]["b"].values, 0, 1).reshape(8, 2), groups(prior).draws[:, 1:]
    )
    assert path.stat().st_size > 0


def test_names_that_become_equal_are_refused():
    prior = sf.as_prior({"a/b": dist.Normal(0, 1), "a_b": dist.Normal(0, 1)})
    with pytest.raises(ValueError, match="names that differ when slashes become underscores"):
        arviz_groups(prior, groups(prior), coords=None, dims=None)


@pytest.mark.parametrize("name", ["chain", "draw"])
def test_names_of_axes_are_refused_when_a_prior_is_made(name):
    with pytest.raises(ValueError, match=f"names other than chain and draw, .* got '{name}'"):
        sf.as_prior({name: dist.Normal(0, 1)})


PRIOR = {"rate": dist.Normal(0, 1), "b": dist.Normal(0, 1).expand([2]), "a": dist.Normal(0, 1)}


def simulated_groups(valid=True, n=4_000, m=1_000):
    """Independent draws whose density and simulation are known functions of the draw."""
    prior = sf.as_prior(PRIOR)
    draws = np.asarray(prior.sample(jax.random.key(1), n))
    x = np.c_[draws[:m, 0], 2 * draws[:m, 3]]
    valid = np.broadcast_to(valid(draws[:m]) if callable(valid) else valid, m)
    sims = sf.Simulations(draws[:m], x, valid=valid)
    return prior, Groups(draws, -draws[:, 0], draws[:100], np.array([0.5, -1.0]), sims)


def require_predictions_at_their_draws(data):
    """Raise AssertionError unless each prediction was made at the posterior draw of its place."""
    predicted, drawn = data["posterior_predictive"]["x"], data["posterior"]
    at = drawn.sel(draw=predicted["draw"], chain=predicted["chain"])
    np.testing.assert_array_equal(predicted[..., 0], at["rate"])
    np.testing.assert_array_equal(predicted[..., 1], 2 * at["a"])


def test_independent_draws_are_four_chains_in_the_order_of_the_prior():
    import arviz

    prior, groups = simulated_groups()
    data = arviz_groups(prior, groups)
    drawn = data["posterior"]
    assert list(drawn.data_vars) == list(data["prior"].data_vars) == ["rate", "b", "a"]
    assert drawn["b"].shape == (4, 1_000, 2) and data["prior"]["b"].shape == (1, 100, 2)
    np.testing.assert_array_equal(data["sample_stats"]["lp"], -drawn["rate"])
    np.testing.assert_array_equal(np.sort(drawn["a"].values.ravel()), np.sort(groups.draws[:, 3]))
    summary = arviz.summary(data)
    assert list(summary.index) == ["rate", "b[0]", "b[1]", "a"]
    assert np.all(summary["r_hat"].astype(float) < 1.01)
    assert np.all(summary["ess_bulk"].astype(float) > 3_000)
    assert data["posterior_predictive"]["x"].shape == (4, 250, 2)
    require_predictions_at_their_draws(data)


@pytest.mark.filterwarnings("ignore:x. .* rows contain NaN")
def test_predictions_of_failed_simulations_are_left_out_and_chains_stay_stationary():
    import arviz

    prior, groups = simulated_groups(lambda theta: theta[:, 0] < 0.3, m=4_000)
    data = arviz_groups(prior, groups)
    valid = int(groups.simulated.num_valid)
    assert data["posterior_predictive"]["x"].shape == (4, valid // 4, 2)
    assert data["posterior_predictive"]["x"].values[..., 0].max() < 0.3
    require_predictions_at_their_draws(data)
    np.testing.assert_array_equal(data["sample_stats"]["lp"], -data["posterior"]["rate"])
    np.testing.assert_array_equal(
        np.sort(data["posterior"]["a"].values.ravel()), np.sort(groups.draws[:, 3])
    )
    assert np.all(arviz.summary(data)["r_hat"].astype(float) < 1.01)


def test_arviz_draws_the_predictions():
    import arviz
    import matplotlib.pyplot as plt

    prior, groups = simulated_groups(n=200, m=80)
    data = arviz_groups(prior, groups, chains=2)
    arviz.plot_ppc(data, num_pp_samples=20, random_seed=0)
    plt.close("all")


def test_chains_of_other_lengths_are_refused():
    prior, groups = simulated_groups(n=10, m=4)
    message = "n: expected a multiple of the number of chains, 4, got 10"
    with pytest.raises(ValueError, match=message):
        arviz_groups(prior, groups)
    with pytest.raises(ValueError, match="chains: expected a whole number of at least 1, got 0"):
        arviz_groups(prior, groups, chains=0)
    prior, groups = simulated_groups(lambda theta: np.arange(len(theta)) < 3, n=16, m=8)
    with pytest.raises(sf.SimulationFailed, match=r"at least 4 valid simulations, .* got 3 of 8"):
        arviz_groups(prior, groups)


class Alternating:
    """Draws of two members that alternate, as those of an ensemble do."""

    def __init__(self):
        self.prior = as_prior({"a": dist.Normal(0.0, 1.0)})

    def sample(self, key, x, n):
        return self.sample_and_log_prob(key, x, n)[0]

    def sample_and_log_prob(self, key, x, n):
        noise = 0.5 * jax.random.normal(key, (*jnp.shape(x)[:-1], n, 1))
        sign = jnp.reshape(jnp.where(jnp.arange(n) % 2 == 0, 1.0, -1.0), (n, 1))
        draws = noise + jnp.broadcast_to(sign, noise.shape)
        return draws, self.log_prob(draws, x)

    def log_prob(self, theta, x):
        return -0.5 * theta[..., 0] ** 2


def test_each_chain_has_draws_of_all_members():
    posterior = as_posterior(Alternating(), jax.ShapeDtypeStruct((2,), jnp.float32))
    data = posterior.to_arviz(jax.random.key(0), jnp.zeros(2), n=2_000)
    chains = np.asarray(data["posterior"]["a"])
    np.testing.assert_allclose(chains.mean(axis=1), 0.0, atol=0.2)
    np.testing.assert_allclose(data["sample_stats"]["lp"], -0.5 * chains**2, rtol=1e-5)
