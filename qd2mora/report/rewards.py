"""Scored answers: the best of each prompt, and what picking it is worth."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qd2mora.evaluation.rewards import Scored
from qd2mora.report.cells import with_columns

MOST_SHOWN = 20
_LETTERS = 60


def show_rewards(found: Sequence[Scored], console: Console) -> None:
    """Print the best answers of the first prompts, and the mean rewards of all answers and of the best."""
    best = [each for each in found if each.is_best]
    title = f"the best of {len(found)} answers to {len(best)} prompts"
    table = with_columns(Table(title=title), ("prompt", "best answer", "of", "reward"), ("prompt", "best answer"))
    for each in best[:MOST_SHOWN]:
        table.add_row(_short(each.prompt), _short(each.answer), str(each.of), f"{each.reward:.4f}")
    console.print(table)
    if len(best) > MOST_SHOWN:
        console.print(f"and {len(best) - MOST_SHOWN} prompts more; --out FILE or --json has all")
    means = [sum(each.reward for each in some) / len(some) for some in (found, best)]
    console.print(f"mean reward: {means[0]:.4f} of all answers, {means[1]:.4f} of the best")


def _short(said: object) -> Text:
    text = " ".join(str(said).split())
    if len(text) > _LETTERS:
        text = text[: _LETTERS - 3] + "..."
    return Text(text)


__all__ = ["show_rewards"]
