"""Tasks of simulation-based inference: standard benchmarks, models of real data, and adapters.

The folders are `tasks` (the standard benchmark tasks), `gallery` (models with real observations)
and `adapters` (the class `Task`, and adapters for external programs and numpyro models).
"""

from simulators.adapters import mcmc as mcmc
from simulators.adapters.external import ExternalSimulator as ExternalSimulator
from simulators.adapters.external import executable as executable
from simulators.adapters.external import external_simulator as external_simulator
from simulators.adapters.numpyro_model import NumpyroTask as NumpyroTask
from simulators.adapters.numpyro_model import from_numpyro as from_numpyro
from simulators.adapters.registry import get as get
from simulators.adapters.registry import list as list
from simulators.adapters.registry import names as names
from simulators.adapters.task import ReferenceFailed as ReferenceFailed
from simulators.adapters.task import Task as Task
from simulators.gallery import lynx_hare_fit as lynx_hare_fit
from simulators.gallery import lynx_hare_model as lynx_hare_model
from simulators.gallery.eight_schools import eight_schools as eight_schools
from simulators.gallery.influenza import influenza as influenza
from simulators.gallery.influenza import influenza_ode as influenza_ode
from simulators.gallery.lynx_hare import lynx_hare as lynx_hare
from simulators.tasks.bernoulli_glm import bernoulli_glm as bernoulli_glm
from simulators.tasks.bernoulli_glm import bernoulli_glm_raw as bernoulli_glm_raw
from simulators.tasks.drift_diffusion import drift_diffusion as drift_diffusion
from simulators.tasks.g_and_k import g_and_k as g_and_k
from simulators.tasks.gaussian_linear import gaussian_linear as gaussian_linear
from simulators.tasks.gaussian_linear_uniform import (
    gaussian_linear_uniform as gaussian_linear_uniform,
)
from simulators.tasks.gaussian_mixture import gaussian_mixture as gaussian_mixture
from simulators.tasks.hodgkin_huxley import hodgkin_huxley as hodgkin_huxley
from simulators.tasks.lens import lens as lens
from simulators.tasks.lotka_volterra import lotka_volterra as lotka_volterra
from simulators.tasks.normal_set import normal_set as normal_set
from simulators.tasks.ornstein_uhlenbeck import ornstein_uhlenbeck as ornstein_uhlenbeck
from simulators.tasks.random_field import random_field as random_field
from simulators.tasks.sensors import sensors as sensors
from simulators.tasks.sir import sir as sir
from simulators.tasks.slcp import slcp as slcp
from simulators.tasks.slcp_distractors import slcp_distractors as slcp_distractors
from simulators.tasks.stochastic_volatility import stochastic_volatility as stochastic_volatility
from simulators.tasks.two_instruments import two_instruments as two_instruments
from simulators.tasks.two_moons import two_moons as two_moons
