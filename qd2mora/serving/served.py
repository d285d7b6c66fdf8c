"""What a server answers with: runs, exports and bases by name, several adapters on the weights of one base.

A run NAME is served as `NAME`, as `NAME:TASK` for each of its tasks, worded and routed as that one was trained, and
its base as `NAME:base`. An adapter that routes by task has no bare name where it has several tasks.
"""

import copy
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from qd2mora.errors import InputRefused
from qd2mora.evaluation.prompting import Messages, Prompting
from qd2mora.evaluation.shared_bases import SharedBases
from qd2mora.evaluation.subject import SPANS_ARE_MISSING, Subject, open_subject
from qd2mora.evaluation.talking import task_number

BASE = "base"


@dataclass(frozen=True)
class Served:
    """One name that can be asked: what answers, how messages are worded, and for which task."""

    name: str
    subject: Subject
    prompting: Prompting
    lock: threading.Lock
    """Of the wording: its template's child and its tokenizer serve one at a time."""
    task: str | None = None

    def ids_of(self, asked: Messages | str) -> list[int]:
        """Return the tokens of a conversation, or of a text to be continued. Raises InputRefused."""
        with self.lock:
            if isinstance(asked, str):
                return self.prompting.of_text(asked)
            return self.prompting.of_messages(asked)


def open_all(main: Path, adapters: Mapping[str, Path], template: str | None, stack: ExitStack) -> dict[str, Served]:
    """Open a model and adapters; return what is served by name. Raises InputRefused, DamagedFile."""
    bases, served = SharedBases(), dict[str, Served]()
    name = main.resolve().name.removesuffix(".gguf")
    for each, path in [(name, main), *adapters.items()]:
        if each in served or ":" in each or not each:
            raise InputRefused(f"--adapter: '{each}' will not do as a name: one of its own, without a colon")
        subject = open_subject(path, base_of=bases)
        served |= {entry.name: entry for entry in _entries(each, subject, bases, template, stack)}
    return served


def _entries(
    name: str, subject: Subject, bases: SharedBases, template: str | None, stack: ExitStack
) -> Sequence[Served]:
    if subject.run is None:
        return [_entry(name, subject, None, template, stack)]
    if subject.reads_spans:
        raise InputRefused(f"'{name}': {SPANS_ARE_MISSING}")
    run = subject.run
    tasks = [task.name for task in run.recipe.data.tasks]
    found = []
    if not run.routers.reads_task or len(tasks) == 1:
        found.append(_entry(name, subject, None, template, stack))
    found += [replace(_entry(name, subject, task, template, stack), name=f"{name}:{task}") for task in tasks]
    base = Subject(bases(run.folder.base(run.recipe)), subject.tokenizer, templates=subject.templates)
    # Worded as the run is, so that both are asked the same.
    prompting = found[0].prompting
    found.append(replace(found[0], name=f"{name}:{BASE}", subject=base, prompting=prompting, task=None))
    return found


def _entry(name: str, subject: Subject, task: str | None, template: str | None, stack: ExitStack) -> Served:
    task_number(subject, task)
    # Words are made in another thread than answers, and a tokenizer is no thing to share.
    apart = replace(subject, tokenizer=copy.deepcopy(subject.tokenizer))
    prompting = stack.enter_context(Prompting(apart, template, task))
    return Served(name, subject, prompting, threading.Lock(), task)


__all__ = ["Served", "open_all"]
