"""Training: all members of an ensemble side by side, a compiled program an epoch."""

from sbi_flows.training.fitting import fit as fit
from sbi_flows.training.history import History as History
from sbi_flows.training.settings import Training as Training
from sbi_flows.training.stream import Stream as Stream
