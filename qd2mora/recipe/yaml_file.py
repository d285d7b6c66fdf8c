"""Reading a recipe's YAML: safe, no surprises, and every mistake named with its line.

YAML 1.2's idea of a number (`1e-4` is one, `1:30` is not); duplicate keys, aliases and tags refused, size and depth
limited.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import TypeAlias

import yaml

from qd2mora.errors import InputRefused

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_DIGITS = 4000  # Python itself converts no longer ones


YamlValue: TypeAlias = object
"""What a text in YAML says: mappings, lists and plain values, not checked yet."""
Inner: TypeAlias = dict[str, object] | list[object]


def _marked(problem: str, place: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    mark = place.start_mark
    assert isinstance(mark, yaml.error.Mark)  # what the loader in Python makes; the one in C has marks of its own
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """SafeLoader that knows `1e-4` as a float and refuses duplicate keys, aliases, tags and depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if self.depth > MAX_DEPTH:
            raise _marked(f"nested more than {MAX_DEPTH} deep", event)
        if isinstance(event, yaml.AliasEvent):
            raise _marked("aliases are not allowed in a recipe", event)
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag:
            # SafeLoader would do no harm, but it crashes on some, such as `!!bool x` (PyYAML 6.0.3).
            raise _marked("tags are not allowed in a recipe", event)
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and _LONG_INTEGER.match(event.value):
            raise _marked(f"a number of more than {MAX_DIGITS} digits", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _marked("a key is a word", key_node)
            if key_node.value in seen:
                raise _marked(f"key {key_node.value!r} is given twice", key_node)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which `_Loader` would read as a number, such as `1e5`."""


_LONG_INTEGER = re.compile(rf"[-+]?[0-9]{{{MAX_DIGITS}}}")
# PyYAML follows YAML 1.1, where a float needs a dot and a signed exponent, `on` is true, 010 is 8, 1:30 is 90 and
# 2026-01-31 is a date, `<<` merges and `=` is a value of no kind; people mean YAML 1.2.
_KINDS = ("float", "bool", "int", "timestamp", "merge", "value")
_REPLACED = tuple(f"tag:yaml.org,2002:{kind}" for kind in _KINDS)
_FLOAT = re.compile(r"^[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF|nan|NaN|NAN))$", re.ASCII)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
for _place in (_Loader, _Dumper):
    _place.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, where: str) -> YamlValue:
    """Parse YAML text; `where` names it in errors. Raises InputRefused with the line."""
    if len(text) > MAX_BYTES:
        raise InputRefused(f"{where}: {len(text)} bytes is too long for a recipe (limit {MAX_BYTES})")
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "line 1, column 1"
        if mark:
            place = f"line {mark.line + 1}, column {mark.column + 1}"
        raise InputRefused(f"{where}, {place}: not valid YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        raise InputRefused(f"{where}, {_end_of(text[: error.position])}: not valid YAML: {error.reason}") from error


def _end_of(before: str) -> str:
    """Name the place behind a text."""
    return f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"


def dump_yaml(content: dict[str, object]) -> str:
    """Return YAML text that `parse_yaml` reads back equal."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)


def read_mapping(path: Path, key: str | None = None) -> dict[str, object]:
    """Read a YAML file into a plain mapping: a recipe, or what an option `key` names. Raises InputRefused."""
    try:
        return _mapping(path)
    except FileNotFoundError:
        if key is not None:
            raise InputRefused(f"{key}: no file '{path}'") from None
        raise InputRefused(f"{path}: no such recipe; `qd2mora recipes` lists those that come along") from None


def _mapping(path: Path) -> dict[str, object]:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise InputRefused(f"{path}: cannot be read as a recipe: not an ordinary file")
        if size > MAX_BYTES:
            raise InputRefused(f"{path}: {size} bytes is too long for a recipe (limit {MAX_BYTES})")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        place = _end_of(error.object[: error.start].decode(errors="replace"))
        raise InputRefused(f"{path}, {place}: not UTF-8; save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise InputRefused(f"{path}: cannot be read as a recipe: {error}") from error
    content = parse_yaml(text, str(path))
    if content is None:
        raise InputRefused(f"{path}: the file is empty; `qd2mora recipes quickstart` prints one to start from")
    if not isinstance(content, dict):
        raise InputRefused(f"{path}: a recipe is a mapping of keys, this is a {type(content).__name__}")
    return content


def apply_override(content: dict[str, object], override: str) -> None:
    """Set one dotted `key=value` in place; a number in the path indexes a list. Raises InputRefused."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise InputRefused(f"override {override!r}: write key=value, for example train.steps=100")
    override = f"{path}=..."  # the value may be a secret under a key that does not exist
    value = parse_yaml(text, f"override {override!r}")
    keys = path.split(".")
    node: Inner = content
    for key in keys[:-1]:
        node = _descend(node, key, override)
    if isinstance(node, list):
        node[_list_index(node, keys[-1], override)] = value
    else:
        node[keys[-1]] = value


def _descend(node: Inner, key: str, override: str) -> Inner:
    if isinstance(node, list):
        child = node[_list_index(node, key, override)]
    else:
        child = node.setdefault(key, {})
        if child is None:
            child = node[key] = {}
    if not isinstance(child, dict | list):
        raise InputRefused(f"override {override!r}: {key!r} holds a value ({child!r}), not a section")
    return child


def _list_index(node: list[object], key: str, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(node):
        known = "is a position in a list that is empty"
        if node:
            known = f"should be a position from 0 to {len(node) - 1}"
        raise InputRefused(f"override {override!r}: {key!r} {known}")
    return int(key)


__all__ = ["apply_override", "dump_yaml", "parse_yaml", "read_mapping"]
