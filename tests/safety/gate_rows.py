"""D1, D2: rows that cannot be learned from are refused or left out, each counted once, before any weights are read."""

import json
from pathlib import Path

import tiny
from forked import Result, command, run

from qd2mora.data import Skipped, prepare, read_pairs
from qd2mora.data.file_rows import MAX_ROW_BYTES
from qd2mora.errors import InputRefused
from qd2mora.recipe import Data, Task

_GOOD = {"instruction": "Say.", "input": "red", "output": "blue"}


def _row(**changes: object) -> bytes:
    return json.dumps(_GOOD | changes).encode()


BAD = {
    "not UTF-8": b'{"instruction": "\xff", "output": "y"}',
    "a surrogate in CESU": b'{"instruction": "\xed\xa0\x80", "output": "y"}',
    "UTF-16": '{"instruction": "a"}'.encode("utf-16"),
    "a second BOM": b"\xef\xbb\xbf\xef\xbb\xbf" + _row(),
    "an escaped NUL": _row(input="a\0b"),
    "a bare NUL": b'{"instruction": "a\0", "output": "y"}',
    "half a character": b'{"instruction": "\\ud800", "output": "y"}',
    "half a character in the answer": b'{"instruction": "a", "output": "\\udfff y"}',
    "an empty answer": _row(output=""),
    "an answer of spaces": _row(output=" \t\n\u3000"),
    "a number": _row(output=5),
    "a truth value": _row(output=True),
    "a list": _row(instruction=["a"]),
    "an object": _row(output={"a": 1}),
    "null": _row(output=None),
    "a wrong optional field": _row(input=7),
    "no answer": b'{"instruction": "a"}',
    "no prompt": b'{"output": "a"}',
    "an empty object": b"{}",
    "a row that is null": b"null",
    "a row that is a list": b'["a", "b"]',
    "a row that is a text": b'"a"',
    "a row that is a number": b"3",
    "a key twice": b'{"instruction": "a", "output": "b", "output": "c"}',
    "a cut row": b'{"instruction": "a", "outp',
    "two rows in a line": _row() + _row(),
    "a Python dictionary": b"{'instruction': 'a', 'output': 'b'}",
    "not a number": b'{"instruction": "a", "output": NaN}',
    "a number of 5,000 digits": b'{"instruction": "a", "output": "b", "n": ' + b"9" * 5000 + b"}",
    "100,000 brackets": b'{"instruction": ' + b"[" * 100_000 + b"}",
    "a row of 9 MB": b'{"instruction": "' + b"a" * (MAX_ROW_BYTES + 100) + b'", "output": "b"}',
}
PLACES = {"first": 0, "middle": 10, "last": 20}


def gate(folder: Path, kinds: int | None = None) -> Result:
    """Put every kind of bad row at every place of 20 good ones, under both policies."""
    result = Result("D2")
    path = folder / "rows.jsonl"
    for kind, bad in list(BAD.items())[:kinds]:
        for place, number in PLACES.items():
            lines = [_row(output=f"blue {index}") for index in range(20)]
            lines.insert(number, bad)
            path.write_bytes(b"\n".join(lines) + b"\n")
            result.check(_refused_there(path, number + 1), f"{kind}, {place}: not refused by its number")
            skipped = Skipped()
            pairs = read_pairs(Task(name="t", path=str(path)), str(path), skipped)
            exact = [pair.answer for pair in pairs] == [f"blue {index}" for index in range(20)]
            places = [found for all_of in skipped.places.values() for found in all_of]
            exact &= skipped.total == 1 and sum(skipped.counts.values()) == 1 and f" {number + 1}" in places[0]
            result.check(exact, f"{kind}, {place}: {len(pairs)} rows kept, {skipped.places}")
    _check_csv(result, folder / "rows.csv")
    result.numbers["kinds"] = len(BAD) + 1
    return result


