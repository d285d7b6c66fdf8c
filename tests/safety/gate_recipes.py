"""R1: mangled recipes end in acceptance or one refusing line that names the file and the place or key."""

import copy
import random
import re
import time
from pathlib import Path
from typing import Any

import yaml
from forked import Result

from qd2mora.errors import InputRefused
from qd2mora.recipe import Recipe, load_recipe

VALID = """\
base: {model: random:tiny, quantization: nf4}
adapter: {method: d2mora, rank: 16, alpha: 32, dropout: 0.05, targets: [q_proj, v_proj], down: {experts: 4}}
data:
  tasks:
    - {name: boolq, path: data/boolq.jsonl, format: instruction, weight: 1.0, validation: 200}
    - {name: siqa, path: data/siqa.parquet, weight: 2.0, select: {task: siqa}}
  mix: tokens
  max_length: 512
  on_bad_row: skip
train: {steps: 1000, global_batch: 16, learning_rate: 3.0e-4, schedule: linear, optimizer: adamw_8bit, seed: 0}
memory: {budget: 8GiB, checkpointing: auto, offload: {activations: auto}}
output: runs/x
"""
_WHOLE: Any = yaml.safe_load(VALID) | {"train": yaml.safe_load(VALID)["train"] | {"learning_rate": 3e-4}}
_ODD = [
    *(None, True, -1, 0, 1.5, 1e308, 10**400, float("inf"), float("nan"), "", " ", "\u202e", "\ud7ff", "a" * 5000),
    *("hf_" + "a" * 30, "https://me:pass@host/x", "../../etc/passwd", "\x00", "é" * 99, "!!python/object:os.system"),
    *([], {}, [[[[]]]], {"x": {"y": {"z": 1}}}, [1, "a", None], {"_target_": "os.system"}, "1e5", "no", "0x10", "~"),
]
_SNIPPETS = [
    *(
        b"!!python/object/apply:os.system ['true']",
        b"&a [*a]",
        b"*a",
        b"<<: {rank: 1}",
        b"? [a]",
        b"\t",
        b"\x00",
        b"\xff",
    ),
    *(b"\xef\xbb\xbf", b"{" * 200, b"[" * 5000, b": ", b"- ", b"#", b"'", b'"', b"|", b">", b"%YAML 9.9\n", b"---\n"),
    *(b"...\n", b"\xed\xa0\x80", b"9" * 5000, b"\r", b"\xc2\x85", b"1_000", b"0o7", b".inf", b"=", b"`", b"@", b"!x y"),
    *(b"2026-01-31", b"on", b"&", b"*", b"\\", b"\x1b[31m", b"!!binary aGk=", b"!!set {a}", b"!!timestamp x"),
]
# A line and column, or a key, or what is true of the file as a whole.
_PLACED = re.compile(
    r"line \d+, column \d+: |the file is empty|is too long for a recipe|a recipe is a mapping|"
    r"(unknown key |: )['\"\w.~<>=-]+|two tasks"
)

# Each guard of the reader on its own: what is added to the valid recipe, and what the refusal must say.
_NAMED: list[tuple[bytes, str]] = [
    (b"again: &a {x: 1}\nmore: *a\n", r"line 14, column 7: .*aliases are not allowed"),
    (b"again: !!str x\n", r"line 13, column 8: .*tags are not allowed"),
    (b"again: !mine {}\n", r"tags are not allowed"),
    (b"again: " + b"9" * 4001 + b"\n", r"a number of more than 4000 digits"),
    (b"again: " + b"[" * 40 + b"]" * 40 + b"\n", r"nested more than 32 deep"),
    (b"again: caf\xe9\n", r"line 13, column 11: not UTF-8; save it as UTF-8"),
    (b"again: \x07\n", r"line 13, column 8: not valid YAML"),
    (b"? [a]\n: 1\n", r"line 13, column 3: .*a key is a word"),
    (b"output: x\n", r"key 'output' is given twice"),
    (b"again: 1\n", r"unknown key"),
]


def _mangled(chance: random.Random) -> bytes:
    kind = chance.random()
    if kind < 0.45:
        content = copy.deepcopy(_WHOLE)
        for _ in range(chance.randrange(1, 4)):
            _mangle_tree(content, chance)
        return yaml.safe_dump(content, allow_unicode=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    text = bytearray(VALID.encode())
    for _ in range(chance.randrange(1, 6)):
        place = chance.randrange(len(text) + 1)
        action = chance.randrange(5)
        if action == 0:
            text[place:place] = chance.choice(_SNIPPETS)
        elif action == 1:
            del text[place : place + chance.randrange(1, 40)]
        elif action == 2:
            text[place:place] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 8)))
        elif action == 3:
            other = chance.randrange(len(text) + 1)
            text[place:place] = text[other : other + chance.randrange(1, 60)]
        else:
            del text[place:]
    return bytes(text)


def _mangle_tree(node: object, chance: random.Random) -> None:
    while isinstance(node, dict | list) and node:
        key = chance.choice(list(node)) if isinstance(node, dict) else chance.randrange(len(node))
        if chance.random() < 0.4:
            if chance.random() < 0.25:
                del node[key]
            elif chance.random() < 0.7 or isinstance(node, list):
                node[key] = chance.choice(_ODD)
            else:
                node[chance.choice([f"{key}s", f"{key}"[1:], "lora_r", "\n", "é", 5, None, 1.5])] = node.pop(key)
            return
        node = node[key]


def gate(count: int, folder: Path, seed: int = 0) -> Result:
    """Load `count` mangled recipes, a fifth of them with a mangled override."""
    result, chance, times, refused = Result("R1"), random.Random(seed), [], 0
    path = folder / "mangled.yaml"
    for number in range(count):
        path.write_bytes(_mangled(chance))
        override = [f"{chance.choice(['train.steps', 'data.tasks.9.name', 'x', 'adapter'])}={chance.choice(_ODD)}"]
        began = time.perf_counter()
        try:
            wrong = "" if isinstance(load_recipe(path, override if number % 5 == 0 else ()), Recipe) else "no recipe"
        except InputRefused as error:
            refused += 1
            wrong = _wrong_with(str(error), path, number % 5 == 0)
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}"
        times.append(time.perf_counter() - began)
        result.check(not wrong, f"recipe {number} of seed {seed}: {wrong}")
    for content, wanted in _NAMED:
        path.write_bytes(VALID.encode() + content)
        try:
            wrong = f"accepted: {load_recipe(path)}"
        except InputRefused as error:
            wrong = "" if re.search(wanted, str(error)) else str(error)
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}"
        result.check(not wrong, f"{content[:40]!r} is not refused by {wanted}: {wrong[:200]}")
    times.sort()
    result.numbers = {
        "refused": refused,
        "p99_ms": 1000 * times[int(0.99 * (count - 1))],
        "slowest_ms": 1000 * times[-1],
    }
    result.check(result.numbers["p99_ms"] < 100, f"p99 is {result.numbers['p99_ms']:.0f} ms")
    result.check(count * 0.5 < refused < count, f"{refused} refused")
    return result


def _wrong_with(message: str, path: Path, overridden: bool) -> str:
    if len(message.splitlines()) != 1 or not message.isprintable():
        return f"not one printable line: {message!r}"
    if str(path) not in message and not (overridden and "override" in message):
        return f"names no file: {message}"
    return "" if _PLACED.search(message.replace(str(path), "")) else f"names no place: {message}"
