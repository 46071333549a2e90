"""A call that goes on beside the caller: what ``async_op=True`` gives."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


class Work:
    """A call that has been made and may not have ended. On the CPU it has, when the caller gets this.

    On CUDA it runs on a stream of its own behind what the caller's current stream held when it was made. Until
    ``wait`` the caller may neither write the call's tensor nor look at the result.
    """

    def __init__(self, result: Tensor | None, device: torch.device, ended: torch.cuda.Event | None) -> None:
        self._result, self._device, self._ended = result, device, ended

    def wait(self) -> Tensor | None:
        """Orders the current stream of the tensor's device behind the call, without stopping the host.

        Gives what the call itself would.
        """
        if self._ended is not None:
            stream = torch.cuda.current_stream(self._device)
            self._ended.wait(stream)
            if self._result is not None:
                self._result.record_stream(stream)
        return self._result

    def is_completed(self) -> bool:
        """Whether the call has ended. Not inside a CUDA graph capture."""
        return self._ended is None or self._ended.query()


def start(call: Callable[[], Tensor | None], tensor: Tensor) -> Work:
    """Makes a call that works on ``tensor``: on the CPU at once, on CUDA on a stream of its own."""
    if tensor.device.type != "cuda":
        return Work(call(), tensor.device, None)
    stream = _stream_of(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    try:
        with torch.cuda.stream(stream):
            result = call()
    finally:
        tensor.record_stream(stream)
    return Work(result, tensor.device, stream.record_event())


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
