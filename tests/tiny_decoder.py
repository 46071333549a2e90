"""A tiny decoder for tests: one process computes it whole, or each rank its part with a ``LayerCommunicator``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from cases import generator
from torch import Tensor
from torch.nn.functional import silu

from sgl_comm.layers import (
    LayerCommunicator,
    LayerGroups,
    LayerScatterModes,
    Norm,
    ParallelConfig,
    PartialSum,
    final_norm,
)

HIDDEN, HEADS, INNER, EXPERTS, TOP = 32, 4, 16, 4, 2


@dataclasses.dataclass(frozen=True, eq=False)
class Mlp:
    """``down(silu(up(x)))``; leading dimensions, if any, are of the experts."""

    up: Tensor
    down: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return silu(x @ self.up.mT) @ self.down.mT

    def part(self, rank: int, world: int) -> Mlp:
        """What one of ``world`` ranks holds: its outputs are addends of the whole one's."""
        return Mlp(self.up.chunk(world, -2)[rank], self.down.chunk(world, -1)[rank])

    def experts(self, rank: int, world: int) -> Mlp:
        """Whole experts, a share a rank."""
        return Mlp(self.up.chunk(world)[rank], self.down.chunk(world)[rank])

    def expert(self, number: int) -> Mlp:
        return Mlp(self.up[number], self.down[number])


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """The weights of a layer; ``router`` and ``shared`` where it is a mixture of experts."""

    qkv: Tensor
    out: Tensor
    mlp: Mlp
    router: Tensor | None
    shared: Mlp | None
    norms: tuple[Norm, Norm]


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    layers: Sequence[Layer]
    norm: Norm


def make(pattern: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """Random weights, alike in every process. ``pattern``: D for a dense layer, M for a mixture of experts."""
    bits = generator("tiny decoder", pattern)

    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=bits) / shape[-1] ** 0.5).to(dtype)

    def norm() -> Norm:
        return Norm((1 + 0.1 * torch.randn(HIDDEN, generator=bits)).to(dtype))

    def layer(sparse: bool) -> Layer:
        many = (EXPERTS,) if sparse else ()
        return Layer(
            qkv=weight(3, HIDDEN, HIDDEN),
            out=weight(HIDDEN, HIDDEN),
            mlp=Mlp(weight(*many, INNER, HIDDEN), weight(*many, HIDDEN, INNER)),
            router=weight(EXPERTS, HIDDEN) if sparse else None,
            shared=Mlp(weight(INNER, HIDDEN), weight(HIDDEN, INNER)) if sparse else None,
            norms=(norm(), norm()),
        )

    return Decoder([layer(kind == "M") for kind in pattern], norm())


