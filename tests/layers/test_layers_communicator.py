"""How many collectives a layer makes, and what ``LayerGroups`` and ``LayerCommunicator`` refuse."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import sgl_comm
from helpers.errors import error_text
from sgl_comm.layers import (
    LayerCommunicator,
    LayerGroups,
    LayerScatterModes,
    Norm,
    ParallelConfig,
    PartialSum,
    ScatterMode,
    final_norm,
)
from sgl_comm.models import ModelConfig, Step3p5
from sgl_comm.models.blocks import TokenPositions
from sgl_comm.testing import RankContext, run_ranks

A2A = "all_to_all_single"
S, T, F = ScatterMode.SCATTERED, ScatterMode.TP_ATTN_FULL, ScatterMode.FULL

SHORT = {
    "all_reduce": "AR",
    "reduce_scatter": "RS",
    "all_gather": "AG",
    "tp_attn_all_reduce_and_layernorm": "AR+norm",
}


class Collectives(TorchDispatchMode):
    """Notes the package's ops on groups of several ranks, as "op group"; a norm of this rank alone is none."""

    def __init__(self, groups: LayerGroups) -> None:
        super().__init__()
        self.seen: list[str] = []
        named = {"attn_dp": groups.attn_dp, "attn_tp": groups.attn_tp, "tp": groups.tp}
        self._names = {comm.group_name: name for name, comm in named.items() if comm.world_size > 1}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sgl_comm":
            group = self._names.get(kwargs.get("group_name") or args[1])
            if group is not None:
                self.seen.append(f"{SHORT[func._opname]} {group}")
        return func(*args, **kwargs)


def collectives_of_layers(ctx: RankContext, config: ParallelConfig, stack: str, options: dict[str, bool]) -> list[str]:
    """What each layer does in prepare_attn | prepare_mlp | postprocess_layer."""
    lines = []
    with LayerGroups(config, ctx.group, ctx.device) as groups:
        model = Step3p5(ModelConfig(stack), groups, ctx.group, **{**NEITHER, **options})
        groups.set_num_tokens([3] * config.attn_dp_size)
        cache = model.make_cache(1, 3)
        place = TokenPositions.after(cache, 3, model.config)
        hidden, residual = torch.ones(3, model.config.hidden_size), None
        for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True):
            with Collectives(groups) as attn:
                hidden, residual = layer.comm.prepare_attn(hidden, residual)
            output = layer.attention(hidden, keys, values, place)
            with Collectives(groups) as mlp:
                hidden, residual = layer.comm.prepare_mlp(output, residual)
            with Collectives(groups) as after:
                hidden, residual = layer.comm.postprocess_layer(layer.mlp(hidden), residual)
            assert layer.comm.should_fuse_mlp_allreduce_with_next_layer() == isinstance(hidden, PartialSum)
            assert layer.comm.should_use_reduce_scatter() == ("RS tp" in after.seen)
            lines.append(" | ".join(", ".join(stage.seen) for stage in (attn, mlp, after)))
        with Collectives(groups) as final:
            final_norm(groups, model.outer.norm, hidden, residual)
        assert not final.seen
    return lines


TP4, DP2, DP4 = (4, 1, False), (4, 2, True), (4, 4, True)
NEITHER = {"allow_mlp_allreduce_fusion": False, "allow_reduce_scatter": False}
FUSE, SCATTER = {"allow_mlp_allreduce_fusion": True}, {"allow_reduce_scatter": True}

