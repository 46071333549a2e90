"""The transfer check: what its child tells, with memory in files, and what becomes of a child that misbehaves."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from sgl_comm.backends import capability, transfer_check
from sgl_comm.backends.rendezvous import Rendezvous
from sgl_comm.testing import RankContext, run_ranks

# The real child, but its GPU's memory is in files, and one thing is wrong on rank 1 ("" for nothing).
CHILD_WITH_FILES = """
import mmap, os, signal, sys, time
sys.path.insert(0, {package!r})
import transfer_child as child

WRONG, FOLDER = {wrong!r}, {folder!r}

class Files:
    def __init__(self, uuid):
        self.rank, self.maps, self.opened = int(sys.argv[2]), {{}}, set()
        if self.wrong("no device"): raise child.NotVisible("the driver shows 0 devices")
        if self.wrong("says nothing"): time.sleep(60)
        if self.wrong("crashes"): os.kill(os.getpid(), signal.SIGSEGV)
        if self.wrong("exits"): print("Bus error, core not dumped", flush=True); os._exit(3)

    def wrong(self, what): return self.rank == 1 and what == WRONG

    def _map(self, path):
        with open(path, "r+b") as file: memory = mmap.mmap(file.fileno(), child.BYTES)
        start = (len(self.maps) + 1) << 32
        self.maps[start] = path, memory
        return start

    def allocate(self):
        path = os.path.join(FOLDER, f"{{os.getpid()}}-{{len(self.maps)}}")
        with open(path, "wb") as file: file.truncate(child.BYTES)
        return self._map(path)

    def share(self, pointer): return self.maps[pointer][0].encode().ljust(200, b" ")

    def open(self, handle):
        if self.wrong("cannot open"): raise RuntimeError("cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_VALUE 1")
        pointer = self._map(handle.decode().rstrip())
        self.opened.add(pointer)
        return pointer

    def close(self, pointer):
        if self.wrong("hangs at the end"): time.sleep(60)

    def _at(self, pointer, size):
        start = pointer >> 32 << 32
        return self.maps[start][1], slice(pointer - start, pointer - start + size), start in self.opened

    def upload(self, pointer, data):
        memory, place, _ = self._at(pointer, len(data))
        memory[place] = data

    def download(self, pointer, size):
        memory, place, _ = self._at(pointer, size)
        return memory[place]

    def _write(self, pointer, data):
        memory, place, far = self._at(pointer, len(data))
        if far and self.wrong("loses writes"): return
        if far and self.wrong("flips a bit"): data = data[:-1] + bytes([data[-1] ^ 1])
        memory[place] = data

    def copy(self, to, source, size): self._write(to, self.download(source, size))

    def fill(self, pointer, word, size): self._write(pointer, word.to_bytes(4, "little") * (size // 4))

    def finish(self): pass

child.HANDLE_BYTES = 200
child.main(Files)
"""

UUIDS = ("GPU-0", "GPU-1", "GPU-2")


def checked(
    ctx: RankContext, wrong: str, folder: str, uuids: tuple[str, ...] = UUIDS, deadline: float = 20.0
) -> tuple[str, float]:
    script = Path(folder) / f"child-{ctx.rank}.py"
    package = str(Path(transfer_check.__file__).parent)
    script.write_text(CHILD_WITH_FILES.format(package=package, wrong=wrong, folder=folder))
    start = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patch.setattr(transfer_check, "_SCRIPT", script)
        patch.setattr(transfer_check, "DEADLINE_S", deadline)
        patch.setattr(transfer_check, "_verdicts", {})
        said = transfer_check.check(Rendezvous.of(ctx.group), uuids[: ctx.world])
    return said, time.monotonic() - start


@pytest.mark.parametrize("world", [2, 3])
def test_memory_that_works(world: int, tmp_path: Path) -> None:
    assert [said for said, _ in run_ranks(checked, world, "", str(tmp_path))] == [""] * world


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("no device", "rank 1: {0}the driver shows 0 devices"),
        ("cannot open", "rank 1: {0}cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_VALUE 1"),
        ("loses writes", "rank 0: {0}what rank 1 wrote into this rank's GPU memory did not arrive whole"),
        ("flips a bit", "rank 0: {0}what rank 1 wrote into this rank's GPU memory did not arrive whole"),
        ("crashes", "rank 1: {0}its process ended with status -11 before it had 'handle'"),
        ("exits", "rank 1: {0}its process ended with status 3 before it had 'handle' (Bus error, core not dumped)"),
    ],
)
def test_what_goes_wrong_on_one_rank_is_a_reason_on_all(wrong: str, reason: str, tmp_path: Path) -> None:
    texts = [said for said, _ in run_ranks(checked, 2, wrong, str(tmp_path))]
    assert texts == [reason.format("the transfer check between the GPUs failed: ")] * 2


@pytest.mark.parametrize("wrong", ["says nothing", "hangs at the end"])
def test_a_child_that_hangs_is_killed_at_the_deadline(wrong: str, tmp_path: Path) -> None:
    for said, seconds in run_ranks(checked, 2, wrong, str(tmp_path), UUIDS, 1.5):
        assert said == "rank 1: the transfer check between the GPUs failed: no answer within 1.5 s"
        assert seconds < 15


def child_cannot_start(ctx: RankContext) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer_check.sys, "executable", "/nowhere/python")
        patch.setattr(transfer_check, "_verdicts", {})
        return transfer_check.check(Rendezvous.of(ctx.group), UUIDS[:2])


def test_a_child_that_cannot_be_started_is_a_reason() -> None:
    first, second = run_ranks(child_cannot_start, 2)
    assert first == second
    assert first.startswith("rank 0: the transfer check between the GPUs failed: [Errno 2]")


def with_counted_children(ctx: RankContext) -> list[tuple[str, int]]:
    started = 0

    def run(link: Rendezvous, child: object) -> str:
        nonlocal started
        started += 1
        return link.agree("no way" if ctx.rank == 1 else "")

    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer_check, "_run", run)
        patch.setattr(transfer_check, "_verdicts", {})
        link = Rendezvous.of(ctx.group)
        for uuids in (("a", "a"), ("a", "b"), ("a", "b"), ("b", "a")):
            results.append((transfer_check.check(link, uuids), started))
        if ctx.rank == 1:
            transfer_check._verdicts.clear()
        results.append((transfer_check.check(link, ("a", "b")), started))
        results.append((transfer_check.check(link, ("a", "a"), skip_one_device=False), started))
    return results


def test_it_is_done_once_for_the_same_devices_and_not_for_one_device() -> None:
    no = "rank 1: no way"
    assert run_ranks(with_counted_children, 2) == [[("", 0), (no, 1), (no, 1), (no, 2), (no, 3), (no, 4)]] * 2


def on_a_gpu(ctx: RankContext) -> str:
    uuids = Rendezvous.of(ctx.group, ctx.device).texts(capability.device_uuid(ctx.device))
    return transfer_check.check(Rendezvous.of(ctx.group, ctx.device), uuids, skip_one_device=False)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 3])
def test_the_real_child_between_processes_that_may_share_a_gpu(world: int) -> None:
    assert run_ranks(on_a_gpu, world, device="cuda", deadline=120.0) == [""] * world


def surveyed(ctx: RankContext) -> capability.Survey:
    return capability.survey(Rendezvous.of(ctx.group, ctx.device), ctx.device)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are several GPUs, whose links are not known here")
def test_ranks_on_one_gpu_are_served_by_both() -> None:
    assert run_ranks(surveyed, 2, device="cuda", deadline=120.0) == [capability.Survey("", "")] * 2
