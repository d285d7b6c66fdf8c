"""The recipe's data section: what is learned from."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qd2mora.recipe.section import Count, Place, Positive, Section, Whole

HUB = "hub:"
"""How the name of a data set on the hub begins."""

TEXT = "text"
"""The format of documents that are learned whole."""

INSTRUCTION, OWN, AS_IT_IS = "instruction", "tokenizer", "as it is"
"""Wordings of rows beside the chat templates of ours: Alpaca's prompt, the tokenizer's own template, none."""


class Task(Section):
    """One data set."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """What scores and reports call it."""
    path: Place
    """A json, jsonl, csv, txt (one document), parquet or arrow file, text also as .gz (beside the recipe, else in the
    working folder) or `hub:owner/name:split`."""
    streaming: bool = False
    """Read a hub data set as it comes over the network, without a copy on disk."""
    format: str = "instruction"
    """`instruction`, `completion`, `multiple_choice`, `chat` or `text`; of answers that are judged (see `objective`)
    `preference` or `rated`."""
    fields: dict[str, str | list[str]] | None = None
    """What the file calls the format's fields, for example {instruction: question, output: answer}; a list of names
    makes one list of several columns."""
    template: Literal["tokenizer", "chatml", "plain"] | None = None
    """What words a chat: `tokenizer`, its own template (where left out), or one of ours for a tokenizer without. On
    instruction rows, words them as a chat of one turn in place of Alpaca's prompt; on judged answers, in place of
    joining prompt and answer as they are."""
    turns: Literal["together", "each", "last"] | None = None
    """Answers of a conversation: `together`, in one row; `each`, in a row of its own, worded as when it is asked for;
    `last`, the last alone. Left out: together where the template words earlier turns always alike, else each."""
    weight: Positive | None = None
    """Share in the mixture relative to the others'; all tasks give one, or none does (plain concatenation)."""
    epochs: Annotated[float, Field(ge=1e-9, le=1e4)] = 1.0  # the order of one epoch stands in memory
    """How often these rows count in one epoch of the run, and until a weighted task is exhausted (`data.stop`)."""
    limit: Count | None = None
    """Use the first so many rows."""
    select: dict[str, str] | None = None
    """Only rows whose fields have these values, for example {task: boolq}."""
    group: Annotated[int, Field(ge=0, le=1)] | None = None
    """Which half of the experts a localised balance steers these rows to: 1 the first half, 0 the rest."""
    vector: str | None = None
    """Field that holds a list of numbers, for methods whose router reads a vector of each row."""
    validation: Whole | Place = 0
    """Rows of the file that are held out (of chats whole conversations, of texts whole documents), or another file."""
    metric: Literal["exact", "choice", "rouge", "loss"] | None = None
    """How `eval` scores held-out rows: `exact`, the written words are the right ones (where left out); `choice`, the
    right one of the task's answers is the likeliest; `rouge`, ROUGE-L (extra `scores`); `loss` alone (of texts always).
    Where it is given, training scores it too at every `train.eval_every`."""

    @property
    def wording(self) -> str:
        """How rows become text: `instruction`, a chat template by name, or as they are."""
        left_out = {"chat": OWN, "instruction": INSTRUCTION}.get(self.format, AS_IT_IS)
        return self.template or left_out

    @property
    def judged_by(self) -> str:
        """The metric of its held-out rows."""
        if self.metric is None:
            return "loss" if self.format == TEXT else "exact"
        return self.metric


class Data(Section):
    """What is learned from."""

    tasks: Annotated[list[Task], Field(min_length=1)]
    mix: Literal["rows", "tokens"] = "rows"
    """What the weights count."""
    stop: Literal["first", "last"] | None = None
    """In place of train.steps and train.epochs: the run ends when the first, or the last, weighted task has given all
    its rows."""
    max_length: Annotated[int, Field(ge=8, le=2**24)] = 512
    """Longer rows are cut at the end, and counted; one that loses its whole answer is left out, and counted. More than
    5% of those in a task stop the run, unless `on_bad_row` is `skip`. Longer texts become several rows: nothing is
    lost."""
    packing: bool = False
    """Rows of a step share lines of max_length tokens; attention keeps them apart, and the result is the same."""
    mask_prompt: bool = True
    """Learn the answer only."""
    spans: (
        Annotated[list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]], Field(min_length=1)] | None
    ) = None
    """Names of the adapters that spans of `completion` and `chat` rows may be marked with, in the order of the experts
    (docs/data.md), for methods whose experts act inside of spans."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`error`: the first row that cannot be learned from stops the run; `skip`: such rows are left out and counted."""

    @model_validator(mode="after")
    def _tasks_agree(self) -> "Data":
        names = [task.name for task in self.tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"two tasks are called '{twice}'")
        named = self.spans or []
        again = next((name for name in named if named.count(name) > 1), None)
        if again:
            raise ValueError(f"spans: '{again}' is named twice")
        if len({task.weight is None for task in self.tasks}) > 1:
            raise ValueError("give a weight to every task or to none")
        if self.mix == "tokens" and self.tasks[0].weight is None:
            raise ValueError("mix: tokens needs a weight on every task")
        if self.stop and self.tasks[0].weight is None:
            raise ValueError("stop needs a weight on every task; without weights all tasks end together")
        for task in self.tasks:
            if task.streaming and not task.path.startswith(HUB):
                raise ValueError(
                    f"task '{task.name}': streaming is for hub data sets; files are read as they come anyway"
                )
        return self


__all__ = ["HUB", "Data", "Task"]
