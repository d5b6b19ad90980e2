"""The prior package: named parameters, a flat vector, a bijection to standard coordinates.

Import `Prior`, `PriorLike`, `as_prior`, `constrained` and `labels` from here.
"""

from sbi_flows.prior.base import Prior as Prior
from sbi_flows.prior.base import labels as labels
from sbi_flows.prior.constrained import constrained as constrained
from sbi_flows.prior.prior import PriorLike as PriorLike
from sbi_flows.prior.prior import as_prior as as_prior
