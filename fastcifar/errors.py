"""The errors a person can cause. Each message is one line: what was wrong, where, and what to do.

Any module may import this one; it imports nothing. The command line prints the message and
exits with the class's `exit_status`. Every other exception is a bug and keeps its traceback.

    raise DataError("data_batch_1: 'labels' has 9,999 entries, 'data' has 10,000")
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DamagedStoreError",
    "DataError",
    "DivergedError",
    "DownloadError",
    "FastcifarError",
    "OutputError",
    "RankLostError",
    "StoppedError",
    "one_line",
]


class FastcifarError(Exception):
    """Base of all errors a person can cause; its message is one line."""

    exit_status = 2


class ConfigError(FastcifarError, ValueError):
    """An option, argument or name is not one of those allowed."""


class DataError(FastcifarError):
    """An archive, batch file or store cannot be used."""


class DamagedStoreError(DataError):
    """A store's files are not what was written.

    Args:
        found: what is wrong.
        advice: what to do about it, which the message ends with.
    """

    def __init__(self, found: str, advice: str = "") -> None:
        super().__init__(found, advice)
        self.found = found
        self._advice = advice

    def __str__(self) -> str:
        return f"{self.found}; {self._advice}" if self._advice else self.found


class DownloadError(DataError):
    """An archive could not be fetched."""


class CheckpointError(FastcifarError):
    """A checkpoint or run folder cannot be used."""


class OutputError(FastcifarError):
    """An output folder or file cannot be written."""


class DivergedError(FastcifarError):
    """Training produced a loss that is not finite."""

    exit_status = 3


class RankLostError(FastcifarError):
    """Another of the processes that train a run together has ended."""

    exit_status = 4


class StoppedError(FastcifarError):
    """A signal stopped a run, which was saved first.

    Args:
        message: one line that says how to go on.
        exit_status: 128 + the signal's number, as shells report it.
    """

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def one_line(what: object, longest: int = 200) -> str:
    """What a file holds, or another library says of it, as part of a message: one line of bounded length."""
    words = " ".join(str(what).split())[:longest]
    return "".join(letter if letter.isprintable() else "?" for letter in words)
