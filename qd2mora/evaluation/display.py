"""What a person sees while rows are asked: a bar with the score so far, on a terminal alone."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qd2mora.evaluation.questions import AskedTask
from qd2mora.evaluation.score import Record
from qd2mora.terminal import Screen


class AskingDisplay:
    """Counts rows, and shows the mean value of the task at hand."""

    def __init__(self, progress: Progress, tasks: list[AskedTask]) -> None:
        self.progress = progress
        self.bar = progress.add_task("rows", total=sum(len(task.rows) for task in tasks), what="", mean="")
        self.values: list[float] = []

    def begin(self, task: AskedTask, known: list[Record]) -> None:
        """Show the next task, of which `known` rows are done already."""
        self.values = [record.value for record in known]
        self.progress.update(self.bar, advance=len(known), what=task.name, mean="")

    def batch(self, records: list[Record]) -> None:
        """Count a finished batch."""
        self.values += [record.value for record in records]
        mean = f"{sum(self.values) / len(self.values):.3f}"
        self.progress.update(self.bar, advance=len(records), mean=mean)


@contextmanager
def asking(tasks: list[AskedTask], is_shown: bool) -> Iterator[AskingDisplay]:
    """Show a bar on standard error while the block runs."""
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
    with progress:
        yield AskingDisplay(progress, tasks)


__all__ = ["AskingDisplay", "asking"]
