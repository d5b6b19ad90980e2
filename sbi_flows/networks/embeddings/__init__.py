"""Embeddings of observations with a known structure: sets, series, images, and several of these."""

from sbi_flows.networks.embeddings.base import EmbeddingSettings as EmbeddingSettings
from sbi_flows.networks.embeddings.conv import ConvNet as ConvNet
from sbi_flows.networks.embeddings.deep_set import DeepSet as DeepSet
from sbi_flows.networks.embeddings.fixed import Summaries as Summaries
from sbi_flows.networks.embeddings.fusion import Fusion as Fusion
from sbi_flows.networks.embeddings.series import SeriesNet as SeriesNet
from sbi_flows.networks.embeddings.set_transformer import SetTransformer as SetTransformer
