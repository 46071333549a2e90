"""What serves a tensor, why nothing better does, and what would help."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sgl_comm.backends.capability import SUPPORTED_DTYPES
from sgl_comm.backends.custom_all_reduce_v1 import CustomAllReduceV1
from sgl_comm.backends.custom_all_reduce_v2 import CustomAllReduceV2
from sgl_comm.backends.shm_all_reduce import ShmAllReduce

*_OTHERS, _LAST = (str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
_FLOATS = f"{', '.join(_OTHERS)} or {_LAST}"


@dataclass(frozen=True)
class Explanation:
    """The answer of ``Communicator.explain``; as text, a few lines.

    Attributes:
        backend: "v2", "v1", "shm", or the group's own backend ("gloo", "nccl"); "none" if the op gives an error.
        algorithm: of V2 "one_shot", "two_shot" or their rings; of V1 "one_shot_pull" or "two_shot_pull"; else empty.
        why_not: each better backend and why it does not serve this tensor.
        fix: what would let a better one serve; empty where none is better or nothing helps.
    """

    backend: str
    algorithm: str = ""
    why_not: dict[str, str] = field(default_factory=dict)
    fix: str = ""

    def __str__(self) -> str:
        lines = [f"served by {self.backend}" + (f" ({self.algorithm})" if self.algorithm else "")]
        lines += [f"not by {backend}: {reason}" for backend, reason in self.why_not.items()]
        return "\n".join(lines + ([f"to fix it: {self.fix}"] if self.fix else []))


def explain(
    shm: ShmAllReduce,
    v1: CustomAllReduceV1 | None,
    v2: CustomAllReduceV2 | None,
    fallback: str,
    input: Tensor,
    reduce_op: str,
) -> Explanation:
    """The explanation for one tensor; ``v1`` and ``v2`` are None in a group that was initialised for the CPU."""
    candidates = (("shm", shm),) if input.device.type == "cpu" else (("v2", v2), ("v1", v1))
    why_not: dict[str, str] = {}
    fixes: list[str] = []
    for backend, candidate in candidates:
        reason, fix = _obstacle(candidate, input, reduce_op)
        if not reason:
            return Explanation(backend, _algorithm(candidate, input), why_not, "; ".join(dict.fromkeys(fixes)))
        why_not[backend] = reason
        fixes += [fix] if fix else []
    serving = [each for _, each in candidates if each is not None and not each.disabled]
    if any(_is_elsewhere(each, input) for each in serving):
        return Explanation("none", "", why_not, fixes[-1])
    return Explanation(fallback, "", why_not, "; ".join(dict.fromkeys(fixes)))


def _is_elsewhere(candidate: ShmAllReduce | CustomAllReduceV1 | CustomAllReduceV2, input: Tensor) -> bool:
    """Whether the tensor is on a GPU that is not the group's; the op refuses it where its kernels would serve."""
    if isinstance(candidate, ShmAllReduce) or input.dtype not in SUPPORTED_DTYPES:
        return False
    return input.device != candidate.device


def _obstacle(
    candidate: ShmAllReduce | CustomAllReduceV1 | CustomAllReduceV2 | None, input: Tensor, reduce_op: str
) -> tuple[str, str]:
    """Why it does not serve this tensor, or empty; and what would help, if anything does."""
    if candidate is None:
        return "the group was initialised for the CPU", "init(group, device='cuda')"
    if candidate.disabled:
        reason, _, fix = candidate.reason.partition("; ")
        return reason, fix
    if reduce_op != "sum":
        return f"reduce_op is {reduce_op!r}, and the kernels sum", ""
    if input.dtype not in SUPPORTED_DTYPES:
        return f"the dtype is {input.dtype}, and the kernels sum {_FLOATS}", f"a tensor of {_FLOATS}"
    if isinstance(candidate, ShmAllReduce):
        return "", ""
    if _is_elsewhere(candidate, input):
        return f"the tensor is on {input.device}, the group on {candidate.device}", f"a tensor on {candidate.device}"
    if not candidate.should_custom_ar(input):
        limit = candidate.thresholds.fallback_bytes
        return f"{input.nbytes} bytes are more than {limit}, and SGLCOMM_INVARIANT is 0", "SGLCOMM_INVARIANT=1"
    return "", ""


def _algorithm(candidate: ShmAllReduce | CustomAllReduceV1 | CustomAllReduceV2 | None, input: Tensor) -> str:
    if isinstance(candidate, CustomAllReduceV2) and candidate.world_size > 1:
        return candidate.algorithm(input.nbytes)
    if isinstance(candidate, CustomAllReduceV1) and candidate.world_size > 1:
        one_shot = candidate.world_size == 2 or input.nbytes <= candidate.thresholds.one_shot_bytes
        return "one_shot_pull" if one_shot else "two_shot_pull"
    return ""
