"""Neural spline flows as neural posterior estimators, in JAX."""

from sbi_flows.data import Simulations as Simulations
from sbi_flows.data import simulate as simulate
from sbi_flows.prior import Prior as Prior
from sbi_flows.prior import as_prior as as_prior
from sbi_flows.densities.flow import MAF as MAF
from sbi_flows.densities.flow import NSF as NSF
from sbi_flows.densities.mixture import GaussianMixture as GaussianMixture
from sbi_flows.estimators.npe import NPE as NPE
from sbi_flows.posteriors import Posterior as Posterior
from sbi_flows.training import History as History
from sbi_flows.training import Training as Training
