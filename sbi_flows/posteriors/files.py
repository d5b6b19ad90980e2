"""Old place of `load` and `save`; see `reading` and `writing`."""

from sbi_flows.posteriors.reading import load as load
from sbi_flows.posteriors.writing import save as save
