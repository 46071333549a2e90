"""The process groups of a model's layers, each with a communicator, and how many tokens each group has."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from sgl_comm.backends.capability import as_device
from sgl_comm.backends.rendezvous import Rendezvous
from sgl_comm.communicator import Communicator, init
from sgl_comm.errors import SglCommError
from sgl_comm.layers.parallel_config import ParallelConfig


class LayerGroups:
    """The groups of one model, made once and used by the communicators of all its layers.

    A collective call of all ranks of the default group, as ``torch.distributed.new_group`` is: where that holds several
    models side by side, each rank gives its model's group. It makes groups of its own, so that the given one may have a
    communicator or not. Rank ``d * attn_tp_size + a`` of a model is rank ``a`` of its attention-TP group ``d``.

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
    """The ranks that have this rank's number in their attention-TP groups, one of each group."""
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
        self._process_groups: list[ProcessGroup] = []
        self._communicators: dict[tuple[int, ...], Communicator] = {}
        me, width = dist.get_rank(), config.attn_tp_size
        try:
            for model in _models(config, group, device):
                for members in _groups_of(model, width):
                    made = dist.new_group(list(members))
                    if me in members:
                        self._process_groups.append(made)
                        self._communicators[members] = init(made, device, max_size)
                if me in model:
                    rank = model.index(me)
                    self.attn_dp_rank, self.attn_tp_rank = divmod(rank, width)
                    self.tp = self._communicators[model]
                    self.attn_tp = self._communicators[model[rank - self.attn_tp_rank :][:width]]
                    self.attn_dp = self._communicators[model[self.attn_tp_rank :: width]]
                    self.alone = self._communicators[(me,)]
        except BaseException:
            self.close()
            raise

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
            for communicator in self._communicators.values():
                stack.enter_context(communicator.capture())
            yield

    def close(self) -> None:
        """Closes the communicators and gives up the groups; safe to call twice."""
        for communicator in self._communicators.values():
            communicator.close()
        for group in self._process_groups:
            dist.destroy_process_group(group)
        self._communicators.clear()
        self._process_groups.clear()

    def __enter__(self) -> LayerGroups:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _models(
    config: ParallelConfig, group: ProcessGroup | None, device: torch.device | str | int | None
) -> list[tuple[int, ...]]:
    """The ranks of every model that is being set up, in ascending order, by their numbers in the default group."""
    ranks = dist.get_process_group_ranks(Rendezvous.of(group).group)
    everyone = Rendezvous.of(None, None if device is None else as_device(device))
    mine = torch.zeros(everyone.world + 4, dtype=torch.uint8)
    mine[ranks] = 1
    mine[everyone.world :] = torch.tensor(list(zlib.crc32(repr(config).encode()).to_bytes(4, "little")))
    answers = everyone.all_gather(mine).view(everyone.world, -1)
    if (answers[:, everyone.world :] != mine[everyone.world :]).any():
        raise SglCommError(f"LayerGroups: got {config}; expected the same on all ranks")
    members = answers[:, : everyone.world].bool()
    sizes = members.sum(1).unique().tolist()
    if sizes != [config.tp_size]:
        raise SglCommError(
            f"LayerGroups: got {' and '.join(map(str, sizes))} ranks in a group; expected tp_size={config.tp_size}"
        )
    return sorted({tuple(row.nonzero().flatten().tolist()) for row in members})


def _groups_of(model: tuple[int, ...], width: int) -> list[tuple[int, ...]]:
    """All groups of one model, each once: all ranks, the attention-TP groups, those across them, each rank alone."""
    rows = [model[start : start + width] for start in range(0, len(model), width)]
    columns = [model[start::width] for start in range(width)]
    return list(dict.fromkeys([model, *rows, *columns, *((rank,) for rank in model)]))
