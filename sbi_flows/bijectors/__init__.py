"""Bijectors behind the distrax interface."""

from sbi_flows.bijectors.autoregressive import Autoregressive as Autoregressive
from sbi_flows.bijectors.coupling import Coupling as Coupling
from sbi_flows.bijectors.linear import LULinear as LULinear
from sbi_flows.bijectors.linear import lu as lu
from sbi_flows.bijectors.repeated import Repeated as Repeated
from sbi_flows.bijectors.spline import RationalQuadraticSpline as RationalQuadraticSpline
from sbi_flows.bijectors.support import Support as Support
from sbi_flows.bijectors.truncated import TruncatedAutoregression as TruncatedAutoregression
