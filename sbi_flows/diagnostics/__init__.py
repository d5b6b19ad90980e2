"""Checks of a posterior and their reports: calibration, local check, predictions, sensitivity.

Other packages import the names below from here, not from the modules.
"""

from sbi_flows.diagnostics.anomalies import anomalies as anomalies
from sbi_flows.diagnostics.c2st import ClassifierBackend as ClassifierBackend
from sbi_flows.diagnostics.c2st import CompiledMLP as CompiledMLP
from sbi_flows.diagnostics.c2st import SklearnMLP as SklearnMLP
from sbi_flows.diagnostics.c2st import c2st as c2st
from sbi_flows.diagnostics.c2st import c2st_jax as c2st_jax
from sbi_flows.diagnostics.check import check as check
from sbi_flows.diagnostics.coverage import Coverage as Coverage
from sbi_flows.diagnostics.coverage import coverage as coverage
from sbi_flows.diagnostics.discrepancies import Discrepancies as Discrepancies
from sbi_flows.diagnostics.learning_curve import LearningCurve as LearningCurve
from sbi_flows.diagnostics.learning_curve import learning_curve as learning_curve
from sbi_flows.diagnostics.local import check_at as check_at
from sbi_flows.diagnostics.local_report import LocalCheck as LocalCheck
from sbi_flows.diagnostics.predictive import Predictive as Predictive
from sbi_flows.diagnostics.predictive import predictive_check as predictive_check
from sbi_flows.diagnostics.prior_report import PriorSensitivity as PriorSensitivity
from sbi_flows.diagnostics.prior_report import Reweighted as Reweighted
from sbi_flows.diagnostics.report import Report as Report
from sbi_flows.diagnostics.sbc import SBC as SBC
from sbi_flows.diagnostics.sbc import sbc as sbc
from sbi_flows.diagnostics.sensitivity_to_data import DataSensitivity as DataSensitivity
from sbi_flows.diagnostics.sensitivity_to_data import data_sensitivity as data_sensitivity
from sbi_flows.diagnostics.sensitivity_to_prior import prior_sensitivity as prior_sensitivity
from sbi_flows.diagnostics.sharpness import Sharpness as Sharpness
from sbi_flows.diagnostics.tarp import TARP as TARP
from sbi_flows.diagnostics.tarp import tarp as tarp
from sbi_flows.diagnostics.verdict import Finding as Finding
from sbi_flows.diagnostics.verdict import Test as Test
from sbi_flows.observations.misspecification import Anomalies as Anomalies
from sbi_flows.observations.misspecification import Misspecification as Misspecification
