"""The first signal is acknowledged at once, in one line that says how to go on; a stream that is gone stops nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qd2mora.cli import _then
from qd2mora.errors import SignalStop
from qd2mora.stopping import AFTER_THE_STEP, AGAIN, listening

ROOT = Path(__file__).parents[1]


def test_a_signal_is_acknowledged_before_the_work_stops(capsys: pytest.CaptureFixture[str]) -> None:
    with listening() as stop:
        with pytest.raises(SignalStop, match="step"), stop.deferred():
            signal.raise_signal(signal.SIGINT)
            assert capsys.readouterr().err == f"stopping at SIGINT: {AFTER_THE_STEP}; a second signal ends at once\n"
            raise SignalStop("after step 3")


def test_where_nothing_is_at_stake_it_stops_on_the_spot_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SignalStop, match="stopped by SIGTERM; the same command goes on"):
        with listening("the same command goes on"):
            signal.raise_signal(signal.SIGTERM)
    err = capsys.readouterr().err
    assert err.startswith("stopping at SIGTERM: the same command goes on") and err.count("\n") == 1
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SignalStop), listening():
        signal.raise_signal(signal.SIGINT)
    assert capsys.readouterr().out == ""  # print would take standard output for it


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "my.yaml"], "what is done is kept"),
        (["eval", "run", "--out=s.json"], "what is done is kept"),
        (["eval", "run"], "begins again"),
        (["merge", "run", "--out", "x"], "no half of the output is left"),
        (["plan", "my.yaml"], AGAIN),
    ],
)
def test_each_verb_says_how_it_is_gone_on_with(arguments: list[str], words: str) -> None:
    assert words in _then(arguments)


def test_every_verb_answers_a_signal_even_one_that_waits_for_input() -> None:
    code = "import sys, qd2mora.cli as c; sys.argv = ['qd2mora', 'generate', 'none', '--prompt', '-']; c.main()"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stderr is not None
    _until_it_waits(child.pid)
    child.send_signal(signal.SIGINT)
    err = child.stderr.read()
    assert child.wait(30) == SignalStop.exit_code
    assert err.splitlines()[0].startswith("stopping at SIGINT") and err.splitlines()[1].startswith("stopped by")
    child.stdin.close()
    child.stderr.close()


def _until_it_waits(pid: int) -> None:
    """Wait until a process does nothing any more: it has read its code and asks for input."""
    before, quiet = -1.0, 0
    while quiet < 10:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        used = float(fields[11]) + float(fields[12])
        quiet = quiet + 1 if used == before and fields[0] == "S" and used > 0 else 0
        before = used
        time.sleep(0.1)
