"""Reference models on top of ``sgl_comm.layers``, with random weights: to test against, to time, and to copy from."""

from sgl_comm.models.blocks import Cache, ModelConfig
from sgl_comm.models.dit import Dit, DitConfig, denoise, denoise_step
from sgl_comm.models.greedy import CapturedStep, greedy
from sgl_comm.models.step3p5 import Step3p5, Unsharded

__all__ = [
    "Cache",
    "CapturedStep",
    "Dit",
    "DitConfig",
    "ModelConfig",
    "Step3p5",
    "Unsharded",
    "denoise",
    "denoise_step",
    "greedy",
]
