"""Peers without another running system: one run writes a side's tensors into a folder, another one reads them."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_comm.errors import SglCommError
from sgl_comm.grafter.config import GrafterConfig
from sgl_comm.grafter.exchange import Received, Transfer
from sgl_comm.grafter.faults import ExchangeFault
from sgl_comm.grafter.header import DTYPES, Header, read_header
from sgl_comm.grafter.plan import Plan, make_plan
from sgl_comm.grafter.transport.handshake import Member

_TENSOR = "value"


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise SglCommError(
            "grafter: got mode record, or a record_dir to observe; expected safetensors to be installed"
            ' (pip install "sgl_comm[report]")'
        ) from None
    return safetensors


class Recorder:
    """Writes what this rank would send: ``<role>-<rank>-<sequence>.safetensors``, with the header as metadata."""

    def __init__(self, config: GrafterConfig, rank: int) -> None:
        self._safetensors = _safetensors()
        self._folder, self._me = Path(config.record_dir), Member(rank, config.role, rank)
        self._folder.mkdir(parents=True, exist_ok=True)
        if any(self._folder.glob(f"{self._me.role}-{self._me.rank}-*.safetensors")):
            raise SglCommError(
                f"grafter: got record_dir {str(self._folder)!r}, which has records of {self._me}; expected none yet"
            )

    def exchange(self, own: Header, value: Tensor | None, sends: bool) -> Transfer:
        """Writes one tensor.

        Raises:
            ExchangeFault: it cannot be written.
        """
        if own.problem:
            raise ExchangeFault(own.problem)
        assert value is not None
        path = self._folder / f"{self._me.role}-{self._me.rank}-{own.sequence:06d}.safetensors"
        try:
            metadata = {"header": own.bytes().decode()}
            self._safetensors.torch.save_file({_TENSOR: value.detach().contiguous().cpu()}, path, metadata)
        except (OSError, KeyError, ValueError, RuntimeError, self._safetensors.SafetensorError) as error:
            raise ExchangeFault(f"cannot record it in {path}: {error}") from None
        return Transfer(self._me, Plan((self._me,)))

    def close(self) -> None:
        """Nothing is open."""


@dataclasses.dataclass(frozen=True)
class _Record:
    path: Path
    header: Header


class RecordedPeer:
    """Reads the other side's tensors out of the folder: the k-th of a name and tags is the k-th recorded one.

    What other ranks of this side have is not known here: their tensors are assumed to have the shape of this rank's.
    """

    def __init__(self, config: GrafterConfig, rank: int) -> None:
        self._safetensors = _safetensors()
        self._config, self._rank = config, rank
        self._other = "target" if config.role == "baseline" else "baseline"
        self._records = self._find()
        self._seen: dict[str, int] = defaultdict(int)

    def exchange(self, own: Header, value: Tensor | None, sends: bool) -> Transfer:
        """Reads the other side's records of one tensor.

        Raises:
            ExchangeFault: there is none, or it does not go with this rank's tensor.
        """
        key = _key(own)
        number = self._seen[key]
        self._seen[key] += 1
        senders: dict[Member, _Record] = {}
        for rank in self._sending_ranks():
            found = self._records.get((rank, key), [])
            if number >= len(found):
                raise ExchangeFault(
                    f"{self._other} rank {rank} has {len(found)} records of {own} in {self._config.record_dir};"
                    f" expected number {number + 1}"
                )
            senders[Member(rank, self._other, rank)] = found[number]
        headers = {
            member: dataclasses.replace(record.header, sequence=own.sequence) for member, record in senders.items()
        }
        me = Member(self._rank, self._config.role, self._rank)
        ranks = range(self._config.world_size) if self._config.gathers else [self._rank]
        plan = make_plan(headers, {Member(rank, self._config.role, rank): own for rank in ranks})
        if plan.skipped or value is None:
            return Transfer(me, plan)
        pieces = [self._load(senders[member], value.device) for member in plan.senders]
        return Transfer(me, plan, Received(headers, pieces))

    def close(self) -> None:
        """Nothing is open."""

    def _sending_ranks(self) -> list[int]:
        config = self._config
        size = config.baseline_world_size if self._other == "baseline" else config.target_world_size
        assert size is not None
        return list(range(size)) if config.gathers else [self._rank]

    def _find(self) -> dict[tuple[int, str], list[_Record]]:
        records: dict[tuple[int, str], list[_Record]] = defaultdict(list)
        folder = Path(self._config.record_dir)
        paths = sorted(folder.glob(f"{self._other}-*-*.safetensors"))
        if not paths:
            raise SglCommError(
                f"grafter: got record_dir {str(folder)!r} without records of the {self._other}; expected some"
            )
        for path in paths:
            try:
                with self._safetensors.safe_open(path, "pt") as file:
                    header = read_header((file.metadata() or {}).get("header", "").encode())
                rank = int(path.name.split("-")[1])
            except (OSError, ValueError, SglCommError, self._safetensors.SafetensorError) as error:
                raise SglCommError(f"grafter: got {path}, which is no record: {error}") from None
            records[rank, _key(header)].append(_Record(path, header))
        for found in records.values():
            found.sort(key=lambda record: record.header.sequence)
        return records

    def _load(self, record: _Record, device: torch.device) -> Tensor:
        try:
            with self._safetensors.safe_open(record.path, "pt", device=str(device)) as file:
                tensor = file.get_tensor(_TENSOR)
        except (OSError, self._safetensors.SafetensorError) as error:
            raise ExchangeFault(f"cannot read {record.path}: {error}") from None
        header = record.header
        if tensor.dtype != DTYPES[header.dtype] or tuple(tensor.shape) != header.shape:
            raise ExchangeFault(f"got {tensor.dtype}{list(tensor.shape)} in {record.path}; expected {header}")
        return tensor


def _key(header: Header) -> str:
    return json.dumps([header.direction, header.name, header.tags], sort_keys=True)
