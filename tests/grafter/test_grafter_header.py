"""What is on the wire before a tensor: any bytes at all give a header or an error."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.grafting import grafted, systems
from sgl_comm import SglCommError
from sgl_comm.grafter import header as header_module
from sgl_comm.grafter.header import DTYPES, FRAME_BYTES, Header, read_frame, read_header, tags_of
from sgl_comm.testing import RankContext

HEADER = Header(
    sequence=7, direction="b2t", name="layers.3.mlp", tags={"layer": 3, "hot": True, "scale": 0.5, "of": None},
    dtype="bfloat16", shape=(4, 128), layout="Shard(1)", extras={"rank": 1, "sizes": [1, 2]}, on_dtype="cast",
)  # fmt: skip

CASES = 100_000


def test_a_header_comes_back_as_it_was() -> None:
    frame = HEADER.frame()
    assert frame.shape == (FRAME_BYTES,)
    assert frame.dtype == torch.uint8
    assert read_frame(bytes(frame.numpy())) == HEADER
    for name, dtype in DTYPES.items():
        assert str(dtype) == f"torch.{name}"
        assert read_header(dataclasses.replace(HEADER, dtype=name).bytes()).dtype == name


def hostile_texts(chance: random.Random) -> Iterator[bytes]:
    """No headers, each of them in another way."""
    text = HEADER.bytes()
    fields = json.loads(text)
    junk: list[Any] = [
        None, True, -1, 1 << 70, 1e308, "", "\0", "x" * 5000, [], [[]], {}, {"a": {}}, [-1], [1 << 50, 1 << 50], ["1"],
        [1.5], [True] * 65, {"name": []}, {"a": [1]}, {"a": {"b": 1}}, "b2t ", "float128", "__import__('os')",
    ]  # fmt: skip
    while True:
        kind = chance.randrange(7)
        if kind == 0:
            yield chance.randbytes(chance.randrange(0, 300))
        elif kind == 1:
            yield text[: chance.randrange(0, len(text))]
        elif kind == 2:  # a field of another type, or none, or one too many
            broken = dict(fields)
            name = chance.choice(list(fields))
            change = chance.randrange(3)
            if change == 0:
                del broken[name]
            elif change == 1:
                broken[f"{name}_"] = chance.choice(junk)
            else:
                others = [value for value in junk if type(value) is not type(fields[name])]
                broken[name] = chance.choice(others)
            yield json.dumps(broken).encode()
        elif kind == 3:  # a value that cannot be, of the right type
            bad = {
                "sequence": [-1, 1 << 62, -(1 << 80)], "direction": ["", "t2t", "B2T"],
                "dtype": ["float", "torch.int8"],
                "shape": [[-1], [1 << 49], [1 << 30, 1 << 30], [1.0], [None], [[2]], [1] * 65],
                "tags": [{"a": []}, {"a": {}}], "on_dtype": ["", "ignore"], "on_shape": ["Error", "broadcast"],
            }  # fmt: skip
            name = chance.choice(list(bad))
            yield json.dumps({**fields, name: chance.choice(bad[name])}).encode()
        elif kind == 4:  # deep, or not JSON
            deep = chance.choice([b"[", b'{"a":', b'"\\ud800', b"NaN", b"9" * 4000, b"-" * 100, b"\xff\xfe"])
            yield (deep * chance.randrange(1, 1500))[: FRAME_BYTES - 4]
        elif kind == 5:  # what a pickle looks like
            yield b"\x80\x04\x95" + chance.randbytes(30) + b"."
        else:  # an infinity or NaN inside
            constant = chance.choice([b"NaN", b"Infinity", b"-Infinity"])
            yield text.replace(b"0.5", constant)


def test_hostile_headers_give_errors_alone() -> None:
    chance = random.Random(1)
    texts = hostile_texts(chance)
    for number in range(CASES // 2):
        text = next(texts)
        with pytest.raises(SglCommError):
            read_header(text)
        assert number >= 0


def test_hostile_frames_give_a_header_or_an_error() -> None:
    """Changed bytes anywhere in a frame. What is read as a header is one: its bytes say the same again."""
    chance = random.Random(2)
    frame = bytes(HEADER.frame().numpy())
    length = int.from_bytes(frame[:4], "little")
    read = 0
    for _ in range(CASES // 2):
        changed = bytearray(frame)
        for _ in range(chance.choice((1, 1, 2, 8, 60))):
            changed[chance.randrange(0, length + 8)] = chance.randrange(256)
        if chance.randrange(10) == 0:
            changed = changed[: chance.randrange(FRAME_BYTES)]
        try:
            found = read_frame(bytes(changed))
        except SglCommError:
            continue
        read += 1
        assert read_header(found.bytes()) == found
        assert found.dtype == "" or found.dtype in DTYPES
        assert torch.Size(found.shape).numel() >= 0
    assert 0 < read < CASES // 4  # most changes are seen; one inside a text is not


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({}, "expected a 'name' among them"),
        ({"name": 3}, "expected a 'name' among them"),
        ({"name": ""}, "expected a 'name' among them"),
        ({"name": "x", "layer": [3]}, "got tag 'layer' of [3]; expected a text"),
        ({"name": "x", "layer": float("nan")}, "got tag 'layer' of nan"),
        ({"name": "x", 3: 4}, "got tag 3 of 4"),
    ],
)
def test_tags_that_cannot_be_sent_are_refused(tags: dict[Any, Any], words: str) -> None:
    with pytest.raises(SglCommError) as caught:
        tags_of(tags)
    assert words in str(caught.value)


def test_what_cannot_be_a_header_is_refused_before_it_is_sent() -> None:
    with pytest.raises(SglCommError, match="expected a header of at most 8188"):
        dataclasses.replace(HEADER, extras={"a": "x" * FRAME_BYTES}).bytes()
    for bad in (object(), {1, 2}, float("inf"), b"x"):
        with pytest.raises(SglCommError, match="expected JSON's values"):
            dataclasses.replace(HEADER, extras={"a": bad}).bytes()


def with_hostile_frames(ctx: RankContext, fields: dict[str, Any], report_dir: str, calls: list[dict[str, Any]]) -> Any:
    """The baseline sends no header but something else."""
    if fields["role"] == "baseline":
        chance = random.Random(3)

        def hostile(header: Header) -> torch.Tensor:
            return torch.frombuffer(bytearray(chance.randbytes(FRAME_BYTES)), dtype=torch.uint8)

        patch = pytest.MonkeyPatch()
        patch.setattr(header_module.Header, "frame", hostile)
        try:
            return grafted(ctx, fields, report_dir, calls)
        finally:
            patch.undo()
    return grafted(ctx, fields, report_dir, calls)


def test_a_receiver_of_hostile_frames_keeps_its_tensor_and_leaves(tmp_path: Path) -> None:
    values = {"baseline": [torch.ones(3)], "target": [torch.full((3,), 2.0)]}
    calls = [{"values": values, "tags": {"name": "x"}}] * 2
    with systems((1, 1)) as both:
        _, (target,) = both.run(with_hostile_frames, str(tmp_path), calls, b2t_filter="True")
    assert [found.tolist() for found in target["found"]] == [[2.0] * 3] * 2
    assert target["counts"] == {"faults": 1, "skipped": 1}
    assert "baseline rank 0 sent what is no header" in target["off"]