def _check_csv(result: Result, path: Path) -> None:
    """A row of csv that is too long costs itself alone, over many lines too; one that is merely long costs nothing."""
    good = [f"say,blue {index}" for index in range(20)]
    for field, is_kept in (("a" * 200_000, True), ("a,\n" * (MAX_ROW_BYTES // 3 + 1), False)):
        for number in PLACES.values():
            rows = [*good[:number], f'"{field}",long', *good[number:]]
            path.write_text("\n".join(["instruction,output", *rows]) + "\n", encoding="utf-8")
            skipped = Skipped()
            answers = [pair.answer for pair in read_pairs(Task(name="t", path=str(path)), str(path), skipped)]
            wanted = [f"blue {index}" for index in range(20)]
            if is_kept:
                wanted.insert(number, "long")
            result.check(answers == wanted and skipped.total == 1 - is_kept, f"csv, row {number}: {answers} {skipped}")
            result.check(is_kept or _refused_there(path, number + 1), f"csv, row {number}: not refused by its number")


def _refused_there(path: Path, number: int) -> bool:
    try:
        read_pairs(Task(name="t", path=str(path)), str(path))
    except InputRefused as error:
        message = str(error)
        placed = any(f"{path}, {word} {number}: " in message for word in ("row", "line"))
        return placed and len(message.splitlines()) == 1 and len(message) < 1000
    return False


def gate_before_the_model(folder: Path) -> Result:
    """A bad row is answered though the base has no weights at all; a line of 300 MB takes no memory."""
    result = Result("D2 before the model")
    base = tiny.save_base(folder / "base")
    (base / "model.safetensors").unlink()
    tiny.save_tasks(folder / "data")
    recipe = folder / "recipe.yaml"
    recipe.write_text(tiny.recipe_text(base, folder / "data", folder / "run"), encoding="utf-8")
    with (folder / "data" / "last.jsonl").open("ab") as file:
        file.write(b'{"instruction": 5}\n')
    outcome = run(command("train", recipe))
    result.check(outcome.code == 2 and "row 41: " in outcome.err and outcome.is_one_error_line, outcome.err)
    outcome = run(command("train", recipe, "data.on_bad_row=skip"))
    result.check(outcome.code == 2 and "holds no weights" in outcome.err, outcome.err)
    result.check("1 rows left out: 1 no field 'output'" in outcome.err, outcome.err)
    result.check(not (folder / "run").exists(), "a run folder was made")
    path = folder / "bomb.jsonl"
    with path.open("wb") as file:
        file.write(_row() + b"\n" + b'{"instruction": "')
        for _ in range(300):
            file.write(b"a" * (1 << 20))
        file.write(b'", "output": "x"}\n' + _row() + b"\n")
    outcome = run(lambda: read_pairs(Task(name="t", path=str(path)), str(path), Skipped()))
    path.unlink()
    result.check(outcome.code == 0 and outcome.grown_mib < 4 * MAX_ROW_BYTES / 2**20, f"{outcome}")
    result.numbers["grown_mib"] = outcome.grown_mib
    return result


def gate_masked(folder: Path, tokenizer: object) -> Result:
    """D1: rows whose answer `max_length` cuts off are dropped exactly, or refused above a twentieth."""
    result = Result("D1")
    path = folder / "masked.jsonl"
    good = [{"instruction": "red", "output": f"sun {number % 7}"} for number in range(100)]
    masked = {"instruction": "red sun " * 200, "output": "moon"}
    for share in (0, 1, 50, 100):
        rows = [masked if number < share else row for number, row in enumerate(good)]
        for policy in ("error", "skip"):
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
            data = Data(tasks=[Task(name="t", path=str(path))], max_length=256, on_bad_row=policy)
            try:
                (task,) = prepare(data, tokenizer, 0)
            except InputRefused as error:
                refused = "max_length" in str(error)
                result.check(refused and (share == 100 or (share == 50 and policy == "error")), f"{share}: {error}")
                continue
            path.write_text("\n".join(map(json.dumps, good[share:])), encoding="utf-8")
            (clean,) = prepare(data, tokenizer, 0)
            same = [row.ids.tolist() for row in task.train] == [row.ids.tolist() for row in clean.train]
            expected = share < 50 or (share == 50 and policy == "skip")
            result.check(expected and same and task.num_dropped == share, f"{share}, {policy}: {task.num_dropped}")
    return result
