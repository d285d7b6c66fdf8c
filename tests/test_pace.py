"""Long work says how far it is: a bar on a terminal, else now and then a line with the time left; never on stdout."""

import io
import sys

import pytest

from qd2mora.terminal import Outlet
from qd2mora.terminal.pace import EVERY_S, FIRST_S, Pace, in_words, paced, showing


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_line_comes_after_ten_seconds_and_then_every_thirty_with_the_time_left() -> None:
    clock, told = Clock(), []
    pace = Pace("rows", 100, told.append, clock=clock)
    for _ in range(100):
        clock.now += 1
        pace.advance()
    assert told[0] == "rows: 10 of 100, about 90 s left".replace("90 s", "2 min")
    assert len(told) == 1 + int((100 - FIRST_S - 1) // EVERY_S) and told[1].startswith("rows: 40 of 100")
    assert "of 100" in told[-1] and not told[-1].startswith("rows: 100")


def test_what_an_earlier_start_did_says_nothing_of_the_pace() -> None:
    clock, told = Clock(), []
    pace = Pace("rows", 100, told.append, clock=clock)
    pace.advance(80, is_known=True)
    clock.now = 20
    pace.advance(10)
    assert told == ["rows: 90 of 100, about 20 s left"]


def test_short_work_says_nothing_and_no_work_of_another_process_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(paced("short", range(5))) == [0, 1, 2, 3, 4]
    monkeypatch.setattr("qd2mora.terminal.pace.FIRST_S", 0.0)
    list(paced("told", range(2)))
    assert capsys.readouterr().err == "told: 1 of 2, about 0 s left\n"
    monkeypatch.setenv("RANK", "1")
    list(paced("silent", range(2)))
    ended = capsys.readouterr()
    assert ended.err == ended.out == ""


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("stream", [None, Outlet(Broken())])
def test_a_closed_or_broken_stream_stops_no_work(stream: Outlet | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("qd2mora.terminal.pace.FIRST_S", 0.0)
    assert list(paced("work", range(3))) == [0, 1, 2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_on_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", Outlet(screen))
    with showing("measuring", 2) as done:
        done(1)
        done(1)
    assert "measuring" in screen.getvalue() and "2/2" in screen.getvalue()


@pytest.mark.parametrize(("seconds", "words"), [(7, "7 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h")])
def test_times_are_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
