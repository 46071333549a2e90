"""The oracle itself, against sums made bit by bit with whole numbers."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from sgl_comm import reference, testing

FORMATS = {torch.float32: (8, 23), torch.bfloat16: (8, 7), torch.float16: (5, 10)}
"""Bits of exponent and of mantissa."""

INTS = {4: torch.int32, 2: torch.int16}


def words_of(x: Tensor) -> list[int]:
    width = 8 * x.element_size()
    return [word % (1 << width) for word in x.reshape(-1).view(INTS[x.element_size()]).tolist()]


def tensor_of(words: Sequence[int], dtype: torch.dtype) -> Tensor:
    width = 8 * dtype.itemsize
    signed = [word - (1 << width) if word >> (width - 1) else word for word in words]
    return torch.tensor(signed, dtype=INTS[dtype.itemsize]).view(dtype)


def decoded(word: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The value of a word; every value of these formats is a double too."""
    sign = -1.0 if word >> (exponent_bits + mantissa_bits) else 1.0
    exponent = word >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = word & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == (1 << exponent_bits) - 1:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits)


def rounded(value: Fraction, exponent_bits: int, mantissa_bits: int) -> int:
    """The word nearest to a number other than zero, ties to the even one, without its sign bit."""
    bias = (1 << (exponent_bits - 1)) - 1
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent  # now 2**exponent <= magnitude < 2**(exponent + 1)
    exponent = max(exponent, 1 - bias)
    steps = magnitude / Fraction(2) ** (exponent - mantissa_bits)
    whole, rest = divmod(steps.numerator, steps.denominator)
    whole += 2 * rest > steps.denominator or (2 * rest == steps.denominator and whole % 2 == 1)
    word = whole + ((exponent + bias - 1) << mantissa_bits)  # a carry goes into the exponent by itself
    return min(word, ((1 << exponent_bits) - 1) << mantissa_bits)


def added(a: float, b: float, exponent_bits: int, mantissa_bits: int) -> float:
    """a + b, rounded to a format."""
    if not (math.isfinite(a) and math.isfinite(b)) or (a == 0 and b == 0):
        return a + b
    total = Fraction(a) + Fraction(b)
    if total == 0:
        return 0.0
    size = decoded(rounded(total, exponent_bits, mantissa_bits), exponent_bits, mantissa_bits)
    return -size if total < 0 else size


def word_of_sum(words: Sequence[int], dtype: torch.dtype) -> int | None:
    """The word of the sum by the package's rule; None for any NaN."""
    exponent_bits, mantissa_bits = FORMATS[dtype]
    total = decoded(words[0], exponent_bits, mantissa_bits)
    for word in words[1:]:
        total = added(total, decoded(word, exponent_bits, mantissa_bits), 8, 23)
    if math.isnan(total):
        return None
    sign = (math.copysign(1.0, total) < 0) << (exponent_bits + mantissa_bits)
    if total == 0:
        return sign
    if math.isinf(total):
        return sign | ((1 << exponent_bits) - 1) << mantissa_bits
    return sign | rounded(Fraction(total), exponent_bits, mantissa_bits)


def check(inputs: Sequence[Tensor]) -> None:
    dtype = inputs[0].dtype
    found = reference.all_reduce(inputs)
    assert found.dtype == dtype
    assert found.shape == inputs[0].shape
    assert found.is_contiguous()
    columns = zip(*(words_of(x) for x in inputs), strict=True)
    for words, got, value in zip(columns, words_of(found), found.reshape(-1).tolist(), strict=True):
        want = word_of_sum(words, dtype)
        shown = [hex(word) for word in words]
        if want is None:
            assert math.isnan(value), f"{shown}: got {value}, expected NaN"
        else:
            assert got == want, f"{shown}: got {got:#x}, expected {want:#x}"


@pytest.mark.parametrize("dtype", FORMATS)
def test_pairs_of_special_values(dtype: torch.dtype) -> None:
    special = testing.special_values(dtype)
    pairs = list(itertools.product(special, repeat=2))
    check([torch.stack(column) for column in zip(*pairs, strict=True)])


