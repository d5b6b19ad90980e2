"""Figures with matplotlib. All functions take plain arrays."""

from sbi_flows.plots.calibration import coverage_curve as coverage_curve
from sbi_flows.plots.calibration import rank_ecdf as rank_ecdf
from sbi_flows.plots.posterior import corner as corner
from sbi_flows.plots.posterior import predictive as predictive
from sbi_flows.plots.training import loss_curves as loss_curves
