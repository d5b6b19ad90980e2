"""Flax NNX networks: embeddings of observations, and the networks inside densities."""

from sbi_flows.networks.conditioner import Conditioned as Conditioned
from sbi_flows.networks.conditioner import Conditioner as Conditioner
from sbi_flows.networks.graph import PointCloud as PointCloud
from sbi_flows.networks.mlp import ResidualMLP as ResidualMLP
from sbi_flows.networks.tokens import Tokens as Tokens
from sbi_flows.networks.velocity import Film as Film