@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize("dtype", FORMATS)
def test_random_words(dtype: torch.dtype, world: int) -> None:
    """Every kind of number there is, NaN and subnormal ones included."""
    random_bits = torch.Generator().manual_seed(world)
    limit = 1 << (8 * dtype.itemsize - 1)
    ints = INTS[dtype.itemsize]
    check([torch.randint(-limit, limit, (500,), generator=random_bits).to(ints).view(dtype) for _ in range(world)])


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("dtype", FORMATS)
def test_sums_of_like_magnitude(dtype: torch.dtype, world: int) -> None:
    """Where rounding to nearest even, the order of the sum and subnormal results decide the bits."""
    random_bits = torch.Generator().manual_seed(world)
    for scale in (1.0, 100.0, torch.finfo(dtype).tiny):
        check([(torch.randn(200, generator=random_bits).double() * scale).to(dtype) for _ in range(world)])


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_tie_goes_to_the_even_neighbour_and_is_rounded_once(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    one = torch.tensor([1.0, 1.0, 1 + eps, 1.0], dtype=dtype)
    half = torch.tensor([eps / 2, eps / 2, eps / 2, -eps / 4], dtype=dtype)
    hair = torch.tensor([0.0, eps / 64, 0.0, 0.0], dtype=dtype)
    expected = torch.tensor([1.0, 1 + eps, 1 + 2 * eps, 1.0], dtype=dtype)
    if dtype == torch.float32:
        expected[1] = 1.0  # the sum itself is in fp32: the tie is broken before the hair is added
    testing.assert_bits_equal(reference.all_reduce([one, half, hair]), expected)
    check([one, half, hair])


def test_the_order_is_that_of_the_ranks() -> None:
    big, small = torch.tensor([2.0**24]), torch.tensor([1.0])
    assert reference.all_reduce([big, small, -big]).tolist() == [0.0]
    assert reference.all_reduce([big, -big, small]).tolist() == [1.0]


def test_a_sum_of_bfloat16_is_kept_in_fp32() -> None:
    one, eighth = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 2.0**-9, dtype=torch.bfloat16)
    assert reference.all_reduce([one, *[eighth] * 4]).tolist() == [1 + 2.0**-7]


def test_the_result_is_row_major_and_fresh_for_any_strides() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    for inputs in ([x.t()], [x.t(), x.t().contiguous()], [x[:1].expand(4, 3)]):
        found = reference.all_reduce(inputs)
        assert found.is_contiguous()
        assert found.tolist() == (inputs[0] * len(inputs)).tolist()
        found.fill_(9)
        assert x.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_check_knows_the_numbers() -> None:
    """decoded() and rounded() agree with the machine's own fp32 and fp16."""
    for value in (1.0, -0.1, 65504.0, 1e-7, 3.0e38, 1e-45, 2.0**-149):
        for code, (exponent_bits, mantissa_bits) in (("f", (8, 23)), ("e", (5, 10))):
            if code == "e" and abs(value) > 65504:
                continue
            packed = struct.pack(f"<{code}", value)
            word = int.from_bytes(packed, "little")
            sign = 1 << (exponent_bits + mantissa_bits)
            assert rounded(Fraction(value), exponent_bits, mantissa_bits) == word & (sign - 1)
            assert decoded(word, exponent_bits, mantissa_bits) == struct.unpack(f"<{code}", packed)[0]


def test_the_halves_are_those_of_all_reduce() -> None:
    inputs = [torch.arange(12.0).view(6, 2), torch.arange(12.0, 24.0).view(2, 6).t()]
    shares = [reference.reduce_scatter(inputs, rank) for rank in range(2)]
    assert [share.shape for share in shares] == [(3, 2)] * 2
    testing.assert_bits_equal(reference.all_gather(shares), reference.all_reduce(inputs))
    assert all(share.is_contiguous() and share.untyped_storage().nbytes() == 24 for share in shares)


def test_a_gathered_tensor_is_row_major_and_keeps_every_bit() -> None:
    words = torch.tensor([[-1, -2, 0x7F800001], [-(1 << 31), 1, 0]], dtype=torch.int32)
    found = reference.all_gather([words.view(torch.float32), words.t().contiguous().t().view(torch.float32)])
    assert found.is_contiguous()
    assert found.view(torch.int32).tolist() == words.tolist() * 2
    assert reference.all_gather([torch.ones(0, 3)] * 2).shape == (0, 3)
