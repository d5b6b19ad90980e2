"""Posteriors: draws, densities and modes for one observation or a batch of them."""

from sbi_flows.posteriors.direct import Posterior as Posterior
