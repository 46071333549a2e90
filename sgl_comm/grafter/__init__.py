"""Moves tensors between two running systems, so that an accuracy bug can be bisected: see docs/grafter.md."""

from sgl_comm.grafter.compare import Comparison
from sgl_comm.grafter.config import GrafterConfig
from sgl_comm.grafter.filters import Filter
from sgl_comm.grafter.grafter import Grafter
from sgl_comm.grafter.layouts import Layout, Pad, Replicate, Shard

__all__ = ["Comparison", "Filter", "Grafter", "GrafterConfig", "Layout", "Pad", "Replicate", "Shard"]
