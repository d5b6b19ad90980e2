"""Estimators: frozen descriptions that turn simulations into a posterior."""

from sbi_flows.estimators.base import Estimator as Estimator
from sbi_flows.estimators.distillation import distil as distil
from sbi_flows.estimators.emulator import Emulator as Emulator
from sbi_flows.estimators.encoded import Encoded as Encoded
from sbi_flows.estimators.npe import NPE as NPE
from sbi_flows.estimators.stack import Stack as Stack
from sbi_flows.estimators.truncated import Round as Round
from sbi_flows.estimators.truncated import truncated_rounds as truncated_rounds
