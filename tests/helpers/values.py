"""Values for tests: dtypes, shapes, random and awkward numbers, and in which layout each rank holds them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sgl_comm import testing
from sgl_comm.testing import Layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the package sums by itself."""

EVERY_DTYPE = (
    *DTYPES,
    torch.float64,
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    torch.bool,
    *(torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex64, torch.complex128),
)
"""What is moved, bit for bit."""

ROW_SHAPES: tuple[tuple[int, ...], ...] = (
    *((0,), (0, 3), (4, 0)),
    *((1,), (1, 1)),
    (7,),
    *((8,), (2, 4)),
    *((1000,), (10, 100), (5, 10, 20)),
    *((26, 40), (2, 4, 10, 13)),
)
"""Shapes of which every layout is tried, for ops that join or divide rows."""


def name_of(*words: object) -> str:
    return " ".join(str(word).removeprefix("torch.") for word in words)


def generator(*words: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name_of(*words).encode()))


@functools.lru_cache(maxsize=1)
def _random_numbers(world: int, shape: tuple[int, ...], seed: str) -> list[Tensor]:
    random_bits = generator(world, shape, seed)

    def one() -> Tensor:
        exponents = torch.randint(-10, 11, shape, generator=random_bits)
        return torch.ldexp(torch.randn(shape, generator=random_bits), exponents)

    return [one() for _ in range(world)]


def random_values(world: int, shape: Sequence[int], dtype: torch.dtype, *seed: object) -> list[Tensor]:
    """Every rank's values, of such different magnitudes that the sum depends on the order and on fp32."""
    return [x.to(dtype) for x in _random_numbers(world, tuple(shape), name_of(*seed))]


def random_bytes(world: int, shape: Sequence[int], dtype: torch.dtype, *seed: object) -> list[Tensor]:
    """Every rank's values: any bits at all, NaN of every payload among them; for bool, zeros and ones."""
    size = torch.empty(tuple(shape), device="meta").numel() * dtype.itemsize
    random_bits = generator(world, shape, dtype, *seed)

    def one() -> Tensor:
        words = torch.empty(-(-size // 8), dtype=torch.int64).random_(-(2**63), None, generator=random_bits)
        some = words.view(torch.uint8)[:size]
        return some & 1 if dtype == torch.bool else some

    return [one().view(dtype).view(tuple(shape)) for _ in range(world)]


def layouts_of_ranks(shape: Sequence[int], world: int, in_place: bool = False) -> Iterator[tuple[str, list[Layout]]]:
    """Every layout on all ranks alike; then layouts that differ between the ranks. Each with its name."""
    usable = [layout for layout in testing.layouts(shape).values() if not (in_place and layout.overlaps)]
    mixed = [usable[(rank + in_place) % len(usable)] for rank in range(world)]
    for ranks in [*([layout] * world for layout in usable), mixed]:
        yield "+".join(dict.fromkeys(layout.name for layout in ranks)), ranks


def awkward_values(world: int, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Kinds of values, each with every rank's 1-D tensor."""
    info = torch.finfo(dtype)
    words = torch.int32 if dtype.itemsize == 4 else torch.int16
    mantissa_bits = round(-torch.tensor(info.eps).log2().item())
    special = testing.special_values(dtype)
    pairs = special.view(-1, 2)
    random_bits = generator(world, dtype, "awkward")

    def below(limit: int, count: int = 2048) -> Tensor:
        return torch.randint(limit, (count,), generator=random_bits)

    def picked(*choices: float) -> list[Tensor]:
        table = torch.tensor(choices, dtype=torch.float64).to(dtype)
        return [table[below(len(table))] for _ in range(world)]

    def grid() -> list[Tensor]:
        """Each value with each of ranks 0, 1 and 2; chance picks those of further ranks."""
        count = len(special) ** min(world, 3)
        positions = torch.arange(count)
        return [
            special[positions // len(special) ** rank % len(special) if rank < 3 else below(len(special), count)]
            for rank in range(world)
        ]

    def subnormals() -> list[Tensor]:
        bits = [(below((1 << mantissa_bits) - 1) + 1, below(2)) for _ in range(world)]
        return [torch.where(sign > 0, -1, 1) * size.to(words).view(dtype) for size, sign in bits]

    def ties() -> list[Tensor]:
        """Half way between two neighbours, and a hair above or below it where there is a third rank."""
        first = 1 + torch.arange(1024, dtype=torch.float64) % (1 << mantissa_bits) * info.eps
        half = torch.full((1024,), info.eps / 2, dtype=torch.float64)
        half[512:] *= -1
        hair = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)[below(3, 1024)] * info.eps / 128
        rest = [torch.zeros(1024, dtype=torch.float64)] * max(0, world - 3)
        return [x.to(dtype) for x in [first, half, hair, *rest][:world]]

    return {
        "special": [pairs[below(len(pairs), 1024)].flatten() for _ in range(world)],
        "special grid": grid(),
        "sentinel words": [torch.full((1030,), -1, dtype=words).view(dtype)] * world,
        "zeros": picked(0.0, -0.0),
        "infinities": picked(float("inf"), -float("inf"), 1.0),
        "integers": picked(*range(-8, 9)),
        "overflow": picked(info.max, info.max / 2, info.max / 4, info.min, info.min / 2),
        "subnormals": subnormals(),
        "ties": ties(),
    }


def signal_like_values() -> dict[str, Tensor]:
    """What a kernel may use as a signal, NaN payloads, zeros of both signs, subnormals: a move must change none."""
    return {
        "-1 as int32": torch.full((4099,), -1, dtype=torch.int32),
        "-2 as int32": torch.full((4099,), -2, dtype=torch.int32),
        "-1 as int64": torch.full((300_000,), -1, dtype=torch.int64),
        "-1 as int8": torch.full((4099,), -1, dtype=torch.int8),
        "0xff as fp8": torch.full((4099,), 255, dtype=torch.uint8).view(torch.float8_e5m2),
        "zeros": torch.zeros(1030, dtype=torch.int32),
        "true": torch.ones(1031, dtype=torch.bool),
        **{name_of("special", dtype): testing.special_values(dtype) for dtype in (*DTYPES, torch.float64)},
    }
