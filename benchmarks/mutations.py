"""Mutants of a Python source: the same program with one small change, made on its syntax tree.

The operators are the usual ones of mutation testing: comparisons, `and` and `or`, arithmetic, constants (default arguments
among them), negated conditions, removed statements, `break` and `continue`, `return None`. Left alone is what no test can
or should see: annotations, docstrings, the text of messages, assertions, names of type variables.
"""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.MatMult: ast.Mult,
    ast.Break: ast.Continue,
    ast.Continue: ast.Break,
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SKIPPED = ("annotation", "returns", "decorator_list", "targets", "target", "exc", "cause")  # fields of nodes


@dataclass(frozen=True)
class Mutant:
    """One small change of a source."""

    line: int
    text: str  # of the line
    change: str  # "old -> new"
    old: ast.AST
    new: ast.AST
    source: ast.Module  # the tree that `old` is a node of

    def tree(self) -> ast.Module:
        """The changed program."""
        # What deepcopy's memo holds, it takes for copied already: so the copy has `new` in the place of `old`.
        return ast.fix_missing_locations(copy.deepcopy(self.source, {id(self.old): self.new}))


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of `source`, from its top to its end."""
    made = []
    lines = source.splitlines()
    tree = _prepared(source)
    for node in _visited(tree):
        for old, new, change in _changes(node):
            made.append(Mutant(node.lineno, lines[node.lineno - 1].strip(), change, old, new, tree))
    return sorted(made, key=lambda mutant: mutant.line)


def _prepared(source: str) -> ast.Module:
    """The tree, with operators of its own at each place (Python shares them), and each assignment knows if it may go."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            node.ops = [type(operator)() for operator in node.ops]
        elif isinstance(node, (ast.BoolOp, ast.BinOp, ast.AugAssign)):
            node.op = type(node.op)()
        elif isinstance(node, FUNCTIONS):
            bound = [argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)]
            bound += [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
            for child in ast.walk(node):
                if isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name):
                    child.rebound = bound.count(child.targets[0].id) > 1
    return tree


def _visited(node: Any) -> Iterator[Any]:
    """Each node that may be changed."""
    if hasattr(node, "lineno"):
        yield node
    for field, value in ast.iter_fields(node):
        if field not in SKIPPED:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not _is_left_alone(child):
                    yield from _visited(child)


def _is_left_alone(node: ast.AST) -> bool:
    if isinstance(node, (ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal)):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript) and ast.unparse(node)[0].isupper():
        return True  # the name of a type
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "TypeVar"


Change = tuple[ast.AST, ast.AST, str]  # the node or operator in the original, its replacement, what it says


def _changes(node: ast.AST) -> Iterator[Change]:
    """The changes of one node, of its operators, and of its test."""
    if isinstance(node, (ast.Break, ast.Continue)):
        yield _swap(node)
    elif isinstance(node, ast.Compare):
        yield from (_swap(operator) for operator in node.ops)
    elif isinstance(node, ast.BoolOp):
        yield _swap(node.op)
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        yield _swap(node.op)
    elif isinstance(node, ast.UnaryOp):
        yield _to(node, node.operand)
    elif isinstance(node, ast.Constant):
        yield from (_to(node, ast.Constant(value)) for value in _other_constants(node.value))
    elif isinstance(node, ast.Return) and not (node.value is None or ast.unparse(node.value) == "None"):
        yield _to(node, ast.Return(ast.Constant(None)))
    test = getattr(node, "test", None)
    if isinstance(test, ast.expr) and not isinstance(test, (ast.Compare, ast.UnaryOp)):  # these have a change of their own
        yield _to(test, ast.UnaryOp(ast.Not(), test))
    if _may_go(node):
        yield node, ast.Pass(), f"{ast.unparse(node)} -> pass"


def _may_go(statement: ast.AST) -> bool:
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, (ast.Constant, ast.Yield))
    if isinstance(statement, ast.Assign):  # a name without a value would be an error in itself
        return getattr(statement, "rebound", not isinstance(statement.targets[0], (ast.Name, ast.Tuple)))
    return isinstance(statement, (ast.AugAssign, ast.Raise, ast.Delete))


def _other_constants(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 1]
    if isinstance(value, str) and " " not in value:  # with a space, it is text for people
        return [f"{value}XX"]
    return []


def _swap(operator: ast.AST) -> Change:
    new = OPERATORS[type(operator)]()
    return operator, new, f"{type(operator).__name__} -> {type(new).__name__}"


def _to(old: ast.AST, new: ast.AST) -> Change:
    return old, new, f"{ast.unparse(old)} -> {ast.unparse(new)}"
