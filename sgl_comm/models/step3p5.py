"""A Step3p5-like decoder with random weights: divided over ranks by ``LayerCommunicator``, and undivided.

A layer is grouped-query attention with normalised queries and keys and a gate a head, then a dense MLP or a mixture of
experts with a shared one, whose outputs are added up and reduced once, by the next layer where that is possible.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import embedding, one_hot

from sgl_comm.layers import LayerCommunicator, LayerGroups, LayerScatterModes, Norm, PartialSum, final_norm
from sgl_comm.models.blocks import (
    Attention,
    Cache,
    LayerWeights,
    Mlp,
    ModelConfig,
    OuterWeights,
    TokenPositions,
    rms_norm,
)

AllReduce = Callable[[Tensor, str], Tensor]
"""Of this rank's addend, which it may overwrite, and the group's name; as ``sgl_comm.ops.all_reduce``."""


class Unsharded:
    """The model on one device, by torch alone: what the divided one must equal."""

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        self.layers = [LayerWeights.make(config, number, self.device) for number in range(len(config.layers))]
        self.outer = OuterWeights.make(config, self.device)

    def make_cache(self, sequences: int, max_tokens: int) -> Cache:
        """An empty cache."""
        return Cache.make(self.config, self.config.kv_heads, sequences, max_tokens, self.device)

    def expect_tokens(self, count: int) -> None:
        """Does nothing: on one device no tokens move."""

    def capture(self) -> AbstractContextManager[object]:
        """Within it calls may be captured in CUDA graphs."""
        return contextlib.nullcontext()

    def __call__(self, ids: Tensor, cache: Cache) -> Tensor:
        """Logits [sequences, new, vocab] of the next tokens ``ids`` [sequences, new] of the cache's sequences."""
        tokens = TokenPositions.after(cache, ids.size(1), self.config)
        x = embedding(ids.flatten(), self.outer.embedding)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = x + layer.attention(rms_norm(x, layer.norms[0]), keys, values, tokens)
            inner = rms_norm(x, layer.norms[1])
            if layer.router is None or layer.shared is None:
                x = x + layer.mlp(inner)
            else:
                x = x + (layer.mlp(inner, layer.router(inner)) + layer.shared(inner))
        cache.length.add_(ids.size(1))
        return (rms_norm(x, self.outer.norm) @ self.outer.head.mT).unflatten(0, ids.shape)


MOST_COMPILED_TOKENS = 64
"""Rows of a compiled MLP: a decode step's. Prompts have too many lengths to compile for."""


@functools.cache
def _compiled(block: type[Attention] | type[Mlp]) -> Callable[..., Tensor]:
    """What calls of a block's instances run, compiled for each shape by itself."""
    return torch.compile(block.__call__, dynamic=False)


