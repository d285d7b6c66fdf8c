"""Rows as the model sees them, and what becomes of all of them: lengths, shares, what is cut, left out, said twice."""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from qd2mora.base import base_config, load_tokenizer
from qd2mora.data import Row, TaskMix, TaskRows, prepare
from qd2mora.data.formats import find_format
from qd2mora.data.limits import beyond
from qd2mora.data.notes import ROWS_LOOKED_AT, is_learned, notes
from qd2mora.data.pair import CALLED, REASONED, SAID, WORDED
from qd2mora.data.token_rows import tokens_of
from qd2mora.recipe import Recipe
from qd2mora.recipe.objective import RATED
from qd2mora.report.cells import with_columns, written

_BARS = " ▁▂▃▄▅▆▇█"
_BUCKETS = 32
_LEARNED = {SAID: "green", WORDED: "green", CALLED: "yellow", REASONED: "magenta"}
_GIVEN = {SAID: "dim", WORDED: "dim cyan", CALLED: "dim yellow", REASONED: "dim magenta"}
_LEGEND = (
    "dim: given; green: learned; of chats cyan: the template's own words; yellow: tools, calls, results; magenta: "
    "reasoning, each dim where given; reversed: special tokens"
)


def show_rows(recipe: Recipe, number: int, console: Console) -> None:
    """Print `number` rows of every task as the model sees them, then what became of all rows."""
    tokenizer = load_tokenizer(recipe.base.model)
    tasks = prepare(recipe.data, tokenizer, recipe.train.seed)
    for task in tasks:
        console.rule(task.task.name)
        for row in task.train[:number]:
            for name, text in _named_lines(task, row):
                console.print(coloured(text, tokenizer), soft_wrap=True, highlight=False)
                console.print(f"{name}{len(text.ids)} tokens, {text.num_labels} learned", style="dim")
    console.print(_LEGEND)
    console.print(_lengths(tasks, recipe.data.max_length))
    console.print(_shares(recipe, tasks))
    for line in beyond(tasks, tokenizer, base_config(recipe.base)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for task in tasks:
        for line in problems(task, tokenizer, recipe.data.max_length):
            console.print(f"{task.task.name}: {line}", soft_wrap=True, highlight=False, markup=False)


def _named_lines(task: TaskRows, row: Row) -> Iterator[tuple[str, Row]]:
    """Yield the texts of a row, each with what the data says of it."""
    names = [f"{name}: " for name in find_format(task.task).answers] or [""]
    if task.task.format == RATED:
        names = ["rated good: " if row.pair.worth else "rated bad: "]
    yield from zip(names, row.lines, strict=True)


def coloured(row: Row, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Return a row's text: what is given dim, what is learned bright, each part of a conversation in its own colour."""
    special = set(tokenizer.all_special_ids)
    ids = row.ids.tolist()
    kinds = [(style, token in special) for style, token in zip(_styles(row), ids, strict=True)]
    text, shown, stop = Text(), "", 0
    for (style, is_special), run in itertools.groupby(kinds):
        stop += len(list(run))
        # Not each part by itself: some tokenizers drop the space a text begins with.
        whole = str(tokenizer.decode(ids[:stop], skip_special_tokens=False))
        if is_special:
            style += " reverse"
        text.append(whole[len(shown) :], style)
        shown = whole
    return text


def _styles(row: Row) -> list[str]:
    """Return how each token is shown."""
    kinds = [WORDED if row.parts else SAID] * len(row.ids)
    for kind, start, stop in row.parts:
        kinds[start:stop] = [kind] * len(kinds[start:stop])
    return [_LEARNED[kind] if learned else _GIVEN[kind] for kind, learned in zip(kinds, is_learned(row), strict=True)]


def problems(task: TaskRows, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[str]:
    """Yield a line for each thing that is lost, doubled or missing, with its count."""
    for reason, places in task.skipped.places.items():
        named = places[:3]
        if len(places) > 3:
            named = [*named, "..."]
        yield f"{len(places)} rows left out: {reason} ({', '.join(named)})"
    if task.num_dropped:
        yield f"{task.num_dropped} rows dropped: data.max_length {max_length} leaves no room for an answer"
    if task.num_cut:
        yield f"{task.num_cut} rows lose the end of the answer to data.max_length {max_length}"
    if task.skipped.duplicates:
        yield f"{task.skipped.duplicates} rows say what an earlier row says"
    yield from notes(task, tokenizer)


def bars(lengths: NDArray[np.int32], max_length: int) -> str:
    """Return a histogram of lengths from 0 to `max_length` in one line of bars."""
    counts, _ = np.histogram(lengths, _BUCKETS, (0, max_length + 1))
    steps = np.ceil(counts / counts.max() * (len(_BARS) - 1)).astype(int)
    return "".join(_BARS[step] for step in steps)


def _lengths(tasks: list[TaskRows], max_length: int) -> Table:
    reach = f"0 to {max_length}"
    headings = ("task", "train", "held out", "median", "longest", "learned", reach)
    table = with_columns(Table(title="rows and their lengths in tokens"), headings, words=(reach,))
    for task in tasks:
        lengths = task.lengths
        learned = sum(line.num_labels for row in itertools.islice(task.train, ROWS_LOOKED_AT) for line in row.lines)
        share = f"{learned / tokens_of(task.train)[:ROWS_LOOKED_AT].sum():.0%}"
        numbers = (len(task.train), len(task.validation), int(np.median(lengths)), int(lengths.max()))
        table.add_row(task.task.name, *map(str, numbers), share, bars(lengths, max_length))
    return table


def _shares(recipe: Recipe, tasks: list[TaskRows]) -> Table:
    """What each task gets of the run, or of its first epoch."""
    mixture = TaskMix(recipe.data, tasks, recipe.train.seed)
    if recipe.train.steps:
        count = recipe.train.steps * recipe.train.global_batch
    elif recipe.data.stop is None:
        count = mixture.rows_per_epoch
    else:
        count = mixture.rows_until_stop()
    count = min(count, 10 * ROWS_LOOKED_AT)
    table = Table(title=f"shares of the first {count} rows that are learned from")
    with_columns(table, ("task", "asked", "rows", "share", "tokens", "share", "passes"))
    for share in mixture.shares(count):
        asked = written(share.asked, ".1%")
        if asked:
            asked += f" of {recipe.data.mix}"
        numbers = (str(share.rows), f"{share.of_rows:.1%}", str(share.tokens), f"{share.of_tokens:.1%}")
        table.add_row(share.task, asked, *numbers, f"{share.passes:.2f}")
    return table


__all__ = ["bars", "coloured", "problems", "show_rows"]
