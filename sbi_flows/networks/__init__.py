"""Flax NNX networks: embeddings of observations, and the networks inside densities."""

from sbi_flows.networks.conditioner import Conditioned as Conditioned
from sbi_flows.networks.conditioner import Conditioner as Conditioner
from sbi_flows.networks.embeddings.base import EmbeddingSettings as EmbeddingSettings
from sbi_flows.networks.embeddings.conv import ConvNet as ConvNet
from sbi_flows.networks.embeddings.deep_set import DeepSet as DeepSet
from sbi_flows.networks.embeddings.fusion import Fusion as Fusion
from sbi_flows.networks.embeddings.series import SeriesNet as SeriesNet
from sbi_flows.networks.embeddings.set_transformer import SetTransformer as SetTransformer
from sbi_flows.networks.graph import PointCloud as PointCloud
from sbi_flows.networks.mlp import ResidualMLP as ResidualMLP
from sbi_flows.networks.tokens import Tokens as Tokens
from sbi_flows.networks.velocity import Film as Film
