"""Errors that a user can cause. Each message says what was given, what is allowed and what to do.

`main` functions print the message alone and exit with `exit_code`; a traceback appears with `--debug` only.
Anything that is not a `UserError` is a bug of ours and keeps its traceback.
"""

from typing import Self


class UserError(Exception):
    """Base of every error that a user can cause and mend."""

    exit_code = 2
    is_shared = False
    """Whether rank 0 hears of it, and speaks: so of all that fails once the ranks have met."""


class ConfigError(UserError):
    """The configuration, an override, or the environment a run was launched in is not usable."""


class DataError(UserError):
    """A shard, an index, a manifest or a sample is missing, damaged, or not what it says it is."""

    exit_code = 3


class BadSampleError(DataError):
    """The bytes are the ones that were packed, and yet no picture can be made of them, or their label is no class."""

    def __init__(self, reason: str, where: str = "", key: str = "") -> None:
        """where: shard and number of the sample, key: its name, where they are known."""
        super().__init__(f"{where} ({key}): {reason}" if where else reason)
        self.reason, self.where, self.key = reason, where, key

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, str]]:
        return type(self), (self.reason, self.where, self.key)


class CacheInUseError(DataError):
    """Other runs on this node hold so much of a cache, or another bound of it, that there is no room: it may pass."""

    exit_code = 5


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or does not fit the run that asked for it."""

    exit_code = 4


class RunDirError(UserError):
    """A run directory cannot be written, is in use, or belongs to another configuration."""

    exit_code = 5


class ReplicaError(UserError):
    """Ranks whose weights must agree hold different ones: broken hardware."""

    exit_code = 10


class DivergedError(UserError):
    """Training went wrong in a way that going back did not mend, or could not."""

    exit_code = 9


class PeerError(UserError):
    """Another rank failed; this rank can only stop. The message names the culprit where it is known."""

    exit_code = 6


class ExportError(UserError):
    """A model cannot be written in the form that was asked for, or did not come back the same."""

    exit_code = 8
