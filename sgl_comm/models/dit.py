"""A small diffusion transformer with random weights, and its denoising under classifier-free guidance.

Blocks in the manner of DiT (Peebles and Xie, 2023): attention and an MLP, each between a shift, a scale and a gate that
come from the time and the condition. Steps are Euler's along a predicted velocity (Lipman et al., 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu

from sgl_comm.cfg_group import CfgGroup


@dataclass(frozen=True)
class DitConfig:
    """The shape of a denoiser of latents ``[batch, channels, height, width]``."""

    channels: int = 4
    patch: int = 2
    hidden_size: int = 32
    heads: int = 4
    mlp_size: int = 64
    blocks: int = 2
    seed: int = 0


class Dit:
    """Predicts the velocity of latents at a time, under a condition."""

    def __init__(
        self, config: DitConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.config = config
        random_bits = torch.Generator().manual_seed(config.seed)

        def weight(rows: int, columns: int) -> Tensor:
            made = torch.randn(rows, columns, generator=random_bits) * columns**-0.5
            return made.to(device, dtype)

        hidden, patch_size = config.hidden_size, config.channels * config.patch**2
        self.embed, self.unembed = weight(hidden, patch_size), weight(patch_size, hidden)
        self.time = weight(hidden, hidden)
        self.blocks = [
            {
                "modulation": weight(6 * hidden, hidden),
                "qkv": weight(3 * hidden, hidden),
                "out": weight(hidden, hidden),
                "up": weight(config.mlp_size, hidden),
                "down": weight(hidden, config.mlp_size),
            }
            for _ in range(config.blocks)
        ]

    def __call__(self, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """The velocity.

        Args:
            latents: ``[batch, channels, height, width]``.
            time: ``[batch]``, from 1 (noise) to 0.
            condition: ``[batch, hidden_size]``; zeros where there is none.

        Returns:
            Of the latents' shape, channels last.
        """
        batch, channels, height, width = latents.shape
        patch = self.config.patch
        patches = latents.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5)
        x = patches.flatten(3).flatten(1, 2) @ self.embed.t()
        context = silu(self._waves(time).to(x.dtype) @ self.time.t() + condition)
        for block in self.blocks:
            x = self._block(block, x, context)
        x = layer_norm(x, x.shape[-1:]) @ self.unembed.t()
        x = x.view(batch, height // patch, width // patch, channels, patch, patch)
        return x.permute(0, 1, 4, 2, 5, 3).reshape(batch, height, width, channels).permute(0, 3, 1, 2)

    def _waves(self, time: Tensor) -> Tensor:
        half = self.config.hidden_size // 2
        rates = torch.exp(torch.arange(half, device=time.device) * (-9.2 / half))
        phases = 1000 * time[:, None].float() * rates
        return torch.cat([phases.cos(), phases.sin()], dim=1)

    def _block(self, block: dict[str, Tensor], x: Tensor, context: Tensor) -> Tensor:
        modulation = (context @ block["modulation"].t())[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        y = layer_norm(x, x.shape[-1:]) * (1 + scale_a) + shift_a
        qkv = (y @ block["qkv"].t()).unflatten(2, (3, self.config.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2)
        x = x + gate_a * (attended @ block["out"].t())
        y = layer_norm(x, x.shape[-1:]) * (1 + scale_m) + shift_m
        return x + gate_m * (silu(y @ block["up"].t()) @ block["down"].t())


Model = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A velocity from latents, times and conditions, as ``Dit``."""


def denoise_step(
    model: Model,
    group: CfgGroup,
    latents: Tensor,
    conditions: Tensor,
    guidance_scale: float,
    time: float,
    next_time: float,
) -> Tensor:
    """One step of ``denoise``, from ``time`` to ``next_time``."""
    own = group.split(conditions)
    x = latents.repeat(group.num_local, 1, 1, 1)
    velocity = model(x, torch.full((x.size(0),), time, device=x.device), own)
    return latents + (next_time - time) * group.combine(velocity, guidance_scale)


def denoise(
    model: Model, group: CfgGroup, latents: Tensor, conditions: Tensor, guidance_scale: float, num_steps: int
) -> Tensor:
    """Latents without their noise; the ranks of ``group`` share the branches of each step, and end alike.

    Args:
        model: alike on all ranks.
        group: who computes which branch.
        latents: ``[batch, channels, height, width]``, noise, alike on all ranks (``cfg_broadcast_`` makes it so).
        conditions: ``[num_branches * batch, hidden_size]``, the branches one after the other.
        guidance_scale: as for ``CfgGroup.combine``.
        num_steps: of equal length, from time 1 to 0.
    """
    for step in range(num_steps):
        times = 1 - step / num_steps, 1 - (step + 1) / num_steps
        latents = denoise_step(model, group, latents, conditions, guidance_scale, *times)
    return latents
