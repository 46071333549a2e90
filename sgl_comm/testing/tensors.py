"""Values, memory layouts and comparisons for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CANARY = 0xA5
_GUARD_BYTES = 64


def _canary_word(width: int) -> int:
    """As many canaries as fit into an integer of ``width`` bytes, of the dtype in ``_INTS``."""
    return int.from_bytes(bytes([_CANARY] * width), "little", signed=width > 1)


def _bits(x: torch.Tensor) -> torch.Tensor:
    """Row-major integers with the bits of ``x`` (complex: two for each element)."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    if x.is_complex():
        x = torch.view_as_real(x)
    return x.view(_INTS[x.element_size()])


def wrong_elements(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """A bool tensor, true where the bits differ. NaN equals NaN whatever the payload; zeros of two signs differ.

    Raises:
        ValueError: the shapes or dtypes differ.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        got, want = (f"{x.dtype} {tuple(x.shape)}" for x in (actual, expected))
        raise ValueError(f"tensors cannot be compared: got {got}, expected {want}")
    expected = expected.to(actual.device)
    wrong = _bits(actual) != _bits(expected)
    if actual.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    if actual.is_floating_point():
        wrong &= ~(actual.float().isnan() & expected.float().isnan())
    return wrong


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether shape, dtype and every bit agree (NaN equals NaN; zeros of two signs differ). Strides do not matter."""
    return a.shape == b.shape and a.dtype == b.dtype and not bool(wrong_elements(a, b).any())


def assert_bits_equal(actual: torch.Tensor, expected: torch.Tensor, label: str = "") -> None:
    """Raises AssertionError unless :func:`bits_equal`: how many elements are wrong, the first one, both its values."""
    try:
        wrong = wrong_elements(actual, expected)
    except ValueError as error:
        raise AssertionError(f"{label}: {error}" if label else str(error)) from None
    if not bool(wrong.any()):
        return
    count = int(wrong.sum())
    index = tuple(wrong.nonzero()[0].tolist())
    values = [torch.view_as_real(x) if x.is_complex() else x for x in (actual, expected)]
    got, want = (f"{value[index].item()!r} (bits {_hex(value[index])})" for value in values)
    prefix = f"{label}: " if label else ""
    raise AssertionError(
        f"{prefix}{count} of {wrong.numel()} elements differ, first at {list(index)}: got {got}, expected {want}"
    )


def _hex(element: torch.Tensor) -> str:
    width = 8 * element.element_size()
    return f"0x{int(_bits(element).item()) % (1 << width):0{width // 4}x}"


def special_values(dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """A 1-D tensor of an even number of awkward values of a float dtype of 2, 4 or 8 bytes.

    Zeros of both signs, infinities, NaN, the smallest subnormals of both signs, the largest and the smallest normal
    value of both signs; then the 4-byte words 0xFFFFFFFF and 0xFFFFFFFE (for 2-byte dtypes each is two elements at an
    even index; for 8-byte dtypes they are 8-byte words).
    """
    info, width = torch.finfo(dtype), 8 * dtype.itemsize
    if dtype.itemsize not in (2, 4, 8):
        raise ValueError(f"special_values: dtype must have 2, 4 or 8 bytes, got {dtype}")
    values = torch.tensor(
        [0.0, -0.0, float("inf"), -float("inf"), info.max, info.min, info.tiny, -info.tiny, float("nan"), 1.0],
        dtype=torch.float64,
    ).to(dtype)
    subnormals = [1, 1 - (1 << (width - 1))]  # the second is the sign bit and the lowest bit, as a signed integer
    all_ones = [-1, -1, -2, -1] if dtype.itemsize == 2 else [-1, -2]
    words = torch.tensor(subnormals + all_ones, dtype=_INTS[dtype.itemsize])
    return torch.cat([values, words.view(dtype)]).to(device)


@dataclasses.dataclass(frozen=True)
class Placed:
    """A tensor inside a larger buffer whose other bytes are canaries.

    ``tensor`` has the wanted layout; ``values`` is a row-major copy of what it holds.
    """

    tensor: torch.Tensor
    values: torch.Tensor
    buffer: torch.Tensor

    def overwritten(self) -> list[int]:
        """Byte offsets of canaries that changed, relative to the tensor's first element; at most 16."""
        size = self.tensor.element_size()
        origin = self.tensor.storage_offset() * size
        around = self.buffer.clone()
        # The tensor's own elements become canaries too, by words of up to 8 bytes, and then everything is one.
        width = min(size, 8)
        words = around.view(_INTS[width])
        shape = (*self.tensor.shape, size // width)
        strides = (*(stride * (size // width) for stride in self.tensor.stride()), 1)
        words.as_strided(shape, strides, origin // width).fill_(_canary_word(width))
        if bool((around.view(torch.int64) == _canary_word(8)).all()):
            return []
        changed = (around != _CANARY).nonzero().flatten()
        return [int(offset) - origin for offset in changed[:16]]

    def assert_canaries(self) -> None:
        """Raises AssertionError if a byte around or between the tensor's elements changed."""
        changed = self.overwritten()
        if changed:
            raise AssertionError(f"bytes outside the tensor were overwritten, at byte offsets {changed} from its start")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A memory layout for one shape. ``overlaps``: elements share memory, so only functional ops may be given it."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    overlaps: bool = False

    def __call__(self, values: torch.Tensor) -> Placed:
        """Copies ``values`` (of ``shape``) into this layout; one that overlaps repeats the first row."""
        if tuple(values.shape) != self.shape:
            raise ValueError(f"layout {self.name}: shape must be {self.shape}, got {tuple(values.shape)}")
        if self.overlaps:
            values = values[:1].expand(self.shape)
        values = values.detach().clone(memory_format=torch.contiguous_format)
        size = values.element_size()
        reach = (
            sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)) + 1
            if values.numel()
            else 0
        )
        num_bytes = _GUARD_BYTES + (self.offset + reach) * size + _GUARD_BYTES
        buffer = torch.full((num_bytes + -num_bytes % 16,), _CANARY, dtype=torch.uint8, device=values.device)
        tensor = self._view(buffer.view(values.dtype), _GUARD_BYTES // size)
        if self.overlaps:
            tensor[:1].copy_(values[:1])
        else:
            tensor.copy_(values)
        return Placed(tensor, values, buffer)

    def _view(self, flat: torch.Tensor, guard: int) -> torch.Tensor:
        return flat.as_strided(self.shape, self.strides, guard + self.offset)


def layouts(shape: Sequence[int]) -> dict[str, Layout]:
    """Every layout that exists for ``shape``, by name; each is called with row-major values and gives a Placed.

    row_major, offset (one element past an aligned address), sliced (both ends of every dimension), stepped (every
    second element), transposed (last two dimensions), permuted (first dimension innermost), channels_last (4-D),
    expanded (along the first dimension; ``overlaps``). The base address is a multiple of 16 bytes but for offset and
    sliced.
    """
    shape = tuple(shape)
    ndim = len(shape)
    plain = _strides(shape, range(ndim))
    found = [Layout("row_major", shape, plain), Layout("offset", shape, plain, offset=1)]
    if ndim > 0 and 0 not in shape:
        wide = _strides(tuple(n + 2 for n in shape), range(ndim))
        found.append(Layout("sliced", shape, wide, offset=sum(wide)))
        found.append(Layout("stepped", shape, tuple(2 * stride for stride in plain)))
        if shape[0] > 1:
            found.append(Layout("expanded", shape, (0, *plain[1:]), overlaps=True))
    if ndim >= 2:
        found.append(Layout("transposed", shape, _strides(shape, (*range(ndim - 2), ndim - 1, ndim - 2))))
    if ndim >= 3:
        found.append(Layout("permuted", shape, _strides(shape, (*range(1, ndim), 0))))
    if ndim == 4:
        found.append(Layout("channels_last", shape, _strides(shape, (0, 2, 3, 1))))
    return {layout.name: layout for layout in found}


def _strides(shape: tuple[int, ...], order: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimensions follow each other in memory in this order, outermost first."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)
