"""Flax NNX networks."""

from sbi_flows.networks.conditioner import Conditioned as Conditioned
from sbi_flows.networks.conditioner import Conditioner as Conditioner
from sbi_flows.networks.mlp import ResidualMLP as ResidualMLP
