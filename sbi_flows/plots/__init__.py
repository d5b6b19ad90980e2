"""Figures of values, with matplotlib; no function here knows a posterior or a report."""

from sbi_flows.plots.figures import corner as corner
from sbi_flows.plots.figures import coverage_curve as coverage_curve
from sbi_flows.plots.figures import loss_curves as loss_curves
from sbi_flows.plots.figures import predictive as predictive
from sbi_flows.plots.figures import rank_ecdf as rank_ecdf
