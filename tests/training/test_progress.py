"""What is shown while a run goes on: one line that fits a terminal, plain lines elsewhere, time left by the clock."""

import io
import re

from rich.console import Console

from qd2mora.training.journal import StepDisplay

METRICS = {
    "loss": 0.31214,
    "penalty": 2.3e-2,
    "learning_rate": 2.1e-3,
    "tokens_per_s": 2489.2,
    "memory": 0.48 * 2**30,
}


def shown(width: int, is_terminal: bool, start: int, steps: list[int], seconds: float = 30.0) -> str:
    """Show steps that take `seconds` each."""
    now = [100.0]
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=is_terminal, force_interactive=is_terminal)
    with StepDisplay(400, start, console, lambda: now[0]) as display:
        for step in steps:
            now[0] = 100.0 + seconds * (step - start)
            display.step(step, METRICS)
    return out.getvalue()


def test_a_plain_line_tells_loss_rate_speed_memory_and_time_left() -> None:
    (line,) = shown(80, False, 0, [1]).splitlines()
    assert line == "step 1/400  loss 0.3121  penalty 2.30e-02  lr 2.1e-3  2,489 tokens/s  0.48 GiB  3:19:30 left"


def test_time_left_after_a_resume_counts_the_steps_since() -> None:
    lines = shown(80, False, 200, [220, 300, 400]).splitlines()
    assert lines[0].endswith(" 1:30:00 left") and lines[1].endswith(" 50:00 left")
    assert lines[2].endswith(" 1:40:00 in all")
    assert shown(80, False, 0, [1], seconds=3600).rstrip().endswith(" 16d 15h left")


def test_the_live_line_fits_eighty_columns_whole() -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(80, True, 0, [120], 3e3))
    last = [line for line in re.split(r"[\r\n]+", text) if "120/400" in line][-1]
    assert len(last.rstrip()) <= 80
    for words in ("step", "loss 0.3121", "lr 2.1e-3", "2,489 tokens/s", "0.48 GiB", "left"):
        assert words in last
    assert "penalty" not in last
    assert "penalty 2.30e-02" in shown(140, True, 0, [120])


def test_brackets_of_a_message_are_shown() -> None:
    out = io.StringIO()
    StepDisplay(4, 0, Console(file=out, width=200)).say("logging fails: [Errno 28] No space left on device")
    assert out.getvalue() == "logging fails: [Errno 28] No space left on device\n"


def test_held_out_losses_of_several_tasks_have_a_mean() -> None:
    out = io.StringIO()
    StepDisplay(4, 0, Console(file=out, width=200)).evaluation(2, {"a": 1.0, "b": 2.0}, {}, {"a": 0.5})
    assert out.getvalue().splitlines() == [
        "step 2/4  held-out loss  mean 1.5000  a 1.0000  b 2.0000",
        "step 2/4  held-out score  a 0.5000",
    ]
