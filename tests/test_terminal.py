"""The terminal: text that is harmless, streams that stop nothing, and the only places where the two are made."""

import ast
import errno
import io
import os
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from qd2mora.terminal import Outlet, Screen, Unbreakable, harmless, streams

PACKAGE = Path(streams.__file__).parents[1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é, שלום, 日本, 🙂, a\u200db\tc\nd", "plain, é, שלום, 日本, 🙂, a\u200db\tc\nd"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\rb\r\n", "a\\x0db\\x0d\n"),
        ("\x9b\x85\x7f\x00", "\\x9b\\x85\\x7f\\x00"),
        ("abc\u202edef\u2066", "abc\\u202edef\\u2066"),
        ("\udcff", "\\udcff"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_letters_stay_and_marks_become_numbers(text: str, shown: str) -> None:
    assert harmless(text) == shown


def test_harmless_text_stays_as_it_is() -> None:
    every = "".join(map(chr, range(0x3000)))
    assert harmless(harmless(every)) == harmless(every)


class _Full(io.StringIO):
    has_room = False

    def write(self, text: str) -> int:
        if not self.has_room:
            raise OSError(errno.ENOSPC, "full")
        return super().write(text)


def test_a_full_stream_drops_what_it_cannot_take_and_goes_on_when_there_is_room() -> None:
    stream = _Full()
    out = Unbreakable(stream)
    out.write("lost")
    stream.has_room = True
    out.write("kept")
    assert (stream.getvalue(), out.trouble) == ("kept", errno.ENOSPC)


def test_a_slow_reader_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    taken = bytearray()
    monkeypatch.setattr(streams.time, "sleep", lambda seconds: taken.extend(os.read(reader, 1 << 16)))
    with os.fdopen(writer, "w") as stream:
        out = Unbreakable(stream)
        out.write("x" * (1 << 18))
    assert out.trouble == 0
    assert len(taken) + len(os.read(reader, 1 << 20)) == 1 << 18
    os.close(reader)


def test_a_screen_obeys_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Outlet(stream))
    table = Table("[red]head")
    table.add_column("\x1b[1m")
    table.add_row("[/x]", Text("\x07", "bold"))
    Screen().print("[bold]a[/x] :smile:", table, Text("\x1b[2J", "red"))
    shown = stream.getvalue()
    for words in ("[bold]a[/x] :smile:", "[red]head", "[/x]", "\\x1b[1m", "\\x1b[2J"):
        assert words in shown
    assert shown.replace("\n", "").isprintable()


def test_what_rich_draws_passes_and_what_is_printed_meanwhile_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Outlet(stream))
    screen = Screen()
    screen.file.write("\x1b[1m")
    print("\x1b[1m")
    assert stream.getvalue() == "\x1b[1m\\x1b[1m\n"


def test_bars_of_libraries_begin_anew_on_standard_error_alone() -> None:
    out, err = io.StringIO(), io.StringIO()
    for stream, takes_bars in ((out, False), (err, True)):
        outlet = Outlet(stream, takes_bars=takes_bars)
        for text in ("\r50%\r", "\x1b[A\x1b[A", "\x1b[Ax"):
            outlet.write(text)
    assert out.getvalue() == "\\x0d50%\\x0d\\x1b[A\\x1b[A\\x1b[Ax"
    assert err.getvalue() == "\r50%\\x0d\x1b[A\x1b[A\\x1b[Ax"


def test_consoles_are_made_and_streams_are_replaced_in_one_place() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name == "streams.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_console = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console"
            is_stream = isinstance(node, ast.Attribute) and node.attr in ("__stdout__", "__stderr__")
            assert not is_console and not is_stream, f"{path}:{node.lineno}"
