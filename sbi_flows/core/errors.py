"""Errors and warnings of the library.

A mistake that is found before any computation starts raises `ValueError`. A problem that appears
during a computation raises `SbiFlowsError` or a subclass of it, so that `except sf.SbiFlowsError`
catches all of them.
"""


class SbiFlowsError(Exception):
    """Base class of errors that appear during a computation.

    The base class itself is raised if no subclass fits, for example if a posterior returns draws or
    densities that are not finite during a calibration or a check. The message names the cause.
    """


class TrainingDiverged(SbiFlowsError):
    """A training or validation loss is NaN or infinite.

    Raised by `fit` and `distil`. Try a smaller `Training(learning_rate=...)`, and look for extreme
    values among the simulations. `state` has the weights of the last epoch with a finite loss.

    Attributes:
        epoch: The first epoch whose loss is not finite, counted from 1.
        state: Posterior with the weights of the last epoch with a finite loss; None if there is no
            such epoch.
    """

    def __init__(self, message: str, *, epoch: int, state: object = None) -> None:
        """Store the number of the epoch, and the posterior with the last finite weights."""
        super().__init__(message)
        self.epoch = epoch
        self.state = state


class SimulationFailed(SbiFlowsError):
    """Too few simulations gave a finite observation.

    Raised by `simulate` if every simulation fails or a worker process cannot load the simulator,
    by fits with fewer than 10 valid simulations, and by checks with fewer than 50. A simulation
    fails if it raises an error or returns NaN or infinity. To find the cause, call the simulator
    with a parameter vector from the message. If the simulator is expected to fail in a part of the
    prior, run more simulations, or use a prior without this part.
    """


class StoreSpoilt(SbiFlowsError):
    """A file of a `SimulationStore` does not have the content that was written.

    Raised if a chunk of simulations cannot be read, and by `SimulationStore.verify` if the checksum
    of a chunk differs. Remove the folder that the message names and call `simulate` with the same
    arguments again; only the missing chunks are simulated.
    """


class StoreBusy(SbiFlowsError):
    """Another process writes to the same `SimulationStore`.

    Raised by `simulate`. Wait until the other process ends, or use another folder.
    """


class CheckpointSpoilt(SbiFlowsError):
    """The file of `Training(checkpoint=...)` does not have the content that was written.

    Raised by `fit` when it resumes from this file. Delete the file; the fit then starts from the
    beginning.
    """


class WeightsUneven(SbiFlowsError):
    """A few draws carry almost all of the importance weight.

    Raised by `Validity.corrected` if the effective sample size is less than a tenth of the number
    of draws; the cause is that nearly all simulations at posterior draws fail. Use a simulator that
    fails less often at these parameters. Raised by `prior_sensitivity` if no posterior draw is in
    the support of the new prior. Use a prior that is closer to the prior of the fit.
    """


class ArtefactError(SbiFlowsError):
    """A file cannot be loaded as a posterior.

    Raised by `load` if the file is not a saved posterior, was changed or truncated, or was written
    by a later version of the library. Also raised if the file needs a `prior` or an `embedding`,
    and this argument is missing or differs from the saved one. The message gives the reason.
    """


class SolveFailed(SbiFlowsError):
    """The ODE of a continuous density was not solved within the allowed number of steps.

    Raised by `sample`, `log_prob` and `sample_and_log_prob` of posteriors with `FlowMatching`,
    `Diffusion` or `CNF`. Allow more steps with `Solver(max_steps=...)`, or ask for less accuracy
    with larger `rtol` and `atol`.

    Attributes:
        values: Return value of the call, with NaN where the ODE was not solved.
    """

    def __init__(self, message: str, *, values: object) -> None:
        """Store the values that were computed before the error."""
        super().__init__(message)
        self.values = values


class SbiFlowsWarning(UserWarning):
    """Category of the library's warnings.

    One warning has another category: imports from an old module path give a `DeprecationWarning`.
    """
