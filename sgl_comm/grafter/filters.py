"""Which tensors are grafted: expressions over a tensor's tags, such as ``search("mlp", name) and layer in (3, 4)``.

An expression is a subset of Python's syntax, parsed once into functions of our own; nothing is evaluated as Python.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sgl_comm.errors import SglCommError

Tags = Mapping[str, Any]
"""Which tensor it is: its ``name``, and more names with text, numbers, booleans or None."""

_Node = Callable[[Tags], Any]

_MAX_LENGTH = 4096
_MAX_DIGITS = 18
_NUMBERS = (int, float)

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mod: operator.mod,
}
_FUNCTIONS = ("search", "match")
"""Methods of a compiled regular expression."""


@dataclass(frozen=True)
class Filter:
    """A parsed expression. Call it with a tensor's tags; True where they match.

    Allowed are tags by their name, text, numbers, ``True``, ``False``, ``None``, tuples and lists of these, ``and``,
    ``or``, ``not``, comparisons (``in`` and ``is`` too), ``+``, ``-`` and ``%`` of numbers, and
    ``search(pattern, tag)`` and ``match(pattern, tag)``: Python's regular expressions, anywhere in the text or at its
    start. A tag that a tensor does not have is None; a comparison or function of things that do not go together is
    False.
    """

    text: str
    names: frozenset[str]
    """The tags that the expression asks for."""
    _matches: _Node

    @staticmethod
    def parse(text: str, what: str = "filter") -> Filter:
        """Reads an expression; ``what`` names it in errors.

        Raises:
            SglCommError: no such expression, with what is not allowed in it.
        """
        if len(text) > _MAX_LENGTH:
            raise SglCommError(f"grafter: got a {what} of {len(text)} characters; expected at most {_MAX_LENGTH}")
        try:
            parsed = ast.parse(text.strip(), mode="eval")
            names: set[str] = set()
            matches = _Parser(names).node(parsed.body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            why = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
            raise SglCommError(
                f"grafter: got {what} {_short(text)}: {why}; expected an expression over tags, such as"
                " search('mlp', name) and layer == 3"
            ) from None
        return Filter(text, frozenset(names), matches)

    def __call__(self, tags: Tags) -> bool:
        try:
            return bool(self._matches(tags))
        except Exception:  # a tag that cannot be compared, such as a tensor
            return False


class _Parser:
    """Turns syntax into functions, and notes the tags that are named; a ValueError for whatever is not allowed."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def node(self, node: ast.expr) -> _Node:
        parse = getattr(self, f"_{type(node).__name__}", None)
        if parse is None:
            raise ValueError(f"{type(node).__name__} is not allowed")
        return parse(node)

    def _Constant(self, node: ast.Constant) -> _Node:
        value = node.value
        if not isinstance(value, (str, bool, int, float, type(None))):
            raise ValueError(f"a constant of type {type(value).__name__} is not allowed")
        if isinstance(value, int) and value.bit_length() > 60:
            raise ValueError(f"a number of more than {_MAX_DIGITS} digits is not allowed")
        return lambda tags: value

    def _Name(self, node: ast.Name) -> _Node:
        name = node.id
        if name in _FUNCTIONS:
            raise ValueError(f"{name} is a function: {name}('pattern', name)")
        if name.startswith("__"):
            raise ValueError(f"the name {name} is not allowed")
        self.names.add(name)
        return lambda tags: tags.get(name)

    def _Tuple(self, node: ast.Tuple | ast.List) -> _Node:
        parts = [self.node(part) for part in node.elts]
        return lambda tags: tuple(part(tags) for part in parts)

    _List = _Tuple

    def _BoolOp(self, node: ast.BoolOp) -> _Node:
        parts = [self.node(part) for part in node.values]
        if isinstance(node.op, ast.And):
            return lambda tags: all(part(tags) for part in parts)
        return lambda tags: any(part(tags) for part in parts)

    def _UnaryOp(self, node: ast.UnaryOp) -> _Node:
        part = self.node(node.operand)
        if isinstance(node.op, ast.Not):
            return lambda tags: not part(tags)
        if isinstance(node.op, ast.USub):

            def negative(tags: Tags) -> Any:
                value = part(tags)
                return -value if isinstance(value, _NUMBERS) else None

            return negative
        raise ValueError(f"{type(node.op).__name__} is not allowed")

    def _BinOp(self, node: ast.BinOp) -> _Node:
        if type(node.op) not in _ARITHMETIC:
            raise ValueError(f"{type(node.op).__name__} is not allowed")
        left, right, compute = self.node(node.left), self.node(node.right), _ARITHMETIC[type(node.op)]

        def arithmetic(tags: Tags) -> Any:
            a, b = left(tags), right(tags)
            if not isinstance(a, _NUMBERS) or not isinstance(b, _NUMBERS):
                return None
            try:
                return compute(a, b)
            except ArithmeticError:
                return None

        return arithmetic

    def _Compare(self, node: ast.Compare) -> _Node:
        parts = [self.node(part) for part in (node.left, *node.comparators)]
        compare = [_COMPARISONS[type(op)] for op in node.ops]

        def compared(tags: Tags) -> bool:
            left = parts[0](tags)
            for op, part in zip(compare, parts[1:], strict=True):
                right = part(tags)
                try:
                    if not op(left, right):
                        return False
                except TypeError:
                    return False
                left = right
            return True

        return compared

    def _Call(self, node: ast.Call) -> _Node:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in _FUNCTIONS:
            raise ValueError("a call of anything but search and match is not allowed")
        if len(node.args) != 2 or node.keywords:
            raise ValueError(f"{name} takes a pattern and a tag: {name}('pattern', name)")
        pattern, text = node.args
        if not isinstance(pattern, ast.Constant) or not isinstance(pattern.value, str):
            raise ValueError(f"the pattern of {name} must be a text in quotes")
        try:
            find = getattr(re.compile(pattern.value), name)
        except (re.error, OverflowError) as error:
            raise ValueError(f"{_short(pattern.value)} is no regular expression: {error}") from None
        tag = self.node(text)

        def found(tags: Tags) -> bool:
            value = tag(tags)
            return isinstance(value, str) and find(value) is not None

        return found


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
