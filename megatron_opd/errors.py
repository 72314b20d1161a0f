"""Errors that people can mend; the command line prints them without a traceback and exits with 2."""

BRANCH = "for a run of its own: megatron-opd recipe new NAME --like RECIPE"  # ends what is refused as a run has other settings
INTERRUPTED = 130  # exit code after Ctrl-C, by the shells' rule 128 + SIGINT


class Interrupted(BaseException):
    """A run that Ctrl-C asked to stop has saved and said so; the command line exits with 130."""


class UserError(ValueError):
    """Something outside the program is wrong: the message says what, got, wanted, next.

    `rank` is set where one rank of a run alone knows of it; else every rank has the same error, and the first says it.
    """

    rank: int | None = None


class ConfigError(UserError):
    """The recipe or an override is wrong; names every field at fault."""


class StoreError(UserError):
    """A store or a part of it is missing, unsealed, incomplete, corrupt or not the one expected."""


class LineageError(UserError):
    """A model, tokenizer or teacher is not the one that the data was made with."""


class EngineError(UserError):
    """An inference engine can't do what was asked, or answered wrongly."""


class ServersLost(EngineError):
    """Servers are gone and did not come back, or died at their start by a signal or an error of a GPU: the fault of their node, perhaps.

    The command line exits with 4.
    """


class CheckpointError(UserError):
    """A checkpoint is missing, unfinished, or was made by a different run."""


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, cut, changed or unreadable: an older checkpoint may be whole."""


class QuarantineError(UserError):
    """A stage is done, but excluded more rollouts than it may; the command line exits with 3."""
