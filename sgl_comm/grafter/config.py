"""How the grafter is set up: ``GrafterConfig``, from code or from ``SGLCOMM_GRAFTER_*``."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from typing import Any

import torch.distributed as dist

from sgl_comm import envs
from sgl_comm.errors import SglCommError
from sgl_comm.grafter.filters import Filter
from sgl_comm.grafter.layouts import Layout, as_layout

_CHOICES = {
    "role": ("baseline", "target"),
    "backend": ("gloo", "nccl", "shm"),
    "mode": ("graft", "observe", "record"),
    "on_dtype": ("error", "cast", "skip"),
    "on_shape": ("error", "cast", "skip"),
}


@dataclasses.dataclass(frozen=True)
class GrafterConfig:
    """One side of two running systems between which tensors are moved. Without ``enable`` all else is ignored.

    Attributes:
        enable: whether tensors are moved at all.
        role: "baseline" or "target".
        b2t_filter, t2b_filter: expressions over tags (see ``Filter``); the tensors that match go from the baseline to
            the target, or the other way. At least one is needed, alike on both sides.
        master_address, master_port: where rank 0 of the baseline listens, at this address alone.
        baseline_world_size, target_world_size: how many ranks the sides have.
        rank: this process's inside its side; by default the default group's, else ``RANK``, else 0 of one.
        backend: what carries tensors: "gloo"; "nccl" (CUDA tensors; the rest by gloo); "shm" (shared memory of one
            host, gloo where there is none).
        group_name: a name of this pair of systems, alike on both sides.
        timeout: seconds for the handshake of both sides, and again for each exchange.
        mode: "graft" writes into the receiver's tensor; "observe" compares and leaves it alone; "record" writes this
            side's tensors into ``record_dir`` and needs no other side.
        layout: how this side's ranks hold a tensor, unless a call says otherwise: a ``Layout`` or its text. None: rank
            i's tensor goes to rank i.
        transform_path: a function that makes the receiver's tensor of the pieces, instead of layouts (``Transform``).
        on_dtype, on_shape: what the receiver does with another dtype or shape: "error"; "cast" (another shape: reshape
            of as many elements, else an error); "skip".
        strict: raise every fault, instead of logging and counting it.
        token: alike on both sides, else the handshake fails. Needed where the address is not this host's own.
        report_dir: the folder of this rank's report file (``graft-<role>-<rank>.jsonl``, written anew).
        record_dir: with mode="record" the folder that tensors are written into; with mode="observe" the folder of
            records that are read instead of the other side's tensors.

    Raises:
        SglCommError: where it is enabled, fields that are missing, all of them by name; values that cannot be.
    """

    enable: bool = False
    role: str = ""
    b2t_filter: str = ""
    t2b_filter: str = ""
    master_address: str = ""
    master_port: int | None = None
    baseline_world_size: int | None = None
    target_world_size: int | None = None
    rank: int | None = None
    backend: str = "gloo"
    group_name: str = "sgl_comm_grafter"
    timeout: float = 300.0
    mode: str = "graft"
    layout: Layout | str | None = None
    transform_path: str = ""
    on_dtype: str = "error"
    on_shape: str = "error"
    strict: bool = False
    token: str = dataclasses.field(default="", repr=False)
    report_dir: str | os.PathLike[str] = "graft_report"
    record_dir: str | os.PathLike[str] = ""

    def __post_init__(self) -> None:
        if not self.enable:
            return
        self._check_types()
        self._check_missing()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise SglCommError(f"grafter: got {name} {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        if not 0 < self.timeout < 1e9:
            raise SglCommError(f"grafter: got timeout {self.timeout!r}; expected a number of seconds above 0")
        for name, most in (("baseline_world_size", 1 << 16), ("target_world_size", 1 << 16), ("master_port", 65535)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise SglCommError(f"grafter: got {name} {value!r}; expected 1 to {most}")
        object.__setattr__(self, "layout", as_layout(self.layout))
        filters = [Filter.parse(text, name) for name, text in self.filters().items()]
        if self.live and not self.token and not _is_loopback(self.master_address):
            raise SglCommError(
                f"grafter: got master_address {self.master_address!r} and no token; expected a token"
                " (SGLCOMM_GRAFTER_TOKEN), since other hosts can reach that address"
            )
        if self.mode == "record":
            return
        if self.baseline_world_size != self.target_world_size and not self.gathers:
            raise SglCommError(
                f"grafter: got baseline_world_size {self.baseline_world_size} and target_world_size"
                f" {self.target_world_size}, and neither a layout nor a transform_path; expected one of them, or equal"
                " numbers"
            )
        if self.gathers and any("rank" in parsed.names for parsed in filters):
            raise SglCommError(
                "grafter: got a filter that asks for rank, and a layout or transform; expected a filter that is alike"
                " on all ranks, since all of them take part"
            )

    @staticmethod
    def from_env() -> GrafterConfig:
        """What the environment variables ``SGLCOMM_GRAFTER_<FIELD>`` say; the defaults where they are unset.

        Raises:
            SglCommError: a value that is none of its field's type, or that cannot be.
        """
        values = {}
        for field in dataclasses.fields(GrafterConfig):
            variable = envs.GRAFTER[field.name]
            text = variable.given()
            if text:
                values[field.name] = _parsed(variable.name, text, str(field.type))
        return GrafterConfig(**values)

    @property
    def live(self) -> bool:
        """Whether there is another running side, rather than a folder of records."""
        return self.mode == "graft" or (self.mode == "observe" and not self.record_dir)

    @property
    def gathers(self) -> bool:
        """Whether every receiver gets the pieces of all senders, rather than rank i that of rank i."""
        return self.layout is not None or bool(self.transform_path)

    @property
    def world_size(self) -> int:
        """How many ranks this side has."""
        size = self.baseline_world_size if self.role == "baseline" else self.target_world_size
        assert size is not None
        return size

    def filters(self) -> dict[str, str]:
        """The filters that are given, by their field's name."""
        return {name: text for name in ("b2t_filter", "t2b_filter") if (text := getattr(self, name))}

    def side_rank(self) -> int:
        """This process's rank inside its side.

        Raises:
            SglCommError: nothing says it, or it is out of range.
        """
        if self.rank is not None:
            rank, origin = self.rank, "rank"
        elif dist.is_available() and dist.is_initialized():
            rank, origin = dist.get_rank(), "the default group's rank"
        elif os.environ.get("RANK"):
            rank, origin = _parsed("RANK", os.environ["RANK"], "int"), "RANK"
        elif self.world_size == 1:
            return 0
        else:
            raise SglCommError(
                "grafter: got no rank, no default group and no RANK; expected the field rank, since the"
                f" {self.role} has {self.world_size} ranks"
            )
        if not 0 <= rank < self.world_size:
            raise SglCommError(
                f"grafter: got rank {rank} ({origin}); expected 0 to {self.world_size - 1}, the {self.role} having"
                f" {self.world_size} ranks"
            )
        return rank

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = _KINDS[str(field.type).removesuffix(" | None")]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                if value is None and str(field.type).endswith("None"):
                    continue
                raise SglCommError(f"grafter: got {field.name} of {type(value).__name__}; expected {field.type}")
        try:
            self.token.encode()
        except UnicodeEncodeError:
            raise SglCommError("grafter: got a token that is no text; expected one that UTF-8 can say") from None

    def _check_missing(self) -> None:
        needed = ["role"]
        if self.mode == "record":
            needed += ["record_dir"]
            needed += [f"{self.role}_world_size"] if self.role in _CHOICES["role"] else []
        else:
            needed += ["baseline_world_size", "target_world_size"]
        if self.live:
            needed += ["master_address", "master_port"]
        missing = [name for name in needed if not getattr(self, name)]
        if not self.filters():
            missing.append("b2t_filter or t2b_filter")
        if missing:
            raise SglCommError(
                f"grafter: got enable=True without {', '.join(missing)}; expected all of them to be given"
            )


_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,), "str": (str,), "int": (int,), "float": (int, float), "Layout | str": (Layout, str),
    "str | os.PathLike[str]": (str, os.PathLike),
}  # fmt: skip


def _is_loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _parsed(name: str, text: str, kind: str) -> Any:
    if kind.startswith("bool"):
        if text not in ("0", "1"):
            raise SglCommError(f"grafter: got {name}={text!r}; expected 0 or 1")
        return text == "1"
    if kind.startswith(("int", "float")):
        number = int if kind.startswith("int") else float
        try:
            return number(text)
        except ValueError:
            raise SglCommError(f"grafter: got {name}={text!r}; expected a number") from None
    return text