COUNTS: list[tuple[tuple[Any, ...], str, dict[str, bool], list[str]]] = [
    # layout, dense, backend; layers; options -> each layer's collectives in its three places
    ((1, 1, False, None, None), "MM", {}, [" |  | "] * 2),
    ((*TP4, None, None), "DM", {}, [" | AR+norm tp | AR tp"] * 2),
    ((*TP4, None, None), "MM", SCATTER, [" | AR+norm tp | AR tp"] * 2),
    (
        (*TP4, None, None),
        "DMM",
        FUSE,
        [" | AR+norm tp | ", "AR+norm tp | AR+norm tp | ", "AR+norm tp | AR+norm tp | AR tp"],
    ),
    ((*TP4, 4, None), "DM", FUSE, [" | AR+norm tp | ", "AR+norm tp | AR+norm tp | AR tp"]),
    (
        (*TP4, 1, None),
        "DMD",
        FUSE,
        [" | RS tp | ", "AG tp | AG tp, AR+norm tp | ", "AR+norm tp | RS tp | AG tp"],
    ),
    (
        (*TP4, None, A2A),
        "MMD",
        {},
        [" | RS tp | ", "AG tp | RS tp | ", "AG tp | AG tp, AR+norm tp | AR tp"],
    ),
    ((*TP4, None, A2A), "M", {}, [" | RS tp | AG tp"]),
    ((*DP2, None, None), "DM", FUSE, [" | AR+norm attn_tp, AG attn_dp | AR tp"] * 2),
    ((*DP2, None, None), "MM", SCATTER, [" | AR+norm attn_tp, AG attn_dp | RS tp, AG attn_tp"] * 2),
    (
        (*DP2, 4, None),
        "DDM",
        {**FUSE, **SCATTER},
        [
            " | AR+norm attn_tp | ",
            "AR+norm attn_tp | AR+norm attn_tp | ",
            "AR+norm attn_tp | AR+norm attn_tp, AG attn_dp | RS tp, AG attn_tp",
        ],
    ),
    ((*DP2, 4, None), "DD", {}, [" | AR+norm attn_tp | AR attn_tp"] * 2),
    (
        (*DP2, 1, None),
        "DM",
        {},
        [" | RS attn_tp | ", "AG attn_tp | AG attn_tp, AR+norm attn_tp, AG attn_dp | AR tp"],
    ),
    ((*DP2, 1, A2A), "DM", {}, [" | RS attn_tp | ", "AG attn_tp | RS attn_tp | AG attn_tp"]),
    ((*DP4, None, None), "DM", SCATTER, [" | AG tp | RS tp"] * 2),
    ((*DP4, 1, A2A), "DM", {}, [" |  | "] * 2),
]


@pytest.mark.parametrize(("values", "stack", "options", "expected"), COUNTS, ids=str)
def test_collectives_of_each_layer(
    values: tuple[Any, ...], stack: str, options: dict[str, bool], expected: list[str]
) -> None:
    config = ParallelConfig(*values)
    for found in run_ranks(collectives_of_layers, config.tp_size, config, stack, options):
        assert [line.replace("attn_dp", "tp") if config.attn_tp_size == 1 else line for line in found] == expected


# --- what is refused

NORM = Norm(torch.ones(4))

NO_FUNCTION = {
    "prepare_attn": (
        LayerScatterModes(F, T, F, T, T),
        "got layer_input_mode=FULL, attn_mode=TP_ATTN_FULL; expected modes that prepare_attn has a function for",
    ),
    "prepare_mlp": (
        LayerScatterModes(T, T, F, F, T),
        "got attn_mode=TP_ATTN_FULL, layer_input_mode=TP_ATTN_FULL, mlp_mode=FULL, middle_residual_mode=FULL; expected"
        " modes that prepare_mlp has a function for",
    ),
    "postprocess_layer": (
        LayerScatterModes(T, T, F, T, S),
        "got mlp_mode=FULL, middle_residual_mode=TP_ATTN_FULL, layer_output_mode=SCATTERED; expected modes that"
        " postprocess_layer has a function for",
    ),
}


