"""What is said when a run starts: its tasks and what was lost of them, their shares, what is trained and how."""

from collections.abc import Iterator
from itertools import islice

from transformers import PreTrainedTokenizerBase

from qd2mora.data import TaskRows, share_lines
from qd2mora.data.notes import ROWS_LOOKED_AT, notes
from qd2mora.memory.plan import Plan
from qd2mora.memory.reasons import ACCUMULATION
from qd2mora.recipe.objective import PREFERENCE
from qd2mora.training.loop import Training

MOST_ROWS_COUNTED = 200_000
"""Rows that the shares of tasks are told of; in longer runs they stay what they are."""


def say_what_starts(training: Training, planned: Plan, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say it, line by line."""
    say, course = training.journal.say, training.course
    for task in course.tasks:
        counts = [f"{len(task.train)} rows", f"{len(task.validation)} held out"]
        if task.num_cut:
            counts.append(f"{task.num_cut} cut at the end")
        if task.num_dropped:
            counts.append(f"{task.num_dropped} dropped (no room for the answer)")
        say(f"task {task.task.name}: {', '.join(counts)}")
        for line in (*notes(task, tokenizer), *_unread_margins(task, training.batches.objective.has_head)):
            say(f"task {task.task.name}: {line}")
    count = min(course.total_steps * course.rows_a_step, MOST_ROWS_COUNTED)
    for line in share_lines(course.mixture.shares(count), course.mixture.by_tokens):
        say(line)
    rates = training.train.rates
    if rates is not None:
        say("rates: " + ", ".join(f"{part} {factor:g} times" for part, factor in rates.model_dump().items()))
    for line in training.gradient.stages.words():
        say(f"stage: {line}")
    layers = "kept"
    if planned.checkpointing:
        layers = f"recomputed in {planned.layout.recomputed} layers"
    if planned.layout.stream or planned.layout.rows_by_layer:
        choice = planned.choices[ACCUMULATION]
        say(f"{ACCUMULATION}: {choice.value} ({choice.reason})")
    say(
        f"training {planned.trainable_parameters:,} parameters on {planned.device}, micro batch {training.batches.size}"
        f", activations {layers}, planned peak {planned.peak_bytes / 2**30:.2f} GiB; steps {training.progress.step} "
        f"to {course.total_steps}"
    )


def _unread_margins(task: TaskRows, is_read: bool) -> Iterator[str]:
    """Yield a line where rows say by how much an answer is better, and the objective does not read it."""
    if is_read or task.task.format != PREFERENCE:
        return
    number = sum(row.pair.worth is not None for row in islice(task.train, ROWS_LOOKED_AT))
    if number:
        yield f"{number} rows bring a margin, which objective: reward alone reads"


__all__ = ["say_what_starts"]
