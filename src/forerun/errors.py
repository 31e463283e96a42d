"""The exceptions of forerun. Each message names the input, the reason and the mend; the command line exits with 2.

ForerunError
├── CheckpointError      a model folder or weight file that is missing, cut short, or of an unknown kind
├── DrafterError         a drafter that does not exist, or does not fit the target
├── RequestError         a prompt or sampling parameters that cannot be served
└── TrainingError        a run that cannot start, go on, or be resumed
"""

from __future__ import annotations


class ForerunError(Exception):
    """The root: catch this to catch everything that a wrong input can cause."""


class CheckpointError(ForerunError):
    """A model folder or weight file that is missing, cut short, or of an unknown kind."""


class DrafterError(ForerunError):
    """A drafter that does not exist, or does not fit the target."""


class RequestError(ForerunError, ValueError):
    """A prompt or sampling parameters that cannot be served."""


class TrainingError(ForerunError):
    """A run that cannot start, go on, or be resumed."""