def refused_layers(ctx: RankContext) -> dict[str, str]:
    """Modes without a function, and options that reduce twice -> the error."""
    config = ParallelConfig(4, 2, True)
    texts = {}
    with LayerGroups(config, ctx.group) as groups:
        for name, (modes, _) in NO_FUNCTION.items():
            texts[name] = error_text(
                lambda modes=modes: LayerCommunicator(groups, modes, NORM, NORM, is_last_layer=False)
            )
        usual = LayerScatterModes(T, T, F, T, T)
        for option in ("allow_mlp_allreduce_fusion", "allow_reduce_scatter"):
            texts[option] = error_text(
                lambda option=option: LayerCommunicator(
                    groups, usual, NORM, NORM, is_last_layer=False, mlp_reduces=True, **{option: True}
                )
            )
    return texts


def test_layers_that_cannot_be_made() -> None:
    twice = (
        "LayerCommunicator: got mlp_reduces=True with {0}=True, which would reduce the MLP's output twice; expected a"
        " down-projection that does not reduce, or {0}=False"
    )
    expected = {name: f"LayerCommunicator: {text}" for name, (_, text) in NO_FUNCTION.items()}
    for option in ("allow_mlp_allreduce_fusion", "allow_reduce_scatter"):
        expected[option] = twice.format(option)
    assert run_ranks(refused_layers, 4) == [expected] * 4


def misused(ctx: RankContext) -> dict[str, str]:
    """Calls that reduce twice, or not at all, or with the wrong rows -> the error."""
    texts = {}
    with LayerGroups(ParallelConfig(4, 2, True), ctx.group) as groups:
        modes = LayerScatterModes(T, T, F, T, T)
        layer = LayerCommunicator(groups, modes, NORM, NORM, is_last_layer=False)
        scattered = LayerCommunicator(groups, LayerScatterModes(S, T, S, S, S), NORM, NORM, is_last_layer=False)
        x = torch.ones(3, 4)
        texts["numbers not set"] = error_text(lambda: layer.postprocess_layer(layer.mlp_output(torch.ones(6, 4)), x))
        groups.set_num_tokens((3, 3))
        texts["attention reduced already"] = error_text(lambda: layer.prepare_mlp(x, x))  # type: ignore[arg-type]
        texts["MLP reduced already"] = error_text(lambda: layer.postprocess_layer(torch.ones(6, 4), x))
        texts["nothing to reduce"] = error_text(lambda: scattered.postprocess_layer(PartialSum(x, "tp"), x))
        texts["a sum into a scattered layer"] = error_text(lambda: scattered.prepare_attn(PartialSum(x, "tp"), x))
        texts["no residual"] = error_text(lambda: layer.prepare_attn(layer.attn_output(x), None))
        texts["never reduced"] = error_text(lambda: final_norm(groups, NORM, layer.attn_output(x), x))
        texts["of another group"] = error_text(lambda: layer.prepare_mlp(PartialSum(x, "elsewhere"), x))
        texts["rows"] = error_text(lambda: layer.postprocess_layer(layer.mlp_output(torch.ones(5, 4)), x))
        texts["numbers"] = error_text(lambda: groups.set_num_tokens((1, 2, 3)))
        texts["negative"] = error_text(lambda: groups.set_num_tokens((1, -2)))
        once = layer.attn_output(x)
        layer.prepare_mlp(once, x)
        texts["reduced twice"] = error_text(lambda: layer.prepare_mlp(once, x))
        texts["exchanged"] = str(groups.exchange_num_tokens(groups.attn_dp_rank + 7))
    return texts


