"""The one door to the terminal: text passes as harmless text, and a stream that cannot be written stops nothing.

Rows, answers, paths and names come from strangers: an escape sequence among them could rename the window, clear the
screen or hide what is written, and a bidi mark could turn a line around. Files keep their text as it is.
"""

import errno
import io
import os
import re
import sys
import time
from collections.abc import Iterable
from typing import IO, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

# Controls but for tab and new line; line and paragraph separators; what orders or hides text (bidi marks, tags,
# annotations, the deprecated formats); halves of surrogate pairs, which stand for bytes that are no text.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
# How a library's progress bar begins anew, and how it goes a line up.
_BAR = re.compile(r"\r|(?:\x1b\[A)+$")
LONGEST_WAIT_S = 5.0
"""How long a stream that takes nothing at the moment is waited for."""


def harmless(text: str) -> str:
    """Return `text` with every character that a terminal might obey or hide written as its number, such as \\x1b."""
    return _UNSAFE.sub(_number, text)


def _number(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class Unbreakable(io.TextIOBase):
    """A standard stream that never raises: what cannot be encoded is written as numbers, what fails is dropped.

    Writing goes on where it failed before, as a full disk may have room again; `trouble` keeps the first failure.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.trouble = stream, 0
        self._raw: io.RawIOBase | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.flush()
            # Not through its buffer: what a buffer cannot get rid of would fail again when the interpreter ends.
            raw = getattr(stream.buffer, "raw", stream.buffer)
            self._raw = raw if isinstance(raw, io.RawIOBase) else None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def flush(self) -> None:
        """Nothing is held back."""

    def write(self, text: str) -> int:
        try:
            self._pass_on(text)
        except OSError as error:
            self.trouble = self.trouble or error.errno or errno.EIO
        except ValueError:  # the stream was closed
            self.trouble = self.trouble or errno.EBADF
        return len(text)

    def _pass_on(self, text: str) -> None:
        content = text.encode(self.encoding, self.errors)
        if self._raw is None:
            self._stream.write(content.decode(self.encoding))
            self._stream.flush()
            return
        view, last = memoryview(content), time.monotonic() + LONGEST_WAIT_S
        while view:
            written = self._raw.write(view)
            if written:
                view, last = view[written:], time.monotonic() + LONGEST_WAIT_S
            elif time.monotonic() > last:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            else:
                time.sleep(0.01)


class Outlet(io.TextIOBase):
    """What takes the place of a standard stream: all that is written to it passes as harmless text."""

    def __init__(self, stream: TextIO, *, takes_bars: bool = False) -> None:
        self.below = self.rich_proxied_file = Unbreakable(stream)
        """Where a console writes what it has rendered; the second is the name by which rich itself asks for it."""
        self._takes_bars = takes_bars

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.below.encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        return self.below.errors

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.below.isatty()

    def fileno(self) -> int:
        return self.below.fileno()

    def write(self, text: str) -> int:
        bar = _BAR.match(text)
        begin = bar[0] if bar and self._takes_bars else ""
        self.below.write(begin + harmless(text[len(begin) :]))
        return len(text)


class Screen(Console):
    """A console whose colours are ours alone: brackets and colons of a text are no markup, escapes of it stay text."""

    def __init__(self, *, stderr: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        file = cast(IO[str], stream.below) if isinstance(stream, Outlet) else None
        super().__init__(file=file, stderr=stderr, markup=False, emoji=False)

    def render_str(self, text: str, **options: object) -> Text:
        return super().render_str(harmless(text), **options)  # type: ignore[arg-type]

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else harmless(text), style, control)


def open_terminal() -> None:
    """Put outlets in the place of the standard streams, closed ones too."""
    # In this order each takes the number that was closed: else the next file would be what libraries print to.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    if not isinstance(sys.stdout, Outlet):
        sys.stdout = Outlet(sys.stdout)
    if not isinstance(sys.stderr, Outlet):
        # Libraries draw their bars here; nothing of ours begins with a mark of theirs.
        sys.stderr = Outlet(sys.stderr, takes_bars=True)


def lost_output() -> str | None:
    """Return why standard output was not written whole; None where it was, or where nobody reads it any more."""
    trouble = sys.stdout.below.trouble if isinstance(sys.stdout, Outlet) else 0
    return os.strerror(trouble) if trouble not in (0, errno.EPIPE) else None


__all__ = ["Outlet", "Screen", "Unbreakable", "harmless", "lost_output", "open_terminal"]
