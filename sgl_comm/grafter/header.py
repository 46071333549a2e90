"""The header that is sent before every tensor and says which one it is, in a frame of fixed size.

It is JSON, no pickle. Whatever a frame holds, reading it gives a ``Header`` or an error.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from sgl_comm.errors import SglCommError
from sgl_comm.grafter.layouts import Shape

FRAME_BYTES = 8192
_LENGTH_BYTES = 4
_MAX_DIMS = 64
_MAX_BYTES = 1 << 48

_DTYPE_NAMES = (
    *("float32", "bfloat16", "float16", "float64", "complex64", "complex128", "bool"),
    *("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPE_NAMES}
"""What can be sent: name -> dtype."""

Extras = dict[str, Any]
"""What a rank sends with its tensor to the transform on the other side: names with JSON's values."""


@dataclasses.dataclass(frozen=True)
class Header:
    """One rank's view of an exchange.

    Attributes:
        sequence: how many exchanges this rank has begun before.
        direction: "b2t" or "t2b".
        name, tags: which tensor; ``tags`` without the name and the rank.
        dtype, shape: the rank's tensor; empty where there is none.
        layout: the side's, as text; empty where tensors go from rank i to rank i.
        extras: for a transform.
        on_dtype, on_shape: what to do where they differ, as configured: "error", "cast" or "skip".
        problem: why this rank cannot take part; empty if it can. Then nobody sends.
    """

    sequence: int
    direction: str
    name: str
    tags: dict[str, Any]
    dtype: str
    shape: Shape
    layout: str = ""
    extras: Extras = dataclasses.field(default_factory=dict)
    on_dtype: str = "error"
    on_shape: str = "error"
    problem: str = ""

    def __str__(self) -> str:
        tags = "".join(f" {name}={value!r}" for name, value in sorted(self.tags.items()))
        tensor = f"{self.dtype}{list(self.shape)}" if self.dtype else "no tensor"
        layout = f" {self.layout}" if self.layout else ""
        return f"#{self.sequence} {self.direction} {self.name!r}{tags} {tensor}{layout}"

    def bytes(self) -> bytes:
        """As JSON, of at most a frame's size.

        Raises:
            SglCommError: something in it that JSON does not have, or it is too long.
        """
        try:
            text = json.dumps(vars(self), allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise SglCommError(f"got tags or extras that cannot be sent ({error}); expected JSON's values") from None
        if len(text) > FRAME_BYTES - _LENGTH_BYTES:
            raise SglCommError(
                f"got tags and extras of {len(text)} bytes; expected a header of at most {FRAME_BYTES - _LENGTH_BYTES}"
            )
        return text

    def frame(self) -> torch.Tensor:
        """uint8 of ``FRAME_BYTES``: the length, the JSON, zeros."""
        text = self.bytes()
        data = len(text).to_bytes(_LENGTH_BYTES, "little") + text
        return torch.frombuffer(bytearray(data.ljust(FRAME_BYTES, b"\0")), dtype=torch.uint8)


def read_frame(frame: bytes) -> Header:
    """A header out of a frame, which anyone may have written.

    Raises:
        SglCommError: it is none.
    """
    length = int.from_bytes(frame[:_LENGTH_BYTES], "little")
    if len(frame) != FRAME_BYTES or length > FRAME_BYTES - _LENGTH_BYTES:
        raise SglCommError(f"got a frame of {len(frame)} bytes that says {length}; expected a header")
    return read_header(frame[_LENGTH_BYTES : _LENGTH_BYTES + length])


def read_header(text: bytes) -> Header:
    """A header out of its JSON, which anyone may have written.

    Raises:
        SglCommError: it is none.
    """
    try:
        fields = json.loads(text.decode(), parse_constant=_refuse_constant)
        return _checked(fields)
    except (ValueError, RecursionError, KeyError, TypeError, OverflowError) as error:
        raise SglCommError(
            f"got {text[:80]!r}: {type(error).__name__}: {error}"[:400] + "; expected a header"
        ) from None


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not allowed")


_KINDS = {
    "sequence": int, "direction": str, "name": str, "tags": dict, "dtype": str, "shape": list, "layout": str,
    "extras": dict, "on_dtype": str, "on_shape": str, "problem": str,
}  # fmt: skip


def _checked(fields: Any) -> Header:
    if not isinstance(fields, dict) or fields.keys() != _KINDS.keys():
        raise ValueError("not a header's fields")
    for name, kind in _KINDS.items():
        if type(fields[name]) is not kind:
            raise ValueError(f"{name} is a {type(fields[name]).__name__}")
    if not 0 <= fields["sequence"] < 1 << 62:
        raise ValueError("the sequence is out of range")
    if fields["direction"] not in ("b2t", "t2b"):
        raise ValueError("no such direction")
    if any(policy not in ("error", "cast", "skip") for policy in (fields["on_dtype"], fields["on_shape"])):
        raise ValueError("no such policy")
    if fields["dtype"] and fields["dtype"] not in DTYPES:
        raise ValueError("no such dtype")
    shape = fields["shape"]
    if len(shape) > _MAX_DIMS or any(type(size) is not int or not 0 <= size < _MAX_BYTES for size in shape):
        raise ValueError("no shape")
    itemsize = DTYPES[fields["dtype"]].itemsize if fields["dtype"] else 1
    if math.prod(max(size, 1) for size in shape) * itemsize > _MAX_BYTES:
        raise ValueError("more bytes than any memory has")
    if any(not isinstance(value, (str, int, float, type(None))) for value in fields["tags"].values()):
        raise ValueError("a tag that is no text, number, boolean or None")
    return Header(**{**fields, "shape": tuple(shape)})


def tags_of(tags: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A tensor's name and its other tags.

    Raises:
        SglCommError: no name, or a tag that is no text, finite number, boolean or None.
    """
    name = tags.get("name")
    if not isinstance(name, str) or not name:
        raise SglCommError(f"got tags {dict(tags)!r}; expected a 'name' among them, a text")
    for tag, value in tags.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        if not isinstance(tag, str) or not isinstance(value, (str, int, float, type(None))) or not finite:
            raise SglCommError(f"got tag {tag!r} of {value!r}; expected a text, a finite number, a boolean or None")
    return name, {tag: value for tag, value in tags.items() if tag not in ("name", "rank")}
