"""Bijectors with the interface of distrax; the forward direction maps noise to data."""

from sbi_flows.densities.bijectors.autoregressive import Autoregressive as Autoregressive
from sbi_flows.densities.bijectors.circular import Rotation as Rotation
from sbi_flows.densities.bijectors.coupling import Coupling as Coupling
from sbi_flows.densities.bijectors.linear import LULinear as LULinear
from sbi_flows.densities.bijectors.linear import lu as lu
from sbi_flows.densities.bijectors.repeated import Repeated as Repeated
from sbi_flows.densities.bijectors.spline import RationalQuadraticSpline as RationalQuadraticSpline
from sbi_flows.densities.bijectors.truncated import (
    TruncatedAutoregression as TruncatedAutoregression,
)
