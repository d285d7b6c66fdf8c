"""The instruction format: Alpaca rows, in the prompt of LLM-Adapters, byte for byte.

The odd spaces are that project's: its template is an indented Python string. Reproducing published numbers needs them.
"""

from qd2mora.data.file_rows import BadRow
from qd2mora.data.row_format import Fields, RowFormat

_INDENT = " " * 16
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. \n\n"
    f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n"
    f"{_INDENT}### Input:\n{_INDENT}{{input}}\n{_INDENT}\n{_INDENT}### Response:\n{_INDENT}"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
    f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n{_INDENT}### Response:\n{_INDENT}"
)


def split(row: Fields) -> tuple[str, str]:
    """Return (prompt, answer) of a row with `instruction`, `output` and, where there is one, `input`.

    Raises BadRow where there is a `system`, which this prompt has no place for.
    """
    if row.get("system"):
        raise BadRow("field 'system' has no place in this prompt", "; template: tokenizer words it, or take it out")
    if row.get("input"):
        # Not str.format: braces in the data are data.
        prompt = _WITH_INPUT.replace("{instruction}", row["instruction"], 1)
        head, _, tail = prompt.rpartition("{input}")
        return head + row["input"] + tail, row["output"]
    return _WITHOUT_INPUT.replace("{instruction}", row["instruction"], 1), row["output"]


FORMAT = RowFormat(
    ("instruction", "output"),
    split,
    texts=("instruction", "output"),
    optional=("input", "system"),
    asks=("instruction", "input"),
    starts_word=True,
)

__all__ = ["FORMAT", "split"]
