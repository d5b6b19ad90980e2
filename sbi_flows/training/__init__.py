"""Training: all members of an ensemble side by side, one compiled program for each epoch."""

from sbi_flows.training.data import FitKeys as FitKeys
from sbi_flows.training.data import TrainingData as TrainingData
from sbi_flows.training.fitting import fit as fit
from sbi_flows.training.history import History as History
from sbi_flows.training.settings import Training as Training
from sbi_flows.training.stream import Stream as Stream
