"""How a message is worded: as the run was trained, or by the template asked for.

A run may have tasks of several wordings: `task` names the one whose wording is meant; else it is the first task's, or
in a conversation that of the first task of conversations. Rows that are joined as they are have no wording at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qd2mora.data import chat as chat_format
from qd2mora.errors import InputRefused, nearest
from qd2mora.evaluation.subject import Subject
from qd2mora.recipe import Task
from qd2mora.recipe.data import AS_IT_IS, INSTRUCTION, OWN


@dataclass(frozen=True)
class Wording:
    """`name`: instruction, tokenizer, chatml, plain or as it is; `template`: the text of a chat template, where it is
    one; `reason`: why this one."""

    name: str
    template: str | None
    reason: str

    @property
    def line(self) -> str:
        """What is said of it in one line."""
        return f"wording: {self.name} ({self.reason})"


def wording_of(subject: Subject, template: str | None, task: str | None, *, is_conversation: bool) -> Wording:
    """Return how messages to a subject are worded; `template` and `task` are what was asked for.

    Raises InputRefused where there is no such template.
    """
    known = (INSTRUCTION, OWN, *chat_format.TEMPLATES)
    own = subject.tokenizer.chat_template
    if template is not None:
        if template not in known:
            raise InputRefused(f"--template: unknown '{template}'; {nearest(template, known)}")
        chosen, reason = template, "--template"
    elif subject.run is not None:
        chosen, reason = _as_trained(subject.run.recipe.data.tasks, task, is_conversation)
    elif isinstance(own, str):
        chosen, reason = OWN, "the chat template of its tokenizer; --template instruction chooses another"
    else:
        chosen, reason = INSTRUCTION, "its tokenizer has no chat template; --template chooses another"
    if chosen in (INSTRUCTION, AS_IT_IS):
        return Wording(chosen, None, reason)
    text = chat_format.TEMPLATES.get(chosen, own)
    if not isinstance(text, str):
        there = ", ".join(name for name in known if name != OWN)
        raise InputRefused(f"--template: the tokenizer has no chat template; there are {there}")
    return Wording(chosen, text, reason)


def _as_trained(tasks: Sequence[Task], name: str | None, is_conversation: bool) -> tuple[str, str]:
    """Return the wording of a task, and why it is this task's."""
    asked = [task for task in tasks if task.name == name] or list(tasks)
    if is_conversation:
        # Stable: the first task of conversations, else the first of all.
        asked.sort(key=lambda task: task.format != "chat")
    reason = f"as task {asked[0].name} was trained"
    others = [task for task in asked if task.wording != asked[0].wording]
    if others:
        reason += f"; {others[0].name} was trained as {others[0].wording}: --task or --template chooses"
    return asked[0].wording, reason


__all__ = ["Wording", "wording_of"]
