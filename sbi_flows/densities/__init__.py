"""Conditional densities p(z | context): flows, mixtures and continuous flows.

Frozen settings, such as `NSF()`, describe each density. Their method `build` makes a flax module.
The file `conditional.py` combines the module with an embedding of the observation and a linear
start. Code outside this package imports from its files; users write `sf.densities.NSF`.
"""

from sbi_flows.densities.base import Density as Density
from sbi_flows.densities.base import DensitySettings as DensitySettings
from sbi_flows.densities.cnf import CNF as CNF
from sbi_flows.densities.flow import MAF as MAF
from sbi_flows.densities.flow import NSF as NSF
from sbi_flows.densities.matching import Diffusion as Diffusion
from sbi_flows.densities.matching import FlowMatching as FlowMatching
from sbi_flows.densities.mixture import GaussianMixture as GaussianMixture
from sbi_flows.densities.ode import Solver as Solver
from sbi_flows.densities.paths import EDM as EDM
from sbi_flows.densities.paths import VE as VE
from sbi_flows.densities.paths import VP as VP
from sbi_flows.densities.paths import Straight as Straight
from sbi_flows.densities.samplers import Ancestral as Ancestral
from sbi_flows.densities.samplers import Heun as Heun