def attention(x: Tensor, qkv: Tensor, out: Tensor, heads: int) -> Tensor:
    """Causal attention over the tokens of one sequence."""
    query, key, value = (x @ qkv.mT).view(3, x.size(0), heads, HIDDEN // HEADS).transpose(1, 2).unbind()
    scores = query @ key.mT / (HIDDEN // HEADS) ** 0.5
    future = torch.ones(x.size(0), x.size(0), dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ value).transpose(0, 1).flatten(1) @ out.mT


def routed(x: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and numbers of each token's experts, [tokens, TOP] both."""
    return (x @ router.mT).softmax(-1).topk(TOP)


def mixture(x: Tensor, weights: Tensor, numbers: Tensor, experts: Mlp) -> Tensor:
    """What the experts give for every token; the experts may be parts."""
    total = torch.zeros_like(x)
    for number in range(len(experts.up)):
        weight = (weights * (numbers == number)).sum(-1, keepdim=True)
        total += weight * experts.expert(number)(x)
    return total


def whole(decoder: Decoder, x: Tensor) -> Tensor:
    """The decoder in one process, without the package, on the tokens of one sequence."""

    def norm(x: Tensor, norm: Norm) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight

    for layer in decoder.layers:
        x = x + attention(norm(x, layer.norms[0]), layer.qkv, layer.out, HEADS)
        inner = norm(x, layer.norms[1])
        if layer.router is None or layer.shared is None:
            x = x + layer.mlp(inner)
        else:
            x = x + mixture(inner, *routed(inner, layer.router), layer.mlp) + layer.shared(inner)
    return norm(x, decoder.norm)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One rank's part of a layer."""

    comm: LayerCommunicator
    layer: Layer
    config: ParallelConfig
    group: dist.ProcessGroup
    """All ranks; for the all-to-all of the experts."""
    mlp_reduces: bool

    def attention(self, x: Tensor) -> PartialSum:
        ranks = self.comm.groups.attn_tp
        qkv = self.layer.qkv.chunk(ranks.world_size, 1)[ranks.rank]
        out = self.layer.out.chunk(ranks.world_size, 1)[ranks.rank]
        return self.comm.attn_output(attention(x, qkv, out, HEADS // ranks.world_size))

    def mlp(self, x: Tensor) -> PartialSum | Tensor:
        ranks, layer, comm = self.comm.mlp_group, self.layer, self.comm
        if layer.router is None or layer.shared is None:
            return comm.mlp_output(self._reduced_inside(layer.mlp.part(ranks.rank, ranks.world_size)(x)))
        weights, numbers = routed(x, layer.router)
        if self.config.moe_a2a_backend is None:
            experts = mixture(x, weights, numbers, layer.mlp.part(ranks.rank, ranks.world_size))
        else:
            experts = self._all_to_all(x, weights, numbers)
        shared = layer.shared.part(ranks.rank, ranks.world_size)(x)
        if self.mlp_reduces:
            return comm.mlp_output(self._reduced_inside(experts + shared))
        return comm.mlp_output(experts) + comm.mlp_output(shared)

    def _reduced_inside(self, x: Tensor) -> Tensor:
        return self.comm.mlp_group.all_reduce(x) if self.mlp_reduces else x

    def _all_to_all(self, x: Tensor, weights: Tensor, numbers: Tensor) -> Tensor:
        """Sends each token to the ranks of its experts, and adds up what comes back."""
        world, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        order = numbers.flatten().argsort(stable=True)
        sent = torch.bincount(numbers.flatten(), minlength=EXPERTS)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        each = EXPERTS // world
        to, back = sent.view(world, each).sum(1).tolist(), received.view(world, each).sum(1).tolist()
        rows, answers = x.new_empty(sum(back), HIDDEN), x.new_empty(sum(to), HIDDEN)
        dist.all_to_all_single(rows, x[order // TOP], back, to, group=self.group)
        of_expert = torch.arange(each).repeat(world).repeat_interleave(received)
        mine = self.layer.mlp.experts(rank, world)
        for number in range(each):
            rows[of_expert == number] = mine.expert(number)(rows[of_expert == number])
        dist.all_to_all_single(answers, rows, to, back, group=self.group)
        return torch.zeros_like(x).index_add_(0, order // TOP, weights.flatten()[order, None] * answers)


def parts(
    decoder: Decoder, config: ParallelConfig, groups: LayerGroups, group: dist.ProcessGroup, **options: bool
) -> list[Part]:
    """One rank's parts of all layers. ``options``: those of ``LayerCommunicator``."""
    layers, last = decoder.layers, len(decoder.layers) - 1

    def modes(place: int) -> LayerScatterModes:
        return LayerScatterModes.init_new(
            config=config,
            is_layer_sparse=layers[place].router is not None,
            is_previous_layer_sparse=place > 0 and layers[place - 1].router is not None,
            is_first_layer=place == 0,
            is_last_layer=place == last,
        )

    return [
        Part(
            LayerCommunicator(groups, modes(place), *layer.norms, is_last_layer=place == last, **options),
            layer,
            config,
            group,
            options.get("mlp_reduces", False),
        )
        for place, layer in enumerate(layers)
    ]


def run(decoder: Decoder, ranks_parts: Sequence[Part], x: Tensor) -> Tensor:
    """The decoder on this rank, for the tokens of its attention-TP group."""
    hidden: Tensor | PartialSum = x
    residual: Tensor | None = None
    for part in ranks_parts:
        inner, residual = part.comm.prepare_attn(hidden, residual)
        inner, residual = part.comm.prepare_mlp(part.attention(inner), residual)
        hidden, residual = part.comm.postprocess_layer(part.mlp(inner), residual)
    return final_norm(part.comm.groups, decoder.norm, hidden, residual)[0]