@dataclass(frozen=True, eq=False)
class Layer:
    """One rank's part of a layer: what is computed between the three calls of ``comm``."""

    comm: LayerCommunicator
    weights: LayerWeights
    all_reduce: AllReduce | None
    group: ProcessGroup | None
    compiled: bool

    def attention(self, x: Tensor, keys: Tensor, values: Tensor, tokens: TokenPositions) -> PartialSum:
        """From what ``prepare_attn`` gives to what ``prepare_mlp`` takes."""
        compute = _compiled(Attention) if self.compiled and tokens.positions.size(0) == 1 else Attention.__call__
        return self.comm.attn_output(compute(self.weights.attention, x, keys, values, tokens))

    def mlp(self, x: Tensor) -> PartialSum | Tensor:
        """From what ``prepare_mlp`` gives to what ``postprocess_layer`` takes."""
        weights, comm = self.weights, self.comm
        compute = _compiled(Mlp) if self.compiled and x.size(0) <= MOST_COMPILED_TOKENS else Mlp.__call__
        if weights.router is None or weights.shared is None:
            return comm.mlp_output(self._reduced(compute(weights.mlp, x)))
        if comm.groups.config.moe_a2a_backend is None:
            routed = compute(weights.mlp, x, weights.router(x))
        else:
            routed = self._from_other_ranks(x)
        shared = compute(weights.shared, x)
        if self.all_reduce is not None:
            return comm.mlp_output(self._reduced(routed + shared))
        return comm.mlp_output(routed) + comm.mlp_output(shared)

    def _reduced(self, x: Tensor) -> Tensor:
        several = self.comm.mlp_group.world_size > 1
        return self.all_reduce(x, self.comm.mlp_group.group_name) if self.all_reduce is not None and several else x

    def _from_other_ranks(self, x: Tensor) -> Tensor:
        """Sends each token to the ranks of its experts, and adds up what comes back. The host waits for the numbers of
        tokens, so that this cannot be captured."""
        assert self.weights.router is not None
        world, mine = self.comm.groups.tp.world_size, self.weights.mlp
        each = mine.down.size(1)
        weights, numbers = self.weights.router.choose(x)
        order = numbers.flatten().argsort(stable=True)
        sent = torch.bincount(numbers.flatten(), minlength=world * each)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        to, back = sent.view(world, each).sum(1).tolist(), received.view(world, each).sum(1).tolist()
        rows, answers = x.new_empty(sum(back), x.size(1)), x.new_empty(sum(to), x.size(1))
        dist.all_to_all_single(rows, x[order // numbers.size(1)], back, to, group=self.group)
        expert = torch.arange(each, device=x.device).repeat(world).repeat_interleave(received)
        dist.all_to_all_single(answers, mine(rows, one_hot(expert, each).to(x.dtype)), to, back, group=self.group)
        in_order = torch.empty_like(answers)
        in_order[order] = answers
        return (weights[..., None] * in_order.unflatten(0, numbers.shape)).sum(1)


@dataclass(frozen=True, eq=False, kw_only=True)
class SeparateNorm(Norm):
    """A norm that leaves the sum before it to a call of its own."""

    all_reduce: AllReduce
    alone: str
    """The name of the group of this rank alone."""

    def __call__(self, hidden_states: Tensor, residual: Tensor | None, group_name: str) -> tuple[Tensor, Tensor]:
        if group_name != self.alone:
            hidden_states = self.all_reduce(hidden_states, group_name)
        return super().__call__(hidden_states, residual, self.alone)


class Step3p5:
    """One rank's part of the model.

    Args:
        config: the model's shape.
        groups: its ranks and their layout.
        group: the process group that ``groups`` was made of; the experts' all-to-all goes through it.
        allow_mlp_allreduce_fusion, allow_reduce_scatter: as for ``LayerCommunicator``.
        all_reduce: None for the package's fused ops. Else every all-reduce is a call of this, and a norm is a
            call of its own after it: the same bits, if it is ``sgl_comm.ops.all_reduce``.
        weights_of: a model of the same config and groups, to share its weights.
        compiled: whether ``torch.compile`` makes what a decode step computes between its collectives: fewer kernels,
            and other last bits.

    Raises:
        ValueError: heads, units or experts that cannot be divided over the ranks.
        SglCommError: what ``LayerCommunicator`` refuses.
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: LayerGroups,
        group: ProcessGroup | None = None,
        *,
        allow_mlp_allreduce_fusion: bool = True,
        allow_reduce_scatter: bool = True,
        all_reduce: AllReduce | None = None,
        weights_of: Step3p5 | None = None,
        compiled: bool = False,
    ) -> None:
        self.config, self.groups, self.device = config, groups, groups.tp.device
        fused, last = all_reduce is None, len(config.layers) - 1
        self.layers: list[Layer] = []
        for number, kind in enumerate(config.layers):
            if weights_of is None:
                weights = LayerWeights.make(config, number, self.device)
            else:
                weights = weights_of.layers[number].weights
            norms = weights.norms
            if all_reduce is not None:
                norms = tuple(
                    SeparateNorm(**vars(norm), all_reduce=all_reduce, alone=groups.alone.group_name) for norm in norms
                )
            comm = LayerCommunicator(
                groups,
                LayerScatterModes.init_new(
                    config=groups.config,
                    is_layer_sparse=kind == "M",
                    is_previous_layer_sparse=number > 0 and config.layers[number - 1] == "M",
                    is_first_layer=number == 0,
                    is_last_layer=number == last,
                ),
                *norms,
                is_last_layer=number == last,
                allow_mlp_allreduce_fusion=allow_mlp_allreduce_fusion and fused,
                allow_reduce_scatter=allow_reduce_scatter and fused,
                mlp_reduces=not fused,
            )
            part = _part(weights, comm) if weights_of is None else weights
            self.layers.append(Layer(comm, part, all_reduce, group, compiled))
        self.outer = OuterWeights.make(config, self.device) if weights_of is None else weights_of.outer

    def make_cache(self, sequences: int, max_tokens: int) -> Cache:
        """An empty cache for the sequences of this rank's attention-TP group and the heads of this rank."""
        kv_heads = self.layers[0].weights.attention.kv_heads
        return Cache.make(self.config, kv_heads, sequences, max_tokens, self.device)

    def expect_tokens(self, count: int) -> None:
        """Says how many rows this rank's next passes have, sequences times new tokens. Collective; the host waits."""
        self.groups.exchange_num_tokens(count)

    def capture(self) -> AbstractContextManager[object]:
        """Within it calls may be captured in CUDA graphs. Collective."""
        return self.groups.capture()

    def __call__(self, ids: Tensor, cache: Cache) -> Tensor:
        """As for ``Unsharded``, with the sequences of this rank's attention-TP group. Collective."""
        tokens = TokenPositions.after(cache, ids.size(1), self.config)
        hidden: Tensor | PartialSum = embedding(ids.flatten(), self.outer.embedding)
        residual: Tensor | None = None
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            inner, residual = layer.comm.prepare_attn(hidden, residual)
            inner, residual = layer.comm.prepare_mlp(layer.attention(inner, keys, values, tokens), residual)
            hidden, residual = layer.comm.postprocess_layer(layer.mlp(inner), residual)
        cache.length.add_(ids.size(1))
        normed, _ = final_norm(self.groups, self.outer.norm, hidden, residual)
        return (normed @ self.outer.head.mT).unflatten(0, ids.shape)


def _part(weights: LayerWeights, comm: LayerCommunicator) -> LayerWeights:
    """What this rank computes of a layer."""
    attn, mlp, tp = comm.groups.attn_tp, comm.mlp_group, comm.groups.tp
    if weights.router is not None and comm.groups.config.moe_a2a_backend is not None:
        own = weights.mlp.some_experts(tp.rank, tp.world_size)
    else:
        own = weights.mlp.part(mlp.rank, mlp.world_size)
    return dataclasses.replace(
        weights,
        attention=weights.attention.part(attn.rank, attn.world_size),
        mlp=own,
        shared=weights.shared and weights.shared.part(mlp.rank, mlp.world_size),
    )
