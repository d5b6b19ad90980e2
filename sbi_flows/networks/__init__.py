"""Flax NNX networks: embeddings of observations, and the networks inside densities."""

from sbi_flows.networks.conditioner import Conditioned as Conditioned
from sbi_flows.networks.conditioner import Conditioner as Conditioner
from sbi_flows.networks.mlp import ResidualMLP as ResidualMLP
