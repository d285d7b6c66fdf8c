"""Judged answers of held-out rows: whether a model prefers the better one, as the run's objective has it.

Where an objective measures against a reference, that is asked once, before the model: the base without its adapter, or
with the one that the run went on from. An export is compared with the base of the recipe, which is loaded for it.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from peft import PeftModel
from torch import Tensor

from qd2mora.base import load_base
from qd2mora.base.passes import last_states
from qd2mora.data import Row
from qd2mora.evaluation.answering import answer_losses, batch_of
from qd2mora.evaluation.score import Record
from qd2mora.evaluation.subject import Subject
from qd2mora.mixture import initial_tensors
from qd2mora.mixture.registration import MODEL_PREFIX
from qd2mora.mixture.start_folder import start_tensors
from qd2mora.objectives import Objective, Said, mismatched, objective_of
from qd2mora.objectives.head import Head, scored, stored_head, width_of
from qd2mora.objectives.reference import Reference, line_key
from qd2mora.recipe import Recipe

AT_ONCE = 16
EQUAL = 1e-6
"""Rewards that differ by less are equal: rows that run with others may differ in a last bit."""
METRICS = {"preference": "preferred", "rated": "rated"}
"""What a task's rows are judged by, of each format."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judge:
    """An objective with what its reference says of a task's lines, by `line_key`; `others` give it its baseline."""

    objective: Objective
    reference: dict[int, float] = field(default_factory=dict)
    others: tuple[Row, ...] = ()
    baseline: float = 0.0
    head: Head | None = None

    def asking(self, subject: Subject) -> "Judge":
        """Return the judge of one subject, which tells the baseline."""
        if not self.others:
            return self
        ratios = [float(self._said(subject, lines).log_ratios.sum()) for lines in _batches(self.others)]
        return replace(self, baseline=max(0.0, sum(ratios) / len(self.others)))

    def records(self, subject: Subject, rows: Sequence[Row], numbers: Sequence[int]) -> list[Record]:
        """Judge rows; a value is 1 where the model has the better answer, or the right side of a rating."""
        said = self._said(subject, [line for row in rows for line in row.lines])
        losses, rewards = self.objective.losses(said).tolist(), self.objective.rewards(said)
        if self.objective.lines == 2:
            # Two lines a row, the better answer first, as in `objectives.pairs`.
            margins = (rewards[::2] - rewards[1::2]).tolist()
            values = [float(margin > EQUAL) for margin in margins]
        else:
            margins = [None] * len(rows)
            values = ((said.log_ratios > self.baseline) == (said.worths > 0)).double().tolist()
        return [
            Record(number, value, loss, 1, margin=margin)
            for number, value, loss, margin in zip(numbers, values, losses, margins, strict=True)
        ]

    def _said(self, subject: Subject, lines: Sequence[Row]) -> Said:
        reference = None
        if self.objective.has_reference:
            reference = torch.tensor([self.reference[line_key(line)] for line in lines], dtype=torch.float64)
        if self.head is not None:
            return Said(answer_scores(subject, list(lines), self.head), lines)
        losses = torch.tensor(answer_losses(subject, list(lines)), dtype=torch.float64)
        return Said(losses, lines, reference, self.baseline)


def judge_of(recipe: Recipe, subject: Subject, rows: Sequence[Row]) -> Judge | None:
    """Return what judges a task's rows; None, which is said, where the reference cannot be had any more."""
    objective = objective_of(recipe.objective)
    others: tuple[Row, ...] = ()
    if objective.has_baseline and len(rows) > 1:
        others = tuple(mismatched(list(rows), max(row.width for row in rows)))
    if objective.has_head:
        if subject.run is None:
            _log.warning("judged answers are not scored: the head of objective: reward is in the run alone")
            return None
        return Judge(objective, head=stored_head(subject.run.folder.adapter, width_of(subject.model)))
    if not objective.has_reference:
        return Judge(objective, others=others)
    known: dict[int, float] = {}
    with _reference(recipe, subject) as asked:
        for lines in _batches([*(line for row in rows for line in row.lines), *others]):
            known |= zip(map(line_key, lines), answer_losses(asked, lines), strict=True)
    return Judge(objective, known, others)


@torch.no_grad()
def answer_scores(subject: Subject, rows: list[Row], head: Head) -> Tensor:
    """Return what a head scores the answers of rows, (rows,) float64 on the CPU."""
    batch = batch_of(subject, rows, "right")

    def states(batch: Mapping[str, Tensor]) -> Tensor:
        subject.route(batch)
        return last_states(subject.plain, batch)

    return scored(head.to(batch["labels"].device), states, batch).double().cpu()


@contextmanager
def _reference(recipe: Recipe, subject: Subject) -> Iterator[Subject]:
    """Yield the model that a recipe's objective measures against."""
    start = recipe.adapter.start
    if subject.run is None and start is not None:
        _log.warning("judged answers are compared with the base: adapter.start is known to the run alone")
    if not subject.is_adapted:
        yield Subject(load_base(recipe.base), subject.tokenizer)
        return
    with ExitStack() as held:
        reference = Reference(subject.model, has_start=False)
        if subject.run is not None and start is not None:
            reference.start = _start(start, subject.model, recipe)
        held.enter_context(reference.speaking())
        yield subject


def _start(start: str, model: PeftModel, recipe: Recipe) -> dict[str, Tensor]:
    """Return what an adapter held at the start of its run, by its parameters' names."""
    stored, found = start_tensors(start), dict[str, Tensor]()
    # Experts that were added began as the seed draws them.
    drawn = initial_tensors(model, recipe.train.seed) if recipe.adapter.grow is not None else {}
    for name, tensor in model.named_parameters():
        key = name.removeprefix(MODEL_PREFIX).replace(".default", "")
        if key in stored:
            found[name] = stored[key].to(tensor.device)
            if stored[key].numel() < tensor.numel():
                found[name] = drawn[name]
                found[name][: len(stored[key])] = stored[key]
    return found


def _batches(lines: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield lines of like length together."""
    ordered = sorted(lines, key=lambda line: len(line.ids))
    yield from (ordered[start : start + AT_ONCE] for start in range(0, len(ordered), AT_ONCE))


__all__ = ["METRICS", "Judge", "answer_scores", "judge_of"]
