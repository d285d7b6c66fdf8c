"""TM1: texts with control and bidi marks come in by rows, answers, names, paths and values; none of them is printed."""

import json
import logging
import random
import re
import shutil
import sys
import unicodedata
import warnings
from pathlib import Path

import tiny
from forked import Result, run
from printed import on_terminal, run_on

MARKS = (
    *("\x1b]0;PWN\x07", "\x1b[2J", "\x1b[38;5;201m", "\x1bc", "\x1b[1A\x1b[2K", "\x9b2J", "\x9d0;x\x9c", "\x1b(0"),
    *(
        "\x1bP1$r\x1b\\",
        "\x1b]8;;http://x\x1b\\",
        "\x1b[6n",
        "\x1b[?1049h",
        "\x00",
        "\x05",
        "\x07",
        "\x08\x08",
        "\r",
        "\x0b",
    ),
    *(
        "\x0c",
        "\x0e",
        "\x0f",
        "\x11",
        "\x1a",
        "\x1c",
        "\x7f",
        "\x84",
        "\x85",
        "\x8d",
        "\x90",
        "\x9f",
        "\u061c",
        "\u200e",
    ),
    *(
        "\u200f",
        "\u2028",
        "\u2029",
        "\u202a",
        "\u202b",
        "\u202c",
        "\u202d",
        "\u202e",
        "\u2066",
        "\u2067",
        "\u2068",
        "\u2069",
    ),
    *("\u206a", "\ufeff", "\ufff9", "\U000e0041", "\U000e007f"),
)
# No control marks, but what a console of rich would obey or trip over.
BRACKETS = ("[red]", "[/]", "[/bold]", "[link=http://x]", ":smile:", "[blink]", "[")
LETTERS = ("a", "ok", " word", "é", "שלום", "日本", "🙂", "\u200d", "\t", "%s", "{0}")
_BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
_OWN = re.compile(r"\x1b\[(?:[0-9;]*m|\?25[lh]|2K|1A)|\r")
"""What our own screen sends to a terminal: colours, the cursor hidden and shown, a bar drawn anew."""


def texts(number: int) -> list[str]:
    """Return texts of letters, marks and brackets, each with every kind of mark in its turn."""
    chance, made = random.Random(0), []
    for place in range(number):
        parts = [MARKS[place % len(MARKS)], BRACKETS[place % len(BRACKETS)]]
        parts += chance.choices(MARKS, k=2) + chance.choices(LETTERS, k=4) + chance.choices(BRACKETS, k=1)
        chance.shuffle(parts)
        made.append("".join(parts))
    return made


