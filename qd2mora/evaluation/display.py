"""What a person sees while rows are asked: a bar with the score so far on a terminal, else a line now and then."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qd2mora.evaluation.questions import AskedTask
from qd2mora.evaluation.score import Record
from qd2mora.terminal import Screen
from qd2mora.terminal.pace import Pace, Tell, tell_plainly


class AskingDisplay:
    """Counts rows, and shows the mean value of the task at hand."""

    def __init__(self, progress: Progress, tasks: list[AskedTask], tell: Tell) -> None:
        self.progress = progress
        total = sum(len(task.rows) for task in tasks)
        self.bar = progress.add_task("rows", total=total, what="", mean="")
        self.pace = Pace("rows asked", total, tell)
        self.values: list[float] = []

    def begin(self, task: AskedTask, known: list[Record]) -> None:
        """Show the next task, of which `known` rows are done already."""
        self.values = [record.value for record in known]
        self.progress.update(self.bar, advance=len(known), what=task.name, mean="")
        self.pace.advance(len(known), is_known=True)

    def batch(self, records: list[Record]) -> None:
        """Count a finished batch."""
        self.values += [record.value for record in records]
        mean = f"{sum(self.values) / len(self.values):.3f}"
        self.progress.update(self.bar, advance=len(records), mean=mean)
        self.pace.advance(len(records))


@contextmanager
def asking(tasks: list[AskedTask], is_shown: bool) -> Iterator[AskingDisplay]:
    """Show on standard error how far it is while the block runs."""
    console = Screen(stderr=True)
    progress = Progress(
        TextColumn("{task.fields[what]}"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[mean]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not (is_shown and console.is_terminal),
    )
    is_plain = is_shown and not console.is_terminal
    with progress:
        yield AskingDisplay(progress, tasks, tell_plainly if is_plain else lambda line: None)


__all__ = ["AskingDisplay", "asking"]
