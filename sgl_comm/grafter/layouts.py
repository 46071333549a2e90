"""Layouts: which part of a full tensor each rank of a side holds.

A part is derived from the shapes that all ranks have sent each other, so that shards need not be of one size.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sgl_comm.errors import SglCommError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Which elements of a rank's tensor are which of the full one: a (start, stop) for each dimension of both."""

    local: tuple[tuple[int, int], ...]
    full: tuple[tuple[int, int], ...]

    @staticmethod
    def all_of(shape: Shape) -> Part:
        """All elements of a rank's tensor, which is the full one."""
        spans = tuple((0, size) for size in shape)
        return Part(spans, spans)

    def of_local(self, tensor: Tensor) -> Tensor:
        """The part as a view of the rank's tensor."""
        return tensor[tuple(slice(*span) for span in self.local)]

    def of_full(self, tensor: Tensor) -> Tensor:
        """The part as a view of the full tensor."""
        return tensor[tuple(slice(*span) for span in self.full)]


class Layout:
    """How the ranks of a side hold one tensor: ``Replicate``, ``Shard`` or ``Pad``."""

    def parts(self, shapes: Sequence[Shape]) -> tuple[Shape, list[Part]]:
        """The shape of the full tensor and every rank's part of it, by the shapes of all ranks' tensors, in rank order.

        Raises:
            SglCommError: shapes that cannot be parts of one tensor in this layout.
        """
        raise NotImplementedError

    def senders(self, world: int) -> range:
        """The ranks whose pieces make the full tensor; others have nothing to add."""
        return range(world)


@dataclass(frozen=True)
class Replicate(Layout):
    """Every rank has the full tensor."""

    def parts(self, shapes: Sequence[Shape]) -> tuple[Shape, list[Part]]:
        if len(set(shapes)) != 1:
            raise SglCommError(f"got shapes {_listed(shapes)} under {self}; expected one shape on all ranks")
        return shapes[0], [Part.all_of(shapes[0])] * len(shapes)

    def senders(self, world: int) -> range:
        return range(1)

    def __str__(self) -> str:
        return "Replicate"


@dataclass(frozen=True)
class Shard(Layout):
    """The ranks' tensors one after the other along ``dim``, in rank order, make the full tensor.

    Sizes along ``dim`` may differ.
    """

    dim: int

    def parts(self, shapes: Sequence[Shape]) -> tuple[Shape, list[Part]]:
        dim = _dim_of(self, self.dim, shapes)
        others = {shape[:dim] + shape[dim + 1 :] for shape in shapes}
        if len(others) != 1:
            raise SglCommError(f"got shapes {_listed(shapes)} under {self}; expected them to differ in dim {dim} alone")
        parts, start = [], 0
        for shape in shapes:
            part, stop = Part.all_of(shape), start + shape[dim]
            parts.append(Part(part.local, (*part.full[:dim], (start, stop), *part.full[dim + 1 :])))
            start = stop
        return (*shapes[0][:dim], start, *shapes[0][dim + 1 :]), parts

    def __str__(self) -> str:
        return f"Shard({self.dim})"


@dataclass(frozen=True)
class Pad(Layout):
    """Only the first ``size`` elements along ``dim`` are real; the rest is padding, neither sent nor written.

    ``of`` is how the ranks hold the padded tensor.
    """

    dim: int
    size: int
    of: Layout = Replicate()

    def parts(self, shapes: Sequence[Shape]) -> tuple[Shape, list[Part]]:
        padded, inner = self.of.parts(shapes)
        dim = _dim_of(self, self.dim, shapes)
        if not 0 <= self.size <= padded[dim]:
            raise SglCommError(
                f"got shapes {_listed(shapes)} under {self}; expected at least {self.size} elements along dim {dim}"
            )
        parts = []
        for part in inner:
            (first, _), (start, stop) = part.local[dim], part.full[dim]
            stop = min(stop, self.size)
            start = min(start, stop)
            local = (*part.local[:dim], (first, first + stop - start), *part.local[dim + 1 :])
            parts.append(Part(local, (*part.full[:dim], (start, stop), *part.full[dim + 1 :])))
        return (*padded[:dim], self.size, *padded[dim + 1 :]), parts

    def senders(self, world: int) -> range:
        return self.of.senders(world)

    def __str__(self) -> str:
        of = "" if self.of == Replicate() else f", {self.of}"
        return f"Pad({self.dim}, {self.size}{of})"


def as_layout(layout: Layout | str | None) -> Layout | None:
    """A layout, or one written as text: "Replicate", "Shard(0)", "Pad(0, 1000)", "Pad(1, 1000, Shard(1))".

    Raises:
        SglCommError: another text.
    """
    if not isinstance(layout, str):
        return layout
    try:
        return _layout_of(ast.parse(layout.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise SglCommError(
            f"grafter: got layout {layout[:80]!r}; expected Replicate, Shard(dim) or Pad(dim, size[, layout])"
        ) from None


def _layout_of(node: ast.expr) -> Layout:
    if isinstance(node, ast.Name) and node.id == "Replicate":
        return Replicate()
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.keywords:
        raise ValueError
    name, args = node.func.id, node.args
    if name == "Replicate" and not args:
        return Replicate()
    if name == "Shard" and len(args) == 1:
        return Shard(_number(args[0]))
    if name == "Pad" and len(args) in (2, 3):
        of = _layout_of(args[2]) if len(args) == 3 else Replicate()
        return Pad(_number(args[0]), _number(args[1]), of)
    raise ValueError


def _number(node: ast.expr) -> int:
    value = ast.literal_eval(node)
    if type(value) is not int or abs(value) > 1 << 48:
        raise ValueError
    return value


def _dim_of(layout: Layout, dim: int, shapes: Sequence[Shape]) -> int:
    ranks = {len(shape) for shape in shapes}
    if len(ranks) != 1 or not -min(ranks) <= dim < min(ranks):
        raise SglCommError(f"got shapes {_listed(shapes)} under {layout}; expected all of them to have that dim")
    return dim % min(ranks)


def _listed(shapes: Sequence[Shape]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def join(pieces: Sequence[Tensor], parts: Sequence[Part], shape: Shape) -> Tensor:
    """The full tensor, made of the pieces that were sent and their parts of it."""
    if len(pieces) == 1 and pieces[0].shape == shape:
        return pieces[0]
    full = pieces[0].new_empty(shape)
    for piece, part in zip(pieces, parts, strict=True):
        part.of_full(full).copy_(part.of_local(piece))
    return full
