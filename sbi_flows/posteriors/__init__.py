"""The posteriors package: direct, composed, encoded, recalibrated and conformal posteriors.

Other packages of the library import from the modules of this package. Users write
`sf.posteriors.X` for a public name X of a module.
"""

from sbi_flows.posteriors.adapter import ExternalPosterior as ExternalPosterior
from sbi_flows.posteriors.adapter import as_posterior as as_posterior
from sbi_flows.posteriors.base import AbstractPosterior as AbstractPosterior
from sbi_flows.posteriors.bound import AtObservation as AtObservation
from sbi_flows.posteriors.composed import ComposedPosterior as ComposedPosterior
from sbi_flows.posteriors.composed import composed as composed
from sbi_flows.posteriors.composed import sample_composed as sample_composed
from sbi_flows.posteriors.conformal import ConformalPosterior as ConformalPosterior
from sbi_flows.posteriors.conformal import conformal as conformal
from sbi_flows.posteriors.derived import Derived as Derived
from sbi_flows.posteriors.direct import Posterior as Posterior
from sbi_flows.posteriors.encoded import EncodedPosterior as EncodedPosterior
from sbi_flows.posteriors.numpyro import PosteriorDistribution as PosteriorDistribution
from sbi_flows.posteriors.reading import load as load
from sbi_flows.posteriors.recalibrated import RecalibratedPosterior as RecalibratedPosterior
from sbi_flows.posteriors.recalibrated import recalibrate as recalibrate
