"""As much of Go's text/template as Modelfiles of ours use: range, if, else if, else, end, eq, and, len, slice, fields.

Actions stand in `{{ }}` with a space on each side and trim nothing; a pipeline is a name, a literal, or a function of
terms in parentheses. Source: https://pkg.go.dev/text/template, and Ollama's `Messages`, `Role`, `Content`.
"""

import json
import re
from itertools import pairwise
from typing import Any

Message = dict[str, str]
_INNER = r"\((?:[^()]|\([^()]*\))*\)"
_TERM = re.compile(rf"\((?:[^()]|{_INNER})*\)|\"(?:[^\"\\]|\\.)*\"|\S+")


def evaluate(template: str, messages: list[Message]) -> str:
    """Return the text of a conversation."""
    evaluation = _Evaluation(re.split(r"\{\{ (.*?) \}\}", template), messages)
    evaluation.run(0, len(evaluation.pieces), {})
    return "".join(evaluation.out)


class _Evaluation:
    """Pieces are text and actions in turn."""

    def __init__(self, pieces: list[str], messages: list[Message]) -> None:
        self.pieces, self.messages = pieces, messages
        self.out: list[str] = []

    def run(self, start: int, stop: int, scope: dict[str, Any]) -> None:
        at = start
        while at < stop:
            action = self.pieces[at]
            if at % 2 == 0:
                self.out.append(action)
                at += 1
            elif action.startswith("range $i, $m := "):
                (end,) = self.branches_of(at)
                for place, message in enumerate(self.value(action.partition(":= ")[2], scope)):
                    self.run(at + 1, end, {"$i": place, "$m.Role": message["role"], "$m.Content": message["content"]})
                at = end + 1
            elif action.startswith("if "):
                at = self.choose([at, *self.branches_of(at)], scope) + 1
            else:
                self.out.append(self.value(action, scope))
                at += 1

    def choose(self, branches: list[int], scope: dict[str, Any]) -> int:
        """Run the first branch whose condition is true; return the place of the end."""
        for place, following in pairwise(branches):
            condition = self.pieces[place].removeprefix("else").strip().removeprefix("if").strip()
            if not condition or self.value(condition, scope):
                self.run(place + 1, following, scope)
                break
        return branches[-1]

    def branches_of(self, at: int) -> list[int]:
        """Return the places of an action's elses and of its end."""
        depth, found = 0, []
        for place in range(at + 2, len(self.pieces), 2):
            action = self.pieces[place]
            depth += action.startswith(("if ", "range "))
            if action.startswith("else") and not depth:
                found.append(place)
            if action == "end":
                if not depth:
                    return [*found, place]
                depth -= 1
        raise AssertionError(f"no end of {self.pieces[at]}")

    def value(self, text: str, scope: dict[str, Any]) -> Any:
        if text.startswith('"'):
            return json.loads(text)
        if text.isdigit():
            return int(text)
        if text.startswith("("):
            return self.value(text[1:-1], scope)
        name, *rest = _TERM.findall(text)
        given = [self.value(each, scope) for each in rest]
        if given:
            return _FUNCTIONS[name](*given)
        return (scope | {"$.Messages": self.messages, ".Messages": self.messages})[name]


_FUNCTIONS = {
    "eq": lambda first, second: first == second,
    "and": lambda first, second: first and second,
    "len": len,
    "slice": lambda of, start: of[start:],
}
