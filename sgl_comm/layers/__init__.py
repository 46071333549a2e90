"""When a model layer reduces, gathers and normalises; how that is done is the ops' business."""

from sgl_comm.layers.communicator import LayerCommunicator, final_norm
from sgl_comm.layers.groups import LayerGroups
from sgl_comm.layers.norm import Norm
from sgl_comm.layers.parallel_config import (
    ParallelConfig,
    require_attn_tp_gather,
    require_gathered_buffer,
    require_mlp_tp_gather,
)
from sgl_comm.layers.partial_sum import PartialSum
from sgl_comm.layers.scatter_mode import LayerScatterModes, ScatterMode

__all__ = [
    "LayerCommunicator",
    "LayerGroups",
    "LayerScatterModes",
    "Norm",
    "ParallelConfig",
    "PartialSum",
    "ScatterMode",
    "final_norm",
    "require_attn_tp_gather",
    "require_gathered_buffer",
    "require_mlp_tp_gather",
]
