"""Classifier-free guidance over ranks: each computes one branch, and their weighted sum is what guides.

Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022: with a scale ``s``, ``uncond + s * (cond - uncond)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from sgl_comm.backends.capability import SUPPORTED_DTYPES
from sgl_comm.communicator import Communicator
from sgl_comm.errors import SglCommError


class CfgGroup:
    """The branches of guidance, one a rank, or all on the only one: the same model code serves both.

    Batches have the branches one after the other along dim 0, all of one size, the conditional one first.

    Args:
        comm: the ranks: as many as there are branches, or one.
        num_branches: 2, conditional and unconditional; more where several conditions have weights of their own.

    Raises:
        SglCommError: another number of ranks, or fewer than two branches.
    """

    def __init__(self, comm: Communicator, num_branches: int = 2) -> None:
        if num_branches < 2:
            raise SglCommError(f"CfgGroup: got num_branches={num_branches}; expected at least 2")
        if comm.world_size not in (1, num_branches):
            raise SglCommError(
                f"CfgGroup: got a group of {comm.world_size} ranks; expected {num_branches}, one a branch, or 1"
            )
        self.comm, self.num_branches = comm, num_branches
        self.num_local = num_branches // comm.world_size
        """How many branches this rank computes: one, or all."""

    def split(self, batch: Tensor) -> Tensor:
        """This rank's part of a batch of all branches, as a view: its branch, or the whole.

        Raises:
            SglCommError: dim 0 cannot be divided into the branches.
        """
        self._check_rows(batch, "split")
        return batch if self.comm.world_size == 1 else batch.chunk(self.num_branches)[self.comm.rank]

    def combine(self, prediction: Tensor, guidance_scale: float | Sequence[float]) -> Tensor:
        """The guided prediction, alike on every rank: the branches' weighted sum, added in fp32 in their order.

        Args:
            prediction: the model's output for ``split``'s rows, float32, bfloat16 or float16, any strides.
            guidance_scale: ``s`` of two branches, whose weights are then ``s`` and ``1 - s``; or a weight a branch.
                They are multiplied in the prediction's dtype. Alike on all ranks.

        Returns:
            A new row-major tensor of one branch's rows.

        Raises:
            SglCommError: another dtype, a number of weights that is not that of the branches, or a failed call.
        """
        if prediction.dtype not in SUPPORTED_DTYPES:
            raise SglCommError(
                f"CfgGroup.combine: got {prediction.dtype}; expected one of {', '.join(map(str, SUPPORTED_DTYPES))}"
            )
        weights = self._weights(guidance_scale)
        if self.comm.world_size > 1:
            return self.comm.cfg_all_reduce(prediction * weights[self.comm.rank])
        self._check_rows(prediction, "combine")
        first, *others = (x * w for x, w in zip(prediction.chunk(self.num_branches), weights, strict=True))
        total = first.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        for each in others:
            total += each.to(torch.float32)
        return total.to(prediction.dtype)

    def _weights(self, guidance_scale: float | Sequence[float]) -> tuple[float, ...]:
        if isinstance(guidance_scale, Real):
            if self.num_branches != 2:
                raise SglCommError(
                    f"CfgGroup.combine: got one scale for {self.num_branches} branches; expected a weight for each"
                )
            return guidance_scale, 1 - guidance_scale
        weights = tuple(guidance_scale)
        if len(weights) != self.num_branches:
            raise SglCommError(
                f"CfgGroup.combine: got {len(weights)} weights; expected {self.num_branches}, one a branch"
            )
        return weights

    def _check_rows(self, batch: Tensor, what: str) -> None:
        if batch.dim() == 0 or batch.size(0) % self.num_branches:
            raise SglCommError(
                f"CfgGroup.{what}: got a batch of shape {tuple(batch.shape)}; expected dim 0 to be a multiple of"
                f" {self.num_branches}, the number of branches"
            )
