"""Helpers for tests of code that communicates: real ranks, awkward values, memory layouts, bitwise comparison."""

from sgl_comm.testing.ranks import Dead, RankError, RankPool, RankTimeout, close_pools, run_ranks
from sgl_comm.testing.simulated import SimulatedRank, capture_simulated, make_simulated
from sgl_comm.testing.tensors import (
    Layout,
    Placed,
    assert_bits_equal,
    bits_equal,
    layouts,
    special_values,
    wrong_elements,
)
from sgl_comm.testing.worker import RankContext

__all__ = [
    "Dead",
    "Layout",
    "Placed",
    "RankContext",
    "RankError",
    "RankPool",
    "RankTimeout",
    "SimulatedRank",
    "assert_bits_equal",
    "bits_equal",
    "capture_simulated",
    "close_pools",
    "layouts",
    "make_simulated",
    "run_ranks",
    "special_values",
    "wrong_elements",
]
