"""Parallel layouts of a model, and the modes of a layer's tokens: every value spelled out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from sgl_comm import SglCommError
from sgl_comm.layers import (
    LayerScatterModes,
    ParallelConfig,
    ScatterMode,
    require_attn_tp_gather,
    require_gathered_buffer,
    require_mlp_tp_gather,
)

A2A = "all_to_all_single"

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tp_size": 0}, "got tp_size=0, but it counts ranks; expected an integer from 1"),
    ({"tp_size": -2}, "got tp_size=-2, but it counts ranks; expected an integer from 1"),
    ({"tp_size": 2.0}, "got tp_size=2.0, but it counts ranks; expected an integer from 1"),
    ({"tp_size": True}, "got tp_size=True, but it counts ranks; expected an integer from 1"),
    ({"tp_size": None}, "got tp_size=None, but it counts ranks; expected an integer from 1"),
    ({"tp_size": 2, "dp_size": 0}, "got dp_size=0, but it counts ranks; expected an integer from 1"),
    ({"tp_size": 2, "dp_size": "2"}, "got dp_size='2', but it counts ranks; expected an integer from 1"),
    (
        {"tp_size": 2, "enable_dp_attention": 1},
        "got enable_dp_attention=1, but it is a switch; expected True or False",
    ),
    (
        {"tp_size": 4, "dp_size": 3, "enable_dp_attention": True},
        "got dp_size=3 with tp_size=4, but DP attention divides the ranks into dp_size groups of one size; expected a"
        " divisor of tp_size: 1, 2, 4",
    ),
    (
        {"tp_size": 6, "dp_size": 12, "enable_dp_attention": True},
        "got dp_size=12 with tp_size=6, but DP attention divides the ranks into dp_size groups of one size; expected a"
        " divisor of tp_size: 1, 2, 3, 6",
    ),
    (
        {"tp_size": 4, "moe_dense_tp_size": 2},
        "got moe_dense_tp_size=2 with tp_size=4, but there are no groups of another size for dense MLPs; expected None"
        " or 1, 4",
    ),
    (
        {"tp_size": 1, "moe_dense_tp_size": 4},
        "got moe_dense_tp_size=4 with tp_size=1, but there are no groups of another size for dense MLPs; expected None"
        " or 1",
    ),
    (
        {"tp_size": 4, "moe_dense_tp_size": True},
        "got moe_dense_tp_size=True with tp_size=4, but there are no groups of another size for dense MLPs; expected"
        " None or 1, 4",
    ),
    (
        {"tp_size": 4, "moe_a2a_backend": "none"},
        "got moe_a2a_backend='none', but no such way to send tokens to their experts; expected None or"
        " 'all_to_all_single'",
    ),
]


@pytest.mark.parametrize(("values", "text"), REFUSED, ids=[str(values) for values, _ in REFUSED])
def test_what_cannot_work_is_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(SglCommError) as caught:
        ParallelConfig(**values)
    assert str(caught.value) == f"ParallelConfig: {text}"


def test_a_config_is_frozen_and_compares_by_value() -> None:
    config = ParallelConfig(4)
    assert config == ParallelConfig(tp_size=4, dp_size=1, enable_dp_attention=False)
    assert (config.moe_dense_tp_size, config.moe_a2a_backend) == (None, None)
    with pytest.raises(AttributeError):
        config.tp_size = 2  # type: ignore[misc]


# tp_size, dp_size, enable_dp_attention, moe_dense_tp_size -> attn_dp_size, attn_tp_size, dense_tp_size
SIZES = {
    (1, 1, False, None): (1, 1, 1),
    (1, 1, True, 1): (1, 1, 1),
    (4, 1, False, None): (1, 4, 4),
    (4, 1, False, 1): (1, 4, 1),
    (4, 1, False, 4): (1, 4, 4),
    (4, 3, False, None): (1, 4, 4),
    (4, 1, True, None): (1, 4, 4),
    (4, 2, True, None): (2, 2, 4),
    (4, 2, True, 1): (2, 2, 1),
    (4, 2, True, 4): (2, 2, 2),
    (4, 4, True, None): (4, 1, 4),
    (4, 4, True, 1): (4, 1, 1),
    (4, 4, True, 4): (4, 1, 4),
    (6, 3, True, 6): (3, 2, 2),
}


@pytest.mark.parametrize("values", SIZES, ids=str)
@pytest.mark.parametrize("backend", [None, A2A])
def test_derived_sizes(values: tuple[int, int, bool, int | None], backend: str | None) -> None:
    config = ParallelConfig(*values, backend)
    assert (config.attn_dp_size, config.attn_tp_size, config.dense_tp_size) == SIZES[values]


# tp_size, dp_size, enable_dp_attention, moe_dense_tp_size, moe_a2a_backend -> attn_tp_gather, mlp_tp_gather
GATHERS = {
    (1, 1, False, None, None): (False, False),
    (1, 1, False, None, A2A): (True, False),
    (1, 1, False, 1, None): (True, False),
    (1, 1, True, 1, None): (False, False),
    (4, 1, False, None, None): (False, False),
    (4, 1, False, None, A2A): (True, False),
    (4, 1, False, 1, None): (True, False),
    (4, 1, False, 4, None): (True, False),
    (4, 2, False, None, None): (False, False),
    (4, 4, False, 1, A2A): (True, False),
    (4, 1, True, None, None): (False, False),
    (4, 1, True, 1, A2A): (True, False),
    (4, 2, True, None, None): (False, True),
    (4, 2, True, None, A2A): (True, True),
    (4, 2, True, 1, None): (True, True),
    (4, 2, True, 1, A2A): (True, False),
    (4, 2, True, 4, None): (True, True),
    (4, 2, True, 4, A2A): (True, False),
    (4, 4, True, None, None): (False, True),
    (4, 4, True, None, A2A): (False, True),
    (4, 4, True, 1, None): (False, True),
    (4, 4, True, 1, A2A): (False, False),
    (4, 4, True, 4, None): (False, True),
    (4, 4, True, 4, A2A): (False, True),
}


@pytest.mark.parametrize("values", GATHERS, ids=str)
def test_what_has_to_be_gathered(values: tuple[int, int, bool, int | None, str | None]) -> None:
    config = ParallelConfig(*values)
    attn, mlp = GATHERS[values]
    assert require_attn_tp_gather(config) is attn
    assert require_mlp_tp_gather(config) is mlp
    assert require_gathered_buffer(config) is (attn or mlp)


# --- the modes of a layer

S, T, F = ScatterMode.SCATTERED, ScatterMode.TP_ATTN_FULL, ScatterMode.FULL

DENSE_FULL, DENSE_ATTN, DENSE_WHOLE = (4, 2, True, None), (4, 2, True, 4), (4, 2, True, 1)

MLP_MODES = {
    # values of the config, backend -> the mode of a dense MLP, of a sparse one
    ((1, 1, False, None), None): (F, F),
    ((1, 1, False, 1), A2A): (S, S),
    ((4, 1, False, None), None): (F, F),
    ((4, 1, False, 1), None): (S, F),
    ((4, 1, False, 4), None): (T, F),
    ((4, 1, False, 4), A2A): (T, S),
    (DENSE_FULL, None): (F, F),
    (DENSE_FULL, A2A): (F, S),
    (DENSE_ATTN, None): (T, F),
    (DENSE_ATTN, A2A): (T, S),
    (DENSE_WHOLE, None): (S, F),
    (DENSE_WHOLE, A2A): (S, S),
    ((4, 4, True, None), None): (F, F),
    ((4, 4, True, 4), None): (F, F),
    ((4, 4, True, 4), A2A): (F, S),
    ((4, 4, True, 1), A2A): (S, S),
}


@pytest.mark.parametrize(("values", "backend"), MLP_MODES, ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_where_the_mlp_computes(values: tuple[Any, ...], backend: str | None, sparse: bool) -> None:
    modes = LayerScatterModes.init_new(
        config=ParallelConfig(*values, backend),
        is_layer_sparse=sparse,
        is_previous_layer_sparse=False,
        is_first_layer=True,
        is_last_layer=True,
    )
    assert modes.mlp_mode is MLP_MODES[values, backend][sparse]


LAYERS = {
    # config, backend, previous layer (D, M for MoE, or - where this is the first), this one, whether it is the last
    # -> layer input, attention, MLP, middle residual, layer output
    (DENSE_FULL, None, "-", "D", False): (T, T, F, T, T),
    (DENSE_FULL, None, "M", "M", True): (T, T, F, T, T),
    (DENSE_FULL, A2A, "-", "M", False): (T, T, S, S, S),
    (DENSE_FULL, A2A, "-", "M", True): (T, T, S, S, T),
    (DENSE_FULL, A2A, "D", "M", False): (T, T, S, S, S),
    (DENSE_FULL, A2A, "M", "D", False): (S, T, F, T, T),
    (DENSE_FULL, A2A, "M", "D", True): (S, T, F, T, T),
    (DENSE_FULL, A2A, "M", "M", False): (S, T, S, S, S),
    (DENSE_FULL, A2A, "M", "M", True): (S, T, S, S, T),
    (DENSE_FULL, A2A, "D", "D", False): (T, T, F, T, T),
    (DENSE_ATTN, None, "-", "D", False): (T, T, T, T, T),
    (DENSE_ATTN, None, "M", "D", False): (T, T, T, T, T),
    (DENSE_ATTN, None, "D", "D", True): (T, T, T, T, T),
    (DENSE_ATTN, None, "D", "M", False): (T, T, F, T, T),
    (DENSE_ATTN, A2A, "M", "D", False): (S, T, T, T, T),
    (DENSE_ATTN, A2A, "D", "M", False): (T, T, S, S, S),
    (DENSE_WHOLE, None, "-", "D", False): (T, T, S, S, S),
    (DENSE_WHOLE, None, "-", "D", True): (T, T, S, S, T),
    (DENSE_WHOLE, None, "D", "M", False): (S, T, F, T, T),
    (DENSE_WHOLE, None, "M", "D", False): (T, T, S, S, S),
    (DENSE_WHOLE, A2A, "D", "M", False): (S, T, S, S, S),
    (DENSE_WHOLE, A2A, "M", "D", True): (S, T, S, S, T),
}


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_modes_of_a_layer(layer: tuple[tuple[Any, ...], str | None, str, str, bool]) -> None:
    values, backend, previous, this, last = layer
    for of_previous in (False, True) if previous == "-" else (previous == "M",):
        modes = LayerScatterModes.init_new(
            config=ParallelConfig(*values, backend),
            is_layer_sparse=this == "M",
            is_previous_layer_sparse=of_previous,
            is_first_layer=previous == "-",
            is_last_layer=last,
        )
        assert modes == LayerScatterModes(*LAYERS[layer])
