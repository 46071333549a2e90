"""What a captured CUDA graph is made of, as the driver tells it."""

from __future__ import annotations

import ctypes

import torch

KERNEL = 0
OTHER_TYPES = {1: "memcpy", 2: "memset", 3: "host", 4: "graph", 5: "empty", 6: "event wait", 7: "event record"}
"""Some of the others, by their value of ``CUgraphNodeType``."""


class KernelNodeParams(ctypes.Structure):
    """``CUDA_KERNEL_NODE_PARAMS_v2``."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("grid_and_block_and_shared_memory", ctypes.c_uint * 7),
        ("parameters", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


def node_names(graph: torch.cuda.CUDAGraph) -> list[str]:
    """The nodes of a graph that was made with ``keep_graph=True``: a kernel's mangled name, or what else it is."""
    driver = ctypes.CDLL("libcuda.so.1")

    def ask(function: str, *arguments: object) -> None:
        if status := getattr(driver, function)(*arguments):
            raise RuntimeError(f"{function} failed with status {status}")

    handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    ask("cuGraphGetNodes", handle, None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    ask("cuGraphGetNodes", handle, nodes, ctypes.byref(count))
    names = []
    for node in map(ctypes.c_void_p, nodes):
        kind = ctypes.c_int()
        ask("cuGraphNodeGetType", node, ctypes.byref(kind))
        if kind.value != KERNEL:
            names.append(OTHER_TYPES.get(kind.value, f"node of type {kind.value}"))
            continue
        params, name = KernelNodeParams(), ctypes.c_char_p()
        ask("cuGraphKernelNodeGetParams_v2", node, ctypes.byref(params))
        if params.function:
            ask("cuFuncGetName", ctypes.byref(name), ctypes.c_void_p(params.function))
        else:
            ask("cuKernelGetName", ctypes.byref(name), ctypes.c_void_p(params.kernel))
        names.append((name.value or b"").decode())
    return names