def unsafe(text: str) -> list[str]:
    """Return the characters that a terminal would obey or hide; by Unicode's own tables, not by the guard's."""
    return [
        each
        for each in text
        if (unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") and each not in "\n\t")
        or unicodedata.bidirectional(each) in _BIDI
        or each in "\u061c\u200e\u200f\ufeff"
        or (unicodedata.category(each) == "Cf" and ord(each) >= 0xE0000)
    ]


def gate(made: Path, folder: Path, number: int) -> Result:
    """Bring `number` texts in by every way."""
    result, each = Result("TM1"), texts(number)
    _rows(result, each, made, folder)
    _brackets(result, made, folder)
    for begin in range(0, number, 50):
        _answers(result, each[begin : begin + 50], made, folder / f"answers {begin}")
    for place, text in enumerate(each):
        _refusals(result, place, text, made, folder)
    for text in each[:: max(15, number // 10)]:
        _names(result, text, made, folder)
        _logged(result, text)
    return result


def _check(result: Result, codes: tuple[int, ...], what: str, *arguments: object, given: bytes = b"") -> None:
    printed = run_on(*arguments, given=given)
    found = unsafe(printed.out + printed.err)
    holds = printed.code in codes and not found and "Traceback" not in printed.err
    result.check(holds, f"{what}: {found[:5]!r} {printed}")


def _rows(result: Result, each: list[str], made: Path, folder: Path) -> None:
    """Rows, and a terminal for them too."""
    # A NUL in a row is refused.
    words = [text.replace("\x00", "") for text in each]
    rows = [{"instruction": f"say {text}", "output": f"ok {text}"} for text in words]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = folder / "rows.yaml"
    text = tiny.recipe_text(made / "base", made / "data", folder / "run").replace(
        str(made / "data/first.jsonl"), str(path)
    )
    recipe.write_text(text.replace("max_length: 128", "max_length: 256"), encoding="utf-8")
    _check(result, (0,), "rows", "preview", recipe, "-n", len(each))
    _check(result, (0,), "rows", "suggest-experts", recipe)
    code, sent = on_terminal("preview", recipe, "-n", len(each))
    sent = sent.replace("\r\n", "\n")
    shown = [mark for mark in ("\x1b[38;5;201m", "\x1b[2J", "\x1b]") if mark in sent]
    result.check(
        code == 0 and not shown and not unsafe(_OWN.sub("", sent)), f"rows on a terminal: {shown} {sent[:300]!r}"
    )
    result.check("\x1b[" in sent, "rows on a terminal have no colours of ours")


def _brackets(result: Result, made: Path, folder: Path) -> None:
    """Words in brackets and colons of a path are printed as they are."""
    target = folder / "".join(BRACKETS).replace("/", "")
    printed = run_on("train", made / "recipe.yaml", f"output={json.dumps(str(target))}", "train.steps=1")
    result.check(printed.code == 0 and printed.out.count(str(target)) > 2, f"brackets in a path: {printed}")


def _answers(result: Result, each: list[str], made: Path, folder: Path) -> None:
    """Answers, by a tokenizer that writes the texts."""
    shutil.copytree(made / "base", folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    written = {"type": "Replace", "pattern": {"Regex": "^|[a-z]"}, "content": "".join(each)}
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], written]}
    path.write_text(json.dumps(content), encoding="utf-8")
    recipe, words = made / "recipe.yaml", ("--max-new-tokens", "8")
    _check(result, (0,), "an answer", "generate", folder, "--prompt", "Say", *words)
    _check(result, (0,), "an answer", "chat", folder, *words, given="".join(each).encode())
    _check(result, (0,), "an answer", "eval", folder, "--recipe", recipe, "--limit", "2")


def _refusals(result: Result, place: int, text: str, made: Path, folder: Path) -> None:
    """Paths, values and keys in errors of every verb, in turn."""
    word, recipe = text.replace("\x00", ""), made / "recipe.yaml"
    path = folder / f"x{word.replace('/', '')}"
    ways: list[tuple[object, ...]] = [
        ("verify", path),
        ("generate", path, "--prompt", word),
        ("chat", path),
        ("eval", path),
        ("inspect", path),
        ("merge", path, "--out", path),
        ("merge", made / "run", "--out", folder / "out", "--strategy", word),
        ("compose", word, path, "--out", path),
        ("compose", "cat", path, "--out", path),
        ("train", path),
        ("plan", recipe, f"{word}=1"),
        ("plan", recipe, f"adapter.method={word}"),
        ("preview", recipe, f"data.tasks.0.path={json.dumps(text)}"),
        ("compare", recipe, "--methods", word, "--out", path),
        ("compare", recipe, "--sweep", word, "--out", path),
        ("recipes", f"x{word}"),
        ("methods", f"x{word}"),
        (f"x{word}",),
        ("eval", made / "run", "--tasks", f"x{word}"),
        ("generate", made / "run", "--prompt", "x", "--task", f"x{word}"),
    ]
    way = ways[place % len(ways)]
    _check(result, (2,), f"{way[0]} with {text!r}", *way)
    if place % 4:
        return
    rows = folder / "row.jsonl"
    rows.write_text(json.dumps({"instruction": "x", text: "y"}) + "\n", encoding="utf-8")
    _check(result, (2,), f"a key {text!r}", "preview", recipe, f"data.tasks.0.path={rows}")


def _names(result: Result, text: str, made: Path, folder: Path) -> None:
    """Folders of such a name that are read from and written into."""
    place = folder / f"run {text.replace('/', '').replace(chr(0), '')}"
    shutil.copytree(made / "run", place)
    _check(result, (0,), "a name", "verify", place)
    _check(result, (0,), "a name", "inspect", place, "--html", place / "page.html")
    _check(result, (0,), "a name", "eval", place, "--limit", "1")
    _check(result, (0,), "a name", "merge", place, "--out", place / "merged", "--strategy", "mean_gate")


def _logged(result: Result, text: str) -> None:
    """Warnings, ours and of libraries, errors of logging, and a traceback."""

    def action() -> None:
        from qd2mora import cli
        from qd2mora.training.journal import StepDisplay

        sys.argv = ["qd2mora", "--version"]
        try:
            cli.main()
        except SystemExit:
            logging.getLogger("qd2mora").warning(text)
            warnings.warn(text, stacklevel=1)
            print(text)
            print(text, file=sys.stderr)
            StepDisplay(1, 0).say(text)
        raise RuntimeError(text)

    outcome = run(action)
    found = unsafe((outcome.out + outcome.err).removeprefix("\r"))
    result.check(outcome.code == 1 and not found, f"what is logged: {found[:5]!r} {outcome}")


__all__ = ["gate", "texts", "unsafe"]
