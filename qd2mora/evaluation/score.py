"""Scoring held-out rows: greedy answers compared word for word, and the loss of the right answer."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from qd2mora.data import IGNORE, Row, TaskRows, collate
from qd2mora.evaluation.subject import Subject
from qd2mora.memory.loss import token_losses

ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Score:
    """One task's result: rows asked, answers equal to the right one, loss per answer token in nats."""

    rows: int
    correct: int
    loss: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.rows

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        z, n, p = 1.96, self.rows, self.accuracy
        center = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, center - half), min(1.0, center + half)

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"accuracy": self.accuracy, "interval": self.interval}


def score_tasks(subject: Subject, tasks: list[TaskRows], limit: int | None = None) -> dict[str, Score]:
    """Score the held-out rows of every task that has some, the first `limit` of each."""
    scores = {}
    for task in tasks:
        rows = task.validation[:limit]
        if rows:
            scores[task.task.name] = score_rows(subject, rows)
    return scores


def score_rows(subject: Subject, rows: list[Row]) -> Score:
    """Ask rows of like length together; the result does not depend on who shares a batch."""
    by_length = sorted(rows, key=lambda row: len(row.ids))
    correct, loss, labels = 0, 0.0, 0
    for start in range(0, len(by_length), ROWS_AT_ONCE):
        part = by_length[start : start + ROWS_AT_ONCE]
        correct += sum(_answers_right(subject, part))
        loss += _answer_loss(subject, part)
        labels += sum(row.num_labels for row in part)
    return Score(len(rows), correct, loss / labels)


def _answers_right(subject: Subject, rows: list[Row]) -> list[bool]:
    prompts = [Row(row.task, row.ids[: row.masked], row.masked, row.pair) for row in rows]
    batch = _batch(subject, prompts, "left")
    subject.route(batch)
    longest = max(len(row.ids) - row.masked for row in rows)
    answers = subject.continue_texts(batch["input_ids"], batch["attention_mask"], longest + 2)
    texts = subject.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [text.split() == row.pair.answer.split() for text, row in zip(texts, rows, strict=True)]


def _answer_loss(subject: Subject, rows: list[Row]) -> float:
    batch = _batch(subject, rows, "right")
    subject.route(batch)
    keep = batch["labels"][:, 1:] != IGNORE
    with torch.no_grad():
        decoder = subject.plain.get_decoder()
        hidden = decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        states = hidden.last_hidden_state[:, :-1][keep]
        losses = token_losses(states, batch["labels"][:, 1:][keep], subject.plain.get_output_embeddings())
    return float(losses.sum())


def _batch(subject: Subject, rows: list[Row], side: str) -> dict[str, Tensor]:
    batch = collate(rows, subject.tokenizer.pad_token_id, multiple=1, side=side)
    return {name: tensor.to(subject.plain.device) for name, tensor in batch.items()}


__all__ = ["Score", "score_rows", "score_tasks"]
