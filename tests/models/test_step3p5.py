"""A divided Step3p5 decoder equals the undivided one, token by token, with and without fused ops and CUDA graphs."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.ranks import Ranks
from helpers.values import generator
from sgl_comm import ops
from sgl_comm.layers import LayerGroups, ParallelConfig
from sgl_comm.models import Cache, ModelConfig, Step3p5, Unsharded, greedy
from sgl_comm.models.blocks import LayerWeights, TokenPositions
from sgl_comm.testing import RankContext, bits_equal

CONFIG = ModelConfig("DMMD")
LAYOUTS = [(2,), (4,), (4, 2, True), (4, 2, True, 4), (2, 2, True, 1, "all_to_all_single")]
STEPS = 8

WAYS: dict[str, dict[str, Any]] = {
    "fused": {},
    "without the next layer": {"allow_mlp_allreduce_fusion": False, "allow_reduce_scatter": False},
    "separate": {"all_reduce": ops.all_reduce},
}


def prompt_of(attn_dp_rank: int) -> Tensor:
    """More and longer sequences for a later attention-TP group."""
    shape = (2 + attn_dp_rank, 5 + 2 * attn_dp_rank)
    return torch.randint(CONFIG.vocab_size, shape, generator=generator("prompt", attn_dp_rank))


def logits_of(model: Step3p5 | Unsharded, prompt: Tensor, added: Tensor) -> list[Tensor]:
    """Of the prompt, then of each token put behind it."""
    cache = model.make_cache(len(prompt), prompt.size(1) + added.size(1))
    model.expect_tokens(prompt.numel())
    found = [model(prompt, cache)]
    model.expect_tokens(len(prompt))
    return found + [model(ids, cache) for ids in added.split(1, 1)]


def ways_of(ctx: RankContext, config: ModelConfig, groups: LayerGroups) -> dict[str, Step3p5]:
    first = Step3p5(config, groups, ctx.group)
    return {
        way: Step3p5(config, groups, ctx.group, **options, weights_of=first) if options else first
        for way, options in WAYS.items()
    }


def wrong_steps(ctx: RankContext, layout: tuple[Any, ...]) -> list[str]:
    """What differs from the undivided model in prefill and decode."""
    wrong = []
    with LayerGroups(ParallelConfig(*layout), ctx.group, ctx.device) as groups:
        prompt = prompt_of(groups.attn_dp_rank).to(ctx.device)
        whole = Unsharded(CONFIG, ctx.device)
        tokens = greedy(whole, prompt, STEPS)
        if len(tokens.unique()) < STEPS:
            wrong.append(f"the undivided model only knows {tokens.unique()}")
        expected = logits_of(whole, prompt, tokens)
        fused: list[Tensor] = []
        for way, model in ways_of(ctx, CONFIG, groups).items():
            found = logits_of(model, prompt, tokens)
            fused = fused or found
            for step, (mine, theirs, bits) in enumerate(zip(found, expected, fused, strict=True)):
                off, bound = (mine - theirs).abs().max(), 1e-5 * theirs.abs().max()
                if not off <= bound:
                    wrong.append(f"{way}, step {step}: off by {off}, at most {bound}")
                if not bits_equal(mine, bits):
                    wrong.append(f"{way}, step {step}: other bits than fused")
            if not torch.equal(greedy(model, prompt, STEPS), tokens):
                wrong.append(f"{way}: other tokens than the undivided model's")
    return wrong


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_prefill_and_decode_equal_the_undivided_model(layout: tuple[Any, ...]) -> None:
    Ranks("cpu", layout[0]).all_right(wrong_steps, layout)


def other_bits(ctx: RankContext) -> list[str]:
    with LayerGroups(ParallelConfig(ctx.world), ctx.group, ctx.device) as groups:
        models = ways_of(ctx, ModelConfig("MDM", dtype=torch.bfloat16), groups)
        prompt = prompt_of(0)
        tokens = {way: greedy(model, prompt, STEPS) for way, model in models.items()}
        logits = {way: torch.cat(logits_of(model, prompt, tokens["fused"]), 1) for way, model in models.items()}
    return [
        f"{way}: other tokens or bits than fused"
        for way in WAYS
        if not (torch.equal(tokens[way], tokens["fused"]) and bits_equal(logits[way], logits["fused"]))
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_fused_or_not_gives_the_same_bits_in_bfloat16(world: int) -> None:
    Ranks("cpu", world).all_right(other_bits)


class AskedByTheHost(TorchDispatchMode):
    """Notes ops for which the host would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def asked_by_the_host(ctx: RankContext, layout: tuple[Any, ...]) -> list[str]:
    with LayerGroups(ParallelConfig(*layout), ctx.group, ctx.device) as groups:
        model = Step3p5(CONFIG, groups)
        cache = model.make_cache(2, 4)
        model.expect_tokens(2)
        with AskedByTheHost() as asked:
            model(torch.zeros(2, 1, dtype=torch.int64), cache)
    return asked.seen


