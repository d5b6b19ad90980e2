"""Errors and warnings of the library.

A mistake that is known before any work starts raises `ValueError`. What only a run can show raises
a subclass of `SbiFlowsError`, so that one `except sf.SbiFlowsError` catches them all.
"""


class SbiFlowsError(Exception):
    """Base class of the errors that only a run can show.

    It is raised itself where no subclass fits: a posterior gives draws or densities that are not
    finite during a calibration or a check, for example. The message names the cause.
    """


class TrainingDiverged(SbiFlowsError):
    """A training or validation loss is NaN or infinite.

    Raised by `fit` and `distil`. Try a smaller `Training(learning_rate=...)`, and look for extreme
    values among the simulations. The weights of the last epoch before that are in `state`.

    Attributes:
        epoch: The first epoch whose loss is not finite, counted from 1.
        state: Posterior with the last finite weights, or None if there are none.
    """

    def __init__(self, message: str, *, epoch: int, state: object = None) -> None:
        """Create the error with the number of the epoch and the last finite state."""
        super().__init__(message)
        self.epoch = epoch
        self.state = state


class SimulationFailed(SbiFlowsError):
    """Too few simulations gave a finite observation.

    Raised by `simulate` if every simulation fails or a worker process cannot load the simulator,
    by fits with fewer than 10 valid simulations, and by checks with fewer than 50. A simulation
    fails if it raises an error or returns NaN or infinity. Run the simulator by hand at one
    parameter vector that the message names. If it fails by design in a part of the prior, run more
    simulations, or use a prior without this part.
    """


class StoreSpoilt(SbiFlowsError):
    """A file of a `SimulationStore` does not have the content that was written.

    Raised where a chunk of simulations cannot be read, and by `SimulationStore.verify` where its
    checksum differs. Remove the folder that the message names and call `simulate` with the same
    arguments again: it simulates the missing chunks only.
    """


class StoreBusy(SbiFlowsError):
    """Another process writes to the same `SimulationStore`.

    Raised by `simulate`. Wait until the other process ends, or use another folder.
    """


class CheckpointSpoilt(SbiFlowsError):
    """The file of `Training(checkpoint=...)` does not have the content that was written.

    Raised by `fit` when it resumes. Delete the file; the fit then starts from the beginning.
    """


class WeightsUneven(SbiFlowsError):
    """A few draws carry almost all of the importance weight.

    Raised by `Validity.corrected` if the effective sample size is less than a tenth of the number
    of draws, because nearly all simulations fail where the posterior is. Raised by
    `prior_sensitivity` if no draw of the posterior is in the support of the other prior. Use a
    simulator that fails less often there, or a prior that is closer to that of the fit.
    """


class ArtefactError(SbiFlowsError):
    """A file cannot be loaded as a posterior.

    Raised by `load` where the file is not a saved posterior, was changed or cut short, was written
    by a later version of the library, or needs a `prior` or an `embedding` that was not supplied or
    differs from the saved one. The message says which.
    """


class SolveFailed(SbiFlowsError):
    """The ODE of a continuous density was not solved within the allowed number of steps.

    Raised by `sample`, `log_prob` and `sample_and_log_prob` of posteriors with `FlowMatching`,
    `Diffusion` or `CNF`. Allow more steps with `Solver(max_steps=...)`, or ask for less accuracy
    with larger `rtol` and `atol`.

    Attributes:
        values: What the call would have returned, with NaN where the ODE was not solved.
    """

    def __init__(self, message: str, *, values: object) -> None:
        """Create the error with the values that were computed."""
        super().__init__(message)
        self.values = values


class SbiFlowsWarning(UserWarning):
    """Category of the library's warnings.

    Imports from a module path that has moved give a `DeprecationWarning` instead.
    """
