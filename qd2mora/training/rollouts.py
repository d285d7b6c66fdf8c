"""Answers that the run writes itself, drawn from the model as it is, with their rewards: the rows of a step of `grpo`.

What is drawn is a function of the weights, the seed and the row's number, so that a resumed run draws the same. The
main process writes for all, and the others wait: two devices might differ in a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from qd2mora.data import Row, TaskRows
from qd2mora.errors import InputRefused, WillNotFit
from qd2mora.evaluation import Subject
from qd2mora.evaluation.decoding import Decoding, Wanted
from qd2mora.memory.faults import tried
from qd2mora.memory.writing import TEXTS_AT_ONCE
from qd2mora.objectives.grpo import advantages
from qd2mora.objectives.rules import RewardError, Rule
from qd2mora.recipe import Recipe
from qd2mora.training.micro_batches import MicroBatches, key_of

Written = tuple[list[int], float | None]
"""An answer's tokens, its end among them, and its reward; None where that could not be had."""


@dataclass
class Rollouts:
    """Writes and judges answers to the prompts of rows."""

    batches: MicroBatches
    subject: Subject
    recipe: Recipe
    rule: Rule
    say: Callable[[str], None]
    measures: dict[str, float] = field(default_factory=dict)
    num_bad: int = 0
    """Answers whose reward could not be had, in this start of the run."""

    def of(self, rows: Sequence[Row], first: int) -> list[Row]:
        """Return a step's answers with their advantages; `first` numbers the first row. Raises InputRefused."""
        samples, temperature = self.recipe.objective.samples or 1, self.recipe.objective.temperature or 0.0
        asked = [row for row in rows for _ in range(samples)]
        seeds = [
            key_of(self.batches.seed, "answer", first + number, draw)
            for number in range(len(rows))
            for draw in range(samples)
        ]
        found = self.batches.processes.from_main(lambda: self._written(asked, seeds, temperature))
        groups = [found[start : start + samples] for start in range(0, len(found), samples)]
        learned, rewards, spread = [], [], 0
        for row, group in zip(rows, groups, strict=True):
            judged = [(tokens, reward) for tokens, reward in group if reward is not None]
            own = [reward for _, reward in judged]
            rewards += own
            spread += len(set(own)) > 1
            learned += [
                answered(row, tokens, worth) for (tokens, _), worth in zip(judged, advantages(own), strict=True)
            ]
        if not learned:
            raise InputRefused(f"--reward-file: no answer of step {self.batches.progress.step + 1} could be judged")
        self.measures = {
            "reward": sum(rewards) / len(rewards),
            "groups_that_differ": spread / len(groups),
            "answer_tokens": sum(row.num_labels for row in learned) / len(learned),
            "bad_rewards": len(found) - len(learned),
        }
        return learned

    def as_long(self, row: Row) -> Row:
        """Return a row with as long an answer as there may be: what a rehearsal runs."""
        return answered(row, [int(row.ids[-1])] * self._room(row), 1.0)

    def held_out(self, tasks: Sequence[TaskRows]) -> dict[str, float]:
        """Return of each task that holds rows out the mean reward of greedy answers. Raises InputRefused."""
        means = {}
        for task in tasks:
            rows = list(task.validation)
            if rows:
                found = self.batches.processes.from_main(partial(self._written, rows, [0] * len(rows), 0.0))
                rewards = [reward for _, reward in found if reward is not None]
                if not rewards:
                    raise InputRefused(f"--reward-file: no held-out answer of task {task.task.name} could be judged")
                means[task.task.name] = sum(rewards) / len(rewards)
        return means

    def _room(self, row: Row) -> int:
        return min(self.recipe.objective.max_new_tokens or 1, self.recipe.data.max_length - row.masked)

    def _written(self, rows: Sequence[Row], seeds: Sequence[int], temperature: float) -> list[Written]:
        """Write and judge an answer to each row."""
        # A prompt that is answered has no row of the run, and must not draw by the last one's key.
        self.batches.forget_rows()
        is_training = self.batches.model.training
        # Dropout would draw numbers that no seed of an answer covers, and judge other weights than those that are
        # learned.
        self.batches.model.eval()
        try:
            wanted = [
                Wanted(
                    row.ids[: row.masked].tolist(),
                    self.subject.ends,
                    self._room(row),
                    temperature,
                    seed=seed,
                    task=row.task,
                    vector=row.pair.vector,
                )
                for row, seed in zip(rows, seeds, strict=True)
            ]
            answers = [
                answer
                for start in range(0, len(wanted), TEXTS_AT_ONCE)
                for answer in self._decoded(wanted[start : start + TEXTS_AT_ONCE])
            ]
        finally:
            self.batches.model.train(is_training)
        return [(tokens, self._reward(row, text)) for row, (tokens, text) in zip(rows, answers, strict=True)]

    def _decoded(self, wanted: list[Wanted]) -> list[tuple[list[int], str]]:
        """Return tokens and text of each answer; where memory runs out, one half after the other. Raises WillNotFit."""

        def write() -> list[tuple[list[int], str]]:
            decoding = Decoding(self.subject, wanted)
            while not decoding.is_done:
                decoding.step()
            return [([chosen.token for chosen in each.chosen], each.text) for each in decoding.answers]

        found, _ = tried(write)
        if found is not None:
            return found
        if len(wanted) == 1:
            raise WillNotFit("memory: a single answer cannot be written on this device; lower objective.max_new_tokens")
        self.batches.let_go()
        half = len(wanted) // 2
        return self._decoded(wanted[:half]) + self._decoded(wanted[half:])

    def _reward(self, row: Row, text: str) -> float | None:
        """Return an answer's reward, None, which is said, where it could not be had. Raises InputRefused."""
        try:
            return self.rule(row.pair.prompt, text, row.pair.answer)
        except RewardError as error:
            prompt = row.pair.prompt.strip()[-60:].replace("\n", " ")
            line = f"the reward of '{text[:40]}' after '...{prompt}' cannot be had: {error}"
            if self.recipe.data.on_bad_row == "error":
                raise InputRefused(
                    f"--reward-file: {line}; leave such answers out with data.on_bad_row: skip"
                ) from error
            self.num_bad += 1
            if self.num_bad & (self.num_bad - 1) == 0:  # the first, and at every doubling
                self.say(f"{self.num_bad} answers left out so far: {line}")
            return None


def answered(row: Row, tokens: Sequence[int], worth: float) -> Row:
    """Return a row with another answer, and what that is worth."""
    ids = np.concatenate([row.ids[: row.masked], np.asarray(tokens, dtype=np.int32)])
    return replace(row, ids=ids, earlier=(), parts=(), pair=replace(row.pair, worth=worth))


__all__ = ["Rollouts", "answered"]
