"""Names of parameters that ArviZ or netCDF files reserve or forbid."""

import jax
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.posteriors.arviz import Groups, arviz_groups


def groups(prior):
    draws = prior.sample(jax.random.key(0), 6)
    return Groups(draws, np.zeros(6), draws[:4], np.zeros(3))


def test_slashes_become_underscores_in_files(tmp_path):
    prior = sf.as_prior({"rate/s": dist.Normal(0, 1), " b ": dist.Normal(0, 1).expand([2])})
    with pytest.warns(sf.SbiFlowsWarning, match="'rate/s' to 'rate_s', ' b ' to 'b'"):
        data = arviz_groups(prior, groups(prior), coords=None, dims={"b": ["axis"]})
    path = tmp_path / "data.nc"
    data.to_netcdf(path)
    assert data["posterior"]["rate_s"].shape == (1, 6)
    np.testing.assert_array_equal(data["posterior"]["b"][0], groups(prior).draws[:, 1:])
    assert path.stat().st_size > 0


def test_names_that_become_equal_are_refused():
    prior = sf.as_prior({"a/b": dist.Normal(0, 1), "a_b": dist.Normal(0, 1)})
    with pytest.raises(ValueError, match="names that differ when slashes become underscores"):
        arviz_groups(prior, groups(prior), coords=None, dims=None)


@pytest.mark.parametrize("name", ["chain", "draw"])
def test_names_of_axes_are_refused_when_a_prior_is_made(name):
    with pytest.raises(ValueError, match=f"names other than chain and draw, .* got '{name}'"):
        sf.as_prior({name: dist.Normal(0, 1)})
