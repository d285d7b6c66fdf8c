"""A few held-out rows and what each model answers: for eyes, not for scores."""

from dataclasses import dataclass, field
from typing import Any

import torch

from qd2mora.data import Row, TaskRows, collate
from qd2mora.evaluation import Subject

ROWS_OF_A_TASK = 2
MOST_TASKS = 8
MOST_TOKENS = 64


@dataclass
class Samples:
    """The first held-out rows of the first tasks, with the answers given so far."""

    tasks: list[TaskRows]
    rows: list[Row] = field(init=False)
    content: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        chosen = self.tasks[:MOST_TASKS]
        self.rows = [row for task in chosen for row in task.validation[:ROWS_OF_A_TASK]]
        names = [task.task.name for task in self.tasks]
        self.content = [
            {"task": names[row.task], "prompt": row.pair.prompt, "right": row.pair.answer, "answers": {}}
            for row in self.rows
        ]

    def ask(self, name: str, subject: Subject) -> None:
        """Add the answers of a model, greedy, one row at a time."""
        for row, sample in zip(self.rows, self.content, strict=True):
            prompt = Row(row.task, row.ids[: row.masked], row.masked, row.pair, row.group)
            batch = collate([prompt], subject.tokenizer.pad_token_id, multiple=1)
            batch = {key: tensor.to(subject.plain.device) for key, tensor in batch.items()}
            subject.route(batch)
            room = min(MOST_TOKENS, len(row.ids) - row.masked + 8)
            with torch.no_grad():
                tokens = subject.continue_texts(batch["input_ids"], batch["attention_mask"], room)[0]
            sample["answers"][name] = subject.tokenizer.decode(tokens, skip_special_tokens=True)


__all__ = ["Samples"]
