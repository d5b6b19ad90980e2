"""Tasks to try simulation-based inference on: benchmark problems and one with real data."""

from simulators.bernoulli_glm import bernoulli_glm as bernoulli_glm
from simulators.bernoulli_glm import bernoulli_glm_raw as bernoulli_glm_raw
from simulators.eight_schools import eight_schools as eight_schools
from simulators.external import executable as executable
from simulators.external import external_simulator as external_simulator
from simulators.gaussian_linear import gaussian_linear as gaussian_linear
from simulators.gaussian_linear_uniform import gaussian_linear_uniform as gaussian_linear_uniform
from simulators.gaussian_mixture import gaussian_mixture as gaussian_mixture
from simulators.influenza import influenza as influenza
from simulators.influenza import influenza_ode as influenza_ode
from simulators.lotka_volterra import lotka_volterra as lotka_volterra
from simulators.lynx_hare import lynx_hare as lynx_hare
from simulators.numpyro_model import from_numpyro as from_numpyro
from simulators.registry import get as get
from simulators.registry import list as list
from simulators.registry import names as names
from simulators.sir import sir as sir
from simulators.slcp import slcp as slcp
from simulators.slcp_distractors import slcp_distractors as slcp_distractors
from simulators.task import ReferenceFailed as ReferenceFailed
from simulators.task import Task as Task
from simulators.two_moons import two_moons as two_moons
