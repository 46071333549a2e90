"""The groups of ranks that a model's layers talk in, each with a communicator, and how many tokens are where."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from sgl_comm.communicator import Communicator, init
from sgl_comm.errors import SglCommError
from sgl_comm.layers.parallel_config import ParallelConfig


class LayerGroups:
    """The groups of one model, made once and used by the communicators of all its layers.

    A collective call, as ``sgl_comm.init`` is; it makes groups of its own, so that the given one may have a
    communicator or not. Rank ``d * attn_tp_size + a`` of the model is rank ``a`` of attention-TP group ``d``.

    Args:
        config: the layout, alike on all ranks.
        group: the model's ranks, ``config.tp_size`` of them; None for the default group.
        device, max_size: as for ``sgl_comm.init``.

    Raises:
        SglCommError: ranks that disagree, a group of another size, or what ``sgl_comm.init`` refuses.
    """

    tp: Communicator
    """All ranks of the model."""
    attn_tp: Communicator
    """The ranks that share this rank's tokens. The same object as ``tp`` if these are all ranks."""
    attn_dp: Communicator
    """The ranks of the same place in each attention-TP group."""
    alone: Communicator
    """This rank by itself."""

    def __init__(
        self,
        config: ParallelConfig,
        group: ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
        max_size: int | None = None,
    ) -> None:
        self.config = config
        self._num_tokens: tuple[int, ...] | None = None
        self._made: dict[tuple[int, ...], tuple[Communicator, ProcessGroup]] = {}
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        me, width = dist.get_rank(group), config.attn_tp_size

        def communicator(members: Sequence[int]) -> Communicator:
            key = tuple(ranks[member] for member in members)
            if key not in self._made:
                made = dist.new_group(list(key), use_local_synchronization=True)
                try:
                    self._made[key] = init(made, device, max_size), made
                except BaseException:
                    dist.destroy_process_group(made)
                    raise
            return self._made[key][0]

        try:
            self.tp = communicator(range(len(ranks)))
            self._refuse_together()
            self.attn_dp_rank, self.attn_tp_rank = divmod(me, width)
            self.attn_tp = communicator(range(me - self.attn_tp_rank, me - self.attn_tp_rank + width))
            self.attn_dp = communicator(range(self.attn_tp_rank, config.tp_size, width))
            self.alone = communicator([me])
        except BaseException:
            self.close()
            raise

    def _refuse_together(self) -> None:
        mine = torch.tensor([zlib.crc32(repr(self.config).encode())], device=self.tp.device)
        if self.tp.all_gather(mine).unique().numel() > 1:
            raise SglCommError(f"LayerGroups: got {self.config}; expected the same on all ranks of the group")
        if self.tp.world_size != self.config.tp_size:
            raise SglCommError(
                f"LayerGroups: got a group of {self.tp.world_size} ranks; expected tp_size={self.config.tp_size}"
            )

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """The tokens of each attention-TP group in this forward pass.

        Raises:
            SglCommError: they were not set.
        """
        if self._num_tokens is None:
            raise SglCommError(
                "LayerGroups: tokens are to be gathered or scattered, but their numbers are not known; expected"
                " set_num_tokens to be called before the forward pass"
            )
        return self._num_tokens

    @property
    def own_num_tokens(self) -> int:
        """The tokens of this rank's attention-TP group."""
        return self.num_tokens[self.attn_dp_rank]

    def set_num_tokens(self, num_tokens: Sequence[int]) -> None:
        """Says before a forward pass how many tokens each attention-TP group has; makes no collective call.

        Args:
            num_tokens: ``config.attn_dp_size`` numbers from 0, alike on all ranks.

        Raises:
            SglCommError: another number of them, or a negative one.
        """
        if len(num_tokens) != self.config.attn_dp_size or any(count < 0 for count in num_tokens):
            raise SglCommError(
                f"set_num_tokens: got {list(num_tokens)}; expected {self.config.attn_dp_size} numbers from 0, one for"
                " each attention-TP group"
            )
        self._num_tokens = tuple(num_tokens)

    def exchange_num_tokens(self, own: int) -> tuple[int, ...]:
        """``set_num_tokens`` where each rank knows only its own: a small ``all_gather``, and the host waits."""
        mine = torch.tensor([own], device=self.attn_dp.device)
        self.set_num_tokens(self.attn_dp.all_gather(mine).tolist())
        return self.num_tokens

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Around the capture of CUDA graphs: ``Communicator.capture`` of every group. Collective."""
        with ExitStack() as stack:
            for made, _ in self._made.values():
                stack.enter_context(made.capture())
            yield

    def close(self) -> None:
        """Closes the communicators and gives up the groups; safe to call twice."""
        for made, group in self._made.values():
            made.close()
            dist.destroy_process_group(group)
        self._made.clear()

    def __enter__(self) -> LayerGroups:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
