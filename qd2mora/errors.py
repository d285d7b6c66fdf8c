"""What stops a command: each error is one line for the user and one exit code.

A message names the thing, where it stands, its value and what would do; it never holds a secret.
"""

import difflib
from collections.abc import Iterable

from qd2mora.redact import redacted

_LONGEST, _LAST = 1200, 200
"""Letters of a line, and those of its end that are kept: a value that somebody wrote may be any length."""


class StopError(Exception):
    """A command cannot go on; `exit_code` is what the process returns."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(_cut(redacted(message)))


class InputRefused(StopError):  # noqa: N818 - reads as the sentence it is
    """The recipe, the data or a path is not acceptable."""

    exit_code = 2


class WillNotFit(StopError):  # noqa: N818
    """The plan does not fit the budget."""

    exit_code = 3


class DeviceLost(StopError):  # noqa: N818
    """The device, or another process of the run, is gone or does not answer."""

    exit_code = 3


class NotFinite(StopError):  # noqa: N818
    """Loss or gradients are not finite."""

    exit_code = 4


class DiskTrouble(StopError):  # noqa: N818
    """The disk is full or not writable."""

    exit_code = 5


class DamagedFile(StopError):  # noqa: N818
    """A file on disk is not what was written."""

    exit_code = 6


class SignalStop(StopError):  # noqa: N818
    """A signal arrived; state is saved and the run can be resumed."""

    exit_code = 75


def _cut(message: str) -> str:
    """Return the message with the middle of over-long lines left out, which is said."""
    return "\n".join(
        line if len(line) <= _LONGEST else f"{line[: _LONGEST - _LAST - 30]} [...] {line[-_LAST:]}"
        for line in message.split("\n")
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return what would do instead of a name that is not known: the nearest one, or all."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1, 0.4)
    return f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names)}"


__all__ = [
    "DamagedFile",
    "DeviceLost",
    "DiskTrouble",
    "InputRefused",
    "NotFinite",
    "SignalStop",
    "StopError",
    "WillNotFit",
    "nearest",
]
