"""What a run's reference says of its rows, computed before the first step or read from disk."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from peft import PeftModel

from qd2mora.data import Row
from qd2mora.errors import InputRefused
from qd2mora.objectives.peam import is_due
from qd2mora.objectives.reference import CHUNK, KeptLosses, Reference, line_key
from qd2mora.recipe import Recipe
from qd2mora.terminal.pace import Pace
from qd2mora.training.identity import Identity
from qd2mora.training.micro_batches import Course, MicroBatches

_OF_THE_RUN = ("train.", "data.", "rows.", "objective.", "adapter.")
"""Fields of a run's identity that say nothing of a model without its adapter."""


def reference_of(recipe: Recipe, model: PeftModel) -> Reference | None:
    """Return the frozen model that a run is measured against; the adapter of `model` stands at its start."""
    if recipe.objective.reference is None and not recipe.objective.kl:
        return None
    return Reference(model, has_start=recipe.adapter.start is not None)


def keep_reference(batches: MicroBatches, course: Course, made_of: Mapping[str, object], pace: Pace) -> None:
    """Let the reference know every row that the run will meet, of all its tasks. Raises WillNotFit."""
    reference = batches.reference
    assert reference is not None
    # Answers repeat, and one prompt may have several: each line is computed once.
    lines = {line_key(line): line for row in _rows_of(course) for line in row.lines}
    kept, alone = KeptLosses(made_of), [replace(line, against=None) for line in lines.values()]
    for first in range(0, len(alone), CHUNK):
        chunk = alone[first : first + CHUNK]
        losses = batches.processes.from_main(partial(kept.read, chunk))
        if losses is None:
            mine = batches.until_it_fits(partial(_losses, batches, reference, chunk), "what the reference says of rows")
            losses = batches.processes.sum_numbers(mine)
            batches.processes.from_main(partial(kept.write, chunk, losses))
        reference.kept |= {line_key(line): loss for line, loss in zip(chunk, losses, strict=True)}
        pace.advance(len(chunk))


def waiting_tasks(course: Course, reference: Reference, say: Callable[[str], None]) -> frozenset[int]:
    """Return the numbers of tasks that are not due, by what the reference says of the rows that the run would meet.

    Raises InputRefused where none is due.
    """
    met = sorted(set(course.mixture.places(0, course.total_steps * course.rows_a_step)))
    waiting = set()
    for number, task in enumerate(course.tasks):
        pairs = [task.train[place].lines for each, place in met if each == number]
        margins = [reference.kept[line_key(chosen)] - reference.kept[line_key(rejected)] for chosen, rejected in pairs]
        words = f"task {task.task.name}: of {len(margins)} pairs the reference repeats {sum(m > 0 for m in margins)}"
        if is_due(margins):
            say(f"{words} failures: due, and learned")
        else:
            say(f"{words} failures: not due, its rows are passed over")
            waiting.add(number)
    if len(waiting) == len(course.tasks):
        raise InputRefused(
            "objective.consolidate: due, but no task is; nothing is learned. Add pairs and start with --overwrite, or "
            "learn all with objective.consolidate=all"
        )
    return frozenset(waiting)


def _rows_of(course: Course) -> Iterator[Row]:
    """Yield the rows that steps and evaluations meet, task by task."""
    for task, place in sorted(set(course.mixture.places(0, course.total_steps * course.rows_a_step))):
        yield course.tasks[task].train[place]
    for each in course.tasks:
        yield from each.validation


def _losses(batches: MicroBatches, reference: Reference, lines: Sequence[Row]) -> list[float]:
    """Return the losses of the lines that this process runs, of the others 0."""
    places = {line_key(line): place for place, line in enumerate(lines)}
    found = [0.0] * len(lines)
    with reference.speaking():
        for part in batches.of(lines, 0):
            batches.tell_routers(part)
            losses = (batches.row_losses(part) * part.weight).tolist()
            for line, loss in zip(part.rows, losses, strict=True):
                found[places[line_key(line)]] += loss
    return found


def made_of(identity: Identity, reference: Reference, micro_batch: int) -> dict[str, object]:
    """Return what a reference's losses depend on beside the rows: base, versions, machine, the start where it has one.

    The planned micro batch too: a row that runs with others may differ in a last bit, and two runs of one recipe are to
    be the same.
    """
    left_out = _OF_THE_RUN[:-1] if reference.start else _OF_THE_RUN
    fields = {name: value for name, value in identity.items() if not name.startswith(left_out)}
    return {**fields, "micro_batch": micro_batch}


__all__ = ["keep_reference", "made_of", "reference_of", "waiting_tasks"]