@pytest.mark.parametrize("layout", [(2,), (2, 2, True), (2, 1, False, 1)], ids=str)
def test_the_host_waits_for_nothing_in_a_step(layout: tuple[Any, ...]) -> None:
    Ranks("cpu", 2).all_right(asked_by_the_host, layout)


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on the CPU: notes ops without doing them; a replay does them on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.undo: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self.undo.append((args[0], args[0].clone()))
        self.calls.append((func, args, kwargs or {}, func(*args, **(kwargs or {}))))
        return self.calls[-1][3]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for tensor, before in reversed(self.undo):
            tensor.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.calls:
            for old, new in zip(tree_leaves(outputs), tree_leaves(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():  # else a view, or in place
                    old.copy_(new)


def wrong_replays(ctx: RankContext, layout: tuple[Any, ...]) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", Tape)
        patch.setattr(torch.cuda, "graph", lambda tape, **_: tape)
        patch.setattr(torch.cuda, "Stream", MagicMock())
        patch.setattr(torch.cuda, "current_stream", MagicMock())
        patch.setattr(torch.cuda, "stream", MagicMock())
        return wrong_graphs(ctx, layout)


@pytest.mark.parametrize("layout", LAYOUTS[:-1], ids=str)
def test_a_step_replayed_without_python_gives_the_same_tokens(layout: tuple[Any, ...]) -> None:
    Ranks("cpu", layout[0]).all_right(wrong_replays, layout)


def wrong_graphs(ctx: RankContext, layout: tuple[Any, ...]) -> list[str]:
    wrong = []
    with LayerGroups(ParallelConfig(*layout), ctx.group, ctx.device) as groups:
        prompt = prompt_of(groups.attn_dp_rank).to(ctx.device)
        expected = greedy(Unsharded(CONFIG, ctx.device), prompt, STEPS)
        for way, model in ways_of(ctx, CONFIG, groups).items():
            for graph in (False, True, True):
                found = greedy(model, prompt, STEPS, graph=graph)
                if not torch.equal(found, expected):
                    wrong.append(f"{way}, graph={graph}: got {found.tolist()}, expected {expected.tolist()}")
        groups.tp.check()
    return wrong


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS[:-1], ids=str)
def test_a_captured_step_gives_the_same_tokens(layout: tuple[Any, ...]) -> None:
    Ranks("cuda", layout[0]).all_right(wrong_graphs, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS[:-1], ids=str)
def test_prefill_and_decode_on_gpus_equal_the_undivided_model(layout: tuple[Any, ...]) -> None:
    Ranks("cuda", layout[0]).all_right(wrong_steps, layout)


# --- the undivided model, against the plainest form of each block


def test_a_mixture_is_the_weighted_sum_of_the_chosen_experts() -> None:
    layer = LayerWeights.make(ModelConfig("M"), 0, torch.device("cpu"))
    assert layer.router is not None
    x = torch.randn(5, 32, generator=generator("mixture"))
    weights, numbers = layer.router.choose(x)
    assert torch.allclose(weights.sum(1), torch.ones(5))
    expected = torch.zeros_like(x)
    for token, chosen in enumerate(numbers.tolist()):
        for weight, expert in zip(weights[token], chosen, strict=True):
            gate, up = layer.mlp.gate_up[:, expert]
            expected[token] += weight * (layer.mlp.down[:, expert] @ (silu(gate @ x[token]) * (up @ x[token])))
    assert (layer.mlp(x, layer.router(x)) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_attention_is_torch_s_without_rotation_and_gates() -> None:
    config = ModelConfig("D", qk_norm=False, head_gate=False)
    layer = LayerWeights.make(config, 0, torch.device("cpu")).attention
    cache = Cache.make(config, config.kv_heads, 2, 9, torch.device("cpu"))
    place = TokenPositions.after(cache, 6, config)
    still = TokenPositions(place.positions, torch.ones_like(place.cos), torch.zeros_like(place.sin), place.future)
    x = torch.randn(12, 32, generator=generator("attention"))
    query, key, value = (
        part.view(2, 6, -1, config.head_size).transpose(1, 2) for part in (x @ layer.inputs.mT).split([32, 16, 16], 1)
    )
    heads = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    expected = heads.transpose(1, 2).reshape(12, 32) @ layer.out.mT
    assert (layer(x, *cache.keys, *cache.values, still) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_was_cached_counts_as_if_computed_again() -> None:
    model, ids = Unsharded(CONFIG), prompt_of(1)
    together = model(ids, model.make_cache(len(ids), 9))
    one_by_one = torch.cat(logits_of(model, ids[:, :1], ids[:, 1:]), 1)
    assert (one_by_one - together).abs().max() <= 1e-5 * together.abs().max()
    moved = model.make_cache(len(ids), 9)
    moved.length.add_(2)
    assert (model(ids[:, :1], moved) - together[:, :1]).abs().max() > 1e-3 * together.abs().max(), "positions matter"


def test_the_shape_of_llama() -> None:
    small = ModelConfig.llama(1, hidden_size=64, heads=8, kv_heads=2, head_size=8, dense_size=32, vocab_size=50)
    layer = LayerWeights.make(small, 0, torch.device("cpu"))
    assert (layer.router, layer.shared, layer.attention.qk_norms) == (None, None, None)
    assert layer.attention.inputs.shape == (96, 64)
    assert layer.mlp.gate_up.dtype is torch.bfloat16
    full = ModelConfig.llama(32)
    a_layer = (2 * full.heads + 2 * full.kv_heads) * full.head_size * full.hidden_size
    a_layer += 3 * full.dense_size * full.hidden_size + 2 * full.hidden_size
    total = len(full.layers) * a_layer + (2 * full.vocab_size + 1) * full.hidden_size
    assert total == 8_030_261_248


@pytest.mark.parametrize("changes", [{"layers": ""}, {"layers": "DX"}, {"heads": 3}], ids=str)
def test_shapes_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ModelConfig: got"):
        ModelConfig(**changes)


def test_parts_that_cannot_be() -> None:
    layer = LayerWeights.make(ModelConfig("M"), 0, torch.device("cpu"))
    for call in (layer.attention.part, layer.mlp.part, layer.mlp.some_experts):
        with pytest.raises(ValueError, match="for 3 ranks"):
            call(0, 3)
