"""How a model is divided over its ranks, and what follows from that for the inputs of its layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sgl_comm.errors import SglCommError

ALL_TO_ALL_BACKENDS = ("all_to_all_single",)


@dataclass(frozen=True)
class ParallelConfig:
    """The parallel layout of a model.

    The ranks of the tensor-parallel (TP) group are divided, with DP attention, into ``dp_size`` attention-TP groups of
    neighbouring ranks, each of which has tokens of its own. Without DP attention all ranks have the same tokens, and
    ``dp_size`` only says how many such models run side by side, which share nothing.

    Raises:
        SglCommError: a value that cannot work; the text says which would.
    """

    tp_size: int
    """How many ranks the model has."""
    dp_size: int = 1
    """How many sets of tokens; with DP attention a divisor of ``tp_size``."""
    enable_dp_attention: bool = False
    moe_dense_tp_size: int | None = None
    """Dense MLPs: None divides their weights over all ranks; 1 gives each rank all of them and a part of the tokens;
    ``tp_size`` divides them over each attention-TP group, so that tokens stay where attention had them. Where
    attention-TP groups have one rank, ``tp_size`` is the same as None."""
    moe_a2a_backend: str | None = None
    """How tokens reach their experts: None gives every rank all tokens and a part of every expert; "all_to_all_single"
    gives it undivided experts, and a part of the tokens to send out."""

    def __post_init__(self) -> None:
        for name in ("tp_size", "dp_size"):
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise _refusal(f"{name}={value!r}", "it counts ranks", "an integer from 1")
        if not isinstance(self.enable_dp_attention, bool):
            raise _refusal(f"enable_dp_attention={self.enable_dp_attention!r}", "it is a switch", "True or False")
        if self.enable_dp_attention and self.tp_size % self.dp_size:
            raise _refusal(
                f"dp_size={self.dp_size} with tp_size={self.tp_size}",
                "DP attention divides the ranks into dp_size groups of one size",
                f"a divisor of tp_size: {_listed(n for n in range(1, self.tp_size + 1) if self.tp_size % n == 0)}",
            )
        dense = self.moe_dense_tp_size
        if dense is not None and (not _is_int(dense) or dense not in (1, self.tp_size)):
            raise _refusal(
                f"moe_dense_tp_size={dense!r} with tp_size={self.tp_size}",
                "there are no groups of another size for dense MLPs",
                f"None or {_listed(sorted({1, self.tp_size}))}",
            )
        if self.moe_a2a_backend is not None and self.moe_a2a_backend not in ALL_TO_ALL_BACKENDS:
            raise _refusal(
                f"moe_a2a_backend={self.moe_a2a_backend!r}",
                "no such way to send tokens to their experts",
                f"None or {_listed(map(repr, ALL_TO_ALL_BACKENDS))}",
            )

    @property
    def attn_dp_size(self) -> int:
        """How many sets of tokens the TP group has: 1 without DP attention."""
        return self.dp_size if self.enable_dp_attention else 1

    @property
    def attn_tp_size(self) -> int:
        """How many ranks attention is divided over; they have the same tokens."""
        return self.tp_size // self.attn_dp_size

    @property
    def dense_tp_size(self) -> int:
        """How many ranks the weights of a dense MLP are divided over."""
        if self.moe_dense_tp_size == 1:
            return 1
        return self.attn_tp_size if self.dense_stays_in_attn_tp else self.tp_size

    @property
    def dense_stays_in_attn_tp(self) -> bool:
        """Whether dense MLPs are divided over the attention-TP group, so that they need no tokens of others."""
        return self.moe_dense_tp_size == self.tp_size and self.attn_tp_size > 1


def require_attn_tp_gather(config: ParallelConfig) -> bool:
    """Whether attention may find its input scattered over the attention-TP group, and has to gather it."""
    if config.moe_a2a_backend is None and config.moe_dense_tp_size is None:
        return False
    return config.dp_size < config.tp_size if config.enable_dp_attention else True


def require_mlp_tp_gather(config: ParallelConfig) -> bool:
    """Whether some MLP needs the tokens of several attention-TP groups: MoE without all-to-all, or dense MLPs."""
    return config.attn_dp_size > 1 and (config.moe_a2a_backend is None or config.dense_tp_size > config.attn_tp_size)


def require_gathered_buffer(config: ParallelConfig) -> bool:
    """Whether any layer gathers tokens, so that the ranks' token counts must be known to all."""
    return require_mlp_tp_gather(config) or require_attn_tp_gather(config)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _refusal(got: str, reason: str, expected: str) -> SglCommError:
    return SglCommError(f"ParallelConfig: got {got}, but {reason}; expected {expected}")
