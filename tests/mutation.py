"""Removing a guard from the source, to see that its gate notices: each edit is anchored by function and syntax node.

A place is `file.py:Class.function`, or `file.py` for what stands outside functions; inside it an edit finds the one
node of its kind that mentions all of some words: names, attributes, keywords, literals. So a line may be reworded, and
its function moved inside its file, without a list of edits falling out of step.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Node = ast.AST
Words = tuple[str, ...]


@dataclass(frozen=True)
class Edit:
    """What is done to one node: `kind` of node, the `words` it mentions, and the source that takes its place."""

    kind: str
    words: Words
    by: str

    def __str__(self) -> str:
        return f"{self.kind} of {' '.join(self.words)} -> {self.by}"


@dataclass(frozen=True)
class Mutant:
    """One guard lost: where, and how."""

    where: str
    edit: Edit

    @property
    def file(self) -> str:
        return self.where.partition(":")[0]

    def __str__(self) -> str:
        return f"{self.where}: {self.edit}"

    def applied(self, source: str) -> str:
        """Return the source of the file with the guard lost. Raises LookupError where the anchor finds not one node."""
        return _replaced(source, self.node_in(ast.parse(source)), self.edit.by)

    def node_in(self, tree: ast.Module) -> Node:
        """Return the node that is edited. Raises LookupError where there is not exactly one."""
        scope = _function(tree, self.where.partition(":")[2])
        found = [node for node in _KINDS[self.edit.kind](scope) if set(self.edit.words) <= set(mentioned(node))]
        # Of nodes inside each other the innermost is meant: `a and (b or c)` mentions b twice over.
        found = [node for node in found if not any(other is not node and _holds(node, other) for other in found)]
        if len(found) != 1:
            raise LookupError(f"{self}: {len(found)} nodes, where one should be")
        return found[0]


def never(where: str, *words: str) -> Mutant:
    """The condition that mentions the words is never true."""
    return Mutant(where, Edit("condition", words, "False"))


def always(where: str, *words: str) -> Mutant:
    """The condition that mentions the words is always true."""
    return Mutant(where, Edit("condition", words, "True"))


def without(where: str, *words: str) -> Mutant:
    """The statement that mentions the words is not there."""
    return Mutant(where, Edit("statement", words, "pass"))


def unfinished(where: str, *words: str) -> Mutant:
    """The statement of a `finally` that mentions the words is not there."""
    return Mutant(where, Edit("last", words, "pass"))


def ignoring(where: str, *words: str, as_if: bool = False) -> Mutant:
    """The operand of `and` or `or` that mentions the words counts as `as_if`."""
    return Mutant(where, Edit("operand", words, str(as_if)))


def uncaught(where: str, *words: str, by: str = "ZeroDivisionError") -> Mutant:
    """The handler that names the errors catches another."""
    return Mutant(where, Edit("caught", words, by))


def instead(where: str, *words: str, by: str) -> Mutant:
    """The innermost expression that mentions the words is another."""
    return Mutant(where, Edit("expression", words, by))


def doing(where: str, *words: str, by: str) -> Mutant:
    """The statement that mentions the words is another."""
    return Mutant(where, Edit("statement", words, by))


def mentioned(node: Node) -> Iterator[str]:
    """Yield every word in a node: names, attributes, keywords, arguments, and literals as they are written."""
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            yield each.id
        elif isinstance(each, ast.Attribute):
            yield each.attr
        elif isinstance(each, ast.keyword | ast.arg) and each.arg:
            yield each.arg
        elif isinstance(each, ast.Constant):
            yield each.value if isinstance(each.value, str) else repr(each.value)
        elif isinstance(each, ast.Not | ast.NotEq | ast.NotIn | ast.IsNot | ast.Continue | ast.Return):
            yield {ast.NotEq: "!=", ast.NotIn: "not in", ast.IsNot: "is not"}.get(
                type(each), type(each).__name__.lower()
            )


def _conditions(scope: Node) -> Iterator[Node]:
    for node in ast.walk(scope):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs


def _statements(scope: Node) -> Iterator[Node]:
    compound = ast.If | ast.For | ast.While | ast.With | ast.Try | ast.FunctionDef | ast.ClassDef
    yield from (
        node
        for node in ast.walk(scope)
        if isinstance(node, ast.stmt) and not isinstance(node, compound) and node is not scope
    )


def _operands(scope: Node) -> Iterator[Node]:
    for node in ast.walk(scope):
        if isinstance(node, ast.BoolOp):
            yield from node.values


def _last(scope: Node) -> Iterator[Node]:
    for node in ast.walk(scope):
        if isinstance(node, ast.Try):
            yield from node.finalbody


def _caught(scope: Node) -> Iterator[Node]:
    for node in ast.walk(scope):
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            yield node.type


def _expressions(scope: Node) -> Iterator[Node]:
    yield from (node for node in ast.walk(scope) if isinstance(node, ast.expr))


_KINDS: dict[str, Callable[[Node], Iterator[Node]]] = {
    "condition": _conditions,
    "statement": _statements,
    "operand": _operands,
    "last": _last,
    "caught": _caught,
    "expression": _expressions,
}


def _holds(outer: Node, inner: Node) -> bool:
    return any(each is inner for each in ast.walk(outer))


def _function(tree: ast.Module, path: str) -> Node:
    scope: ast.Module | ast.FunctionDef | ast.ClassDef = tree
    for name in path.split(".") if path else ():
        inside = [node for node in scope.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
        if len(inside) != 1:
            raise LookupError(f"{len(inside)} definitions of {path}")
        scope = inside[0]
    return scope


def _replaced(source: str, node: Node, by: str) -> str:
    lines = source.encode().splitlines(keepends=True)  # columns count bytes
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    assert isinstance(node, ast.expr | ast.stmt) and node.end_lineno and node.end_col_offset is not None
    begin = starts[node.lineno - 1] + node.col_offset
    end = starts[node.end_lineno - 1] + node.end_col_offset
    whole = b"".join(lines)
    return (whole[:begin] + by.encode() + whole[end:]).decode()
