"""Errors and warnings of the library.

What is known before any work starts is a `ValueError`; what only a run shows is a subclass of
`SbiFlowsError`, so that one `except` clause catches them all.
"""


class SbiFlowsError(Exception):
    """Base of every error that only a run can show."""


class TrainingDiverged(SbiFlowsError):
    """The training or validation loss stopped being finite.

    Attributes:
        epoch: The first epoch (counted from 1) whose loss was not finite.
        state: The last finite weights, as the posterior that they make.
    """

    def __init__(self, message: str, *, epoch: int, state: object = None) -> None:
        """Keep the epoch and the last finite state beside the message."""
        super().__init__(message)
        self.epoch = epoch
        self.state = state


class SimulationFailed(SbiFlowsError):
    """No simulation, or too few of them, gave a finite observation."""


class StoreSpoilt(SbiFlowsError):
    """A file of a `SimulationStore` is not what was written."""


class StoreBusy(SbiFlowsError):
    """Another process is writing into a `SimulationStore`."""


class CheckpointSpoilt(SbiFlowsError):
    """The file of `Training(checkpoint=...)` is not what was written."""


class WeightsUneven(SbiFlowsError):
    """Draws with the weights of a correction are worth too few."""


class ArtefactError(SbiFlowsError):
    """A file is no posterior that `load` can read, or not the one that its record describes."""


class SolveFailed(SbiFlowsError):
    """The ODE of a continuous flow was not solved: it needs more steps, or is not finite.

    Attributes:
        values: What would have been returned, NaN where the ODE was not solved.
    """

    def __init__(self, message: str, *, values: object) -> None:
        """Keep what was solved beside the message."""
        super().__init__(message)
        self.values = values


class SbiFlowsWarning(UserWarning):
    """Category of every warning that the library gives."""
