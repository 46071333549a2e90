"""Greedy decoding: each token is a call of the model or a replay of a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from sgl_comm.models.blocks import Cache
from sgl_comm.models.step3p5 import Step3p5, Unsharded


@torch.no_grad()
def greedy(model: Step3p5 | Unsharded, prompt: Tensor, steps: int, *, graph: bool = False) -> Tensor:
    """The likeliest tokens, each appended to its sequence before the next one is computed.

    Collective for a divided model: attention-TP groups may have different prompts, but all make as many steps.

    Args:
        prompt: [sequences, tokens] on the model's device, at least one token.
        steps: how many tokens to add, from 1.
        graph: whether the steps after the prompt are replays of a ``CapturedStep``.

    Returns:
        [sequences, steps], on that device.
    """
    sequences, length = prompt.shape
    cache = model.make_cache(sequences, length + steps)
    model.expect_tokens(prompt.numel())
    ids = best(model(prompt, cache))
    model.expect_tokens(sequences)
    found = [ids]
    step = CapturedStep(model, cache, ids) if graph else None
    for _ in range(steps - 1):
        ids = best(model(ids, cache)) if step is None else step().clone()
        found.append(ids)
    return torch.cat(found, 1)


def best(logits: Tensor) -> Tensor:
    """The likeliest next token of each sequence, [sequences, 1]."""
    return logits[:, -1].argmax(-1, keepdim=True)


class CapturedStep:
    """A decode step as a CUDA graph, which goes on from the tokens it gave.

    Making it is collective for a divided model, as is every call. It leaves the cache as long as it was, and needs
    ``expect_tokens`` to have been called with the number of sequences. Every call writes the next tokens,
    [sequences, 1], into the same tensor. The host waits for nothing: what a step needs to know, the length of the cache
    above all, is on the device.

    Args:
        model: without an all-to-all backend, whose shapes depend on the data.
        cache: of the sequences, long enough for as many tokens as steps will be made.
        ids: [sequences, 1], the first step's tokens.
    """

    def __init__(self, model: Step3p5 | Unsharded, cache: Cache, ids: Tensor) -> None:
        self.ids = ids.clone()
        self._model, self._cache = model, cache  # whose memory the graph uses
        self._graph = torch.cuda.CUDAGraph()
        start = cache.length.clone()

        def step() -> None:
            self.ids.copy_(best(model(self.ids, cache)))

        stream = torch.cuda.Stream(model.device)
        stream.wait_stream(torch.cuda.current_stream(model.device))
        with model.capture():
            with torch.cuda.stream(stream):  # kernels are loaded, and libraries have their memory, before the capture
                step()
                self.ids.copy_(ids)
                cache.length.copy_(start)
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                step()
        torch.cuda.current_stream(model.device).wait_stream(stream)

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self.ids