SUM_EXPECTED = (
    "{}: got a tensor; expected a PartialSum (attn_output and mlp_output make one of a projection's output, which must"
    " not be reduced already)"
)
TENSOR_EXPECTED = (
    "{}: got PartialSum((3, 4) torch.float32, not yet reduced over group 'tp'); expected a tensor, since nothing is"
    " left to be reduced in this mode"
)
MISUSED = {
    "numbers not set": "LayerGroups: tokens are to be gathered or scattered, but their numbers are not known; expected"
    " set_num_tokens to be called before the forward pass",
    "attention reduced already": SUM_EXPECTED.format("prepare_mlp"),
    "MLP reduced already": SUM_EXPECTED.format("postprocess_layer"),
    "nothing to reduce": TENSOR_EXPECTED.format("postprocess_layer"),
    "a sum into a scattered layer": TENSOR_EXPECTED.format("prepare_attn"),
    "no residual": "prepare_attn: got a PartialSum without a residual; expected a tensor on the first layer",
    "never reduced": "PartialSum: it was passed to sgl_comm.tp_attn_all_reduce_and_layernorm, but it is a sum over"
    " ranks that has not been made yet; expected it to go to the LayerCommunicator (prepare_mlp after attention,"
    " postprocess_layer after the MLP), or to be added to another PartialSum of the same group",
    "of another group": "prepare_mlp: got a PartialSum of group 'elsewhere'; expected one of group '...'",
    "rows": "postprocess_layer: got 5 rows; expected 6, by the numbers of tokens that were set",
    "numbers": "set_num_tokens: got [1, 2, 3]; expected 2 numbers from 0, one for each attention-TP group",
    "negative": "set_num_tokens: got [1, -2]; expected 2 numbers from 0, one for each attention-TP group",
    "reduced twice": "PartialSum: it has been used already, reduced or added to another; expected each to be reduced"
    " once: go on with the result of that",
    "exchanged": "(7, 8)",
}


def test_reducing_twice_or_not_at_all_is_an_error() -> None:
    for texts in run_ranks(misused, 4):
        texts["of another group"] = re.sub(r"group '\d+'", "group '...'", texts["of another group"])
        assert texts == MISUSED


# --- groups


def refused_groups(ctx: RankContext) -> list[str]:
    """Configs that ranks disagree in, or that do not fit the group."""
    configs = [ParallelConfig(2, 1 + ctx.rank, True), ParallelConfig(4)]
    return [error_text(lambda config=config: LayerGroups(config, ctx.group)) for config in configs]


def test_groups_that_do_not_fit_are_refused_on_every_rank() -> None:
    for rank, (disagree, size) in enumerate(run_ranks(refused_groups, 2)):
        assert disagree == f"LayerGroups: got {ParallelConfig(2, 1 + rank, True)}; expected the same on all ranks"
        assert size == "LayerGroups: got 2 ranks in a group; expected tp_size=4"


def places(ctx: RankContext, config: ParallelConfig, models: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """Which ranks each of a rank's communicators joins, of one of several models side by side."""
    groups_of_models = [dist.new_group(list(ranks)) for ranks in models]
    mine = next(group for group, ranks in zip(groups_of_models, models, strict=True) if ctx.rank in ranks)
    me = torch.tensor([ctx.rank])
    with LayerGroups(config, mine) as groups:
        joined = {name: getattr(groups, name).all_gather(me).tolist() for name in ("tp", "attn_tp", "attn_dp", "alone")}
        joined["place"] = [groups.attn_dp_rank, groups.attn_tp_rank]
        names = {name: getattr(groups, name).group_name for name in ("tp", "alone")}
    for name in names.values():
        assert error_text(lambda name=name: sgl_comm.ops.all_reduce(me.float(), name)), "the group is open still"
    dist.destroy_process_group(mine)
    return joined


def test_the_groups_of_one_model() -> None:
    ranks = run_ranks(places, 4, ParallelConfig(4, 2, True), [range(4)])
    assert [rank["tp"] for rank in ranks] == [[0, 1, 2, 3]] * 4
    assert [rank["attn_tp"] for rank in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["attn_dp"] for rank in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["alone"] for rank in ranks] == [[0], [1], [2], [3]]
    assert [rank["place"] for rank in ranks] == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_the_groups_of_two_models_side_by_side() -> None:
    ranks = run_ranks(places, 4, ParallelConfig(2, 2), [(0, 2), (1, 3)])
    assert [rank["tp"] for rank in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["attn_tp"] for rank in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["attn_dp"] for rank in ranks] == [[0], [1], [2], [3]]
    assert [rank["place"] for rank in ranks] == [[0, 0], [0, 0], [0, 1], [0, 1]]
