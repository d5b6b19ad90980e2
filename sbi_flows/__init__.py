"""Neural spline flows as neural posterior estimators, in JAX.

prior + simulator -> Simulations -> estimator.fit -> Posterior -> diagnostics, plots, ArviZ
"""

from sbi_flows.data import Simulations as Simulations
from sbi_flows.data import simulate as simulate
from sbi_flows.data import simulate_at as simulate_at
from sbi_flows.densities.flow import MAF as MAF
from sbi_flows.densities.flow import NSF as NSF
from sbi_flows.densities.mixture import GaussianMixture as GaussianMixture
from sbi_flows.diagnostics import Report as Report
from sbi_flows.diagnostics import c2st as c2st
from sbi_flows.diagnostics import c2st_jax as c2st_jax
from sbi_flows.diagnostics import check as check
from sbi_flows.diagnostics import coverage as coverage
from sbi_flows.diagnostics import predictive_check as predictive_check
from sbi_flows.diagnostics import sbc as sbc
from sbi_flows.diagnostics import tarp as tarp
from sbi_flows.errors import SbiFlowsError as SbiFlowsError
from sbi_flows.errors import SbiFlowsWarning as SbiFlowsWarning
from sbi_flows.errors import SimulationFailed as SimulationFailed
from sbi_flows.errors import TrainingDiverged as TrainingDiverged
from sbi_flows.estimators.emulator import Emulator as Emulator
from sbi_flows.estimators.npe import NPE as NPE
from sbi_flows.estimators.stack import Stack as Stack
from sbi_flows.networks.mlp import ResidualMLP as ResidualMLP
from sbi_flows.posteriors import Posterior as Posterior
from sbi_flows.prior import Prior as Prior
from sbi_flows.prior import as_prior as as_prior
from sbi_flows.training import History as History
from sbi_flows.training import Training as Training
