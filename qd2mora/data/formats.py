"""The formats of rows by name."""

from qd2mora.data import completion, conversation, instruction, multiple_choice, preference, rated, text
from qd2mora.data.row_format import RowFormat
from qd2mora.errors import InputRefused, nearest
from qd2mora.recipe import Task

FORMATS: dict[str, RowFormat] = {
    "instruction": instruction.FORMAT,
    "completion": completion.FORMAT,
    "multiple_choice": multiple_choice.FORMAT,
    "chat": conversation.FORMAT,
    "text": text.FORMAT,
    "preference": preference.FORMAT,
    "rated": rated.FORMAT,
}


def find_format(task: Task) -> RowFormat:
    """Return the task's format. Raises InputRefused naming the nearest one, or a key that has no place in it."""
    if task.format not in FORMATS:
        known = nearest(task.format, FORMATS)
        raise InputRefused(f"data.tasks.{task.name}.format: unknown format {task.format!r}; {known}")
    found = FORMATS[task.format]
    # Resolved recipes of old runs name `tokenizer` on every task, where it words nothing.
    if task.template not in (None, "tokenizer") and not _is_worded(task.format):
        raise InputRefused(
            f"data.tasks.{task.name}.template: {task.template} words chats, instructions and judged answers, "
            f"{task.format} rows are "
            "joined as they are; leave it out"
        )
    if task.turns is not None and task.format != "chat":
        raise InputRefused(f"data.tasks.{task.name}.turns: {task.turns} is for chats, not for {task.format} rows")
    if found.is_document and task.metric not in (None, "loss"):
        raise InputRefused(
            f"data.tasks.{task.name}.metric: {task.metric} judges answers, {task.format} rows have none; loss, or "
            "leave it out"
        )
    if found.answers and task.metric not in (None, "loss"):
        raise InputRefused(
            f"data.tasks.{task.name}.metric: {task.metric} judges answers that are written, those of {task.format} "
            "rows are there; leave it out"
        )
    for name in task.fields or {}:
        if name not in found.names:
            raise InputRefused(
                f"data.tasks.{task.name}.fields: {task.format} rows have no field {name!r}; "
                f"{nearest(name, found.names)}"
            )
    return found


def _is_worded(name: str) -> bool:
    """Tell whether a template may word rows of a format."""
    return name in ("chat", "instruction") or bool(FORMATS[name].answers)


__all__ = ["FORMATS", "find_format"]
