"""Training of ensembles of neural networks.

All members of an ensemble are trained at the same time. An epoch is one compiled program.
"""

from sbi_flows.training.data import FitKeys as FitKeys
from sbi_flows.training.data import TrainingData as TrainingData
from sbi_flows.training.fitting import fit as fit
from sbi_flows.training.history import History as History
from sbi_flows.training.settings import Training as Training
from sbi_flows.training.stream import Stream as Stream
