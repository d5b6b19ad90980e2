"""The prior: named parameters, a flat vector, and a bijection to standard coordinates.

Import `Prior`, `PriorLike` and `as_prior` from here.
"""

from sbi_flows.prior.prior import Prior as Prior
from sbi_flows.prior.prior import PriorLike as PriorLike
from sbi_flows.prior.prior import as_prior as as_prior
from sbi_flows.prior.prior import labels as labels
