"""Tasks to try simulation-based inference on: benchmark problems and one with real data."""

from simulators.gaussian_linear import gaussian_linear as gaussian_linear
from simulators.gaussian_linear_uniform import gaussian_linear_uniform as gaussian_linear_uniform
from simulators.gaussian_mixture import gaussian_mixture as gaussian_mixture
from simulators.lynx_hare import lynx_hare as lynx_hare
from simulators.registry import get as get
from simulators.registry import names as names
from simulators.slcp import slcp as slcp
from simulators.task import ReferenceFailed as ReferenceFailed
from simulators.task import Task as Task
from simulators.two_moons import two_moons as two_moons
