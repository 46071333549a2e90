"""The child of transfer_check.py: ``transfer_child.py UUID RANK SECONDS``. Imports nothing but the standard library.

Every rank's 2 MiB are cut in a part a writer. A part's first half comes as a copy, whose words differ, its second half
as a fill, which a GPU's processors store; both name writer and reader.
"""

import array
import ctypes
import os
import signal
import sys

BYTES = 2 << 20  # IPC shares whole blocks of this size
PART = BYTES // 8
HALF = PART // 2
HANDLE_BYTES = 64
HINTS = {46: " (the GPU is in exclusive compute mode? `nvidia-smi -c 0` ends it)", 2: " (no memory left on the GPU)"}


class NotVisible(RuntimeError):
    """No device that this process can see has the UUID."""


class IpcHandle(ctypes.Structure):
    """The driver's CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class Gpu:
    """The GPU with a UUID, among those that this process can see, through the driver's own interface."""

    def __init__(self, uuid: str) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", ctypes.c_uint(0))
        device = self._find(uuid)
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def allocate(self) -> int:
        """Device memory of BYTES, all zero."""
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(BYTES))
        self._call("cuMemsetD8_v2", pointer, ctypes.c_ubyte(0), ctypes.c_size_t(BYTES))
        self.finish()
        return pointer.value

    def share(self, pointer: int) -> bytes:
        """A handle by which another process can open the memory."""
        handle = IpcHandle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(pointer))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """Another process's memory, as mapped here."""
        pointer = ctypes.c_uint64()
        lazy_peer_access = ctypes.c_uint(1)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), IpcHandle.from_buffer_copy(handle), lazy_peer_access)
        return pointer.value

    def close(self, pointer: int) -> None:
        """Unmaps what was opened."""
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(pointer))

    def upload(self, pointer: int, data: bytes) -> None:
        """Host to device."""
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(pointer), data, ctypes.c_size_t(len(data)))

    def download(self, pointer: int, size: int) -> bytes:
        """Device to host."""
        data = ctypes.create_string_buffer(size)
        self._call("cuMemcpyDtoH_v2", data, ctypes.c_uint64(pointer), ctypes.c_size_t(size))
        return data.raw

    def copy(self, to: int, source: int, size: int) -> None:
        """Device to device."""
        self._call("cuMemcpyDtoD_v2", ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(size))

    def fill(self, pointer: int, word: int, size: int) -> None:
        """One 32-bit word, over and over."""
        self._call("cuMemsetD32_v2", ctypes.c_uint64(pointer), ctypes.c_uint(word), ctypes.c_size_t(size // 4))

    def finish(self) -> None:
        """Waits for all of the above."""
        self._call("cuCtxSynchronize")

    def _find(self, uuid: str) -> ctypes.c_int:
        wanted = "".join(c for c in uuid.lower() if c in "0123456789abcdef")
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        for number in range(count.value):
            device, found = ctypes.c_int(), ctypes.create_string_buffer(16)
            self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(number))
            self._call("cuDeviceGetUuid_v2", found, device)
            if found.raw.hex() == wanted:
                return device
        raise NotVisible(f"the driver shows {count.value} devices, none of them {uuid}")

    def _call(self, name: str, *args: object) -> None:
        code = getattr(self._cuda, name)(*args)
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'error').decode()} {code}{HINTS.get(code, '')}")


def copied(writer: int, reader: int) -> bytes:
    """The first half of what `writer` leaves in `reader`'s memory."""
    return array.array("I", (0x5C << 24 | writer << 20 | reader << 16 | i for i in range(HALF // 4))).tobytes()


def filled(writer: int, reader: int) -> int:
    """The word of its second half."""
    return 0xF1 << 24 | writer << 20 | reader << 16 | 0xA55A


def part(writer: int, reader: int) -> bytes:
    """All of it."""
    return copied(writer, reader) + array.array("I", [filled(writer, reader)]).tobytes() * (HALF // 4)


def serve(gpu: Gpu, rank: int) -> None:
    """Answers the parent's lines until it has closed what it opened."""
    own, staging = gpu.allocate(), gpu.allocate()
    say("handle " + gpu.share(own).hex())

    handles = [bytes.fromhex(text) for text in heard("open")]
    peers = {r: gpu.open(handle) for r, handle in enumerate(handles) if r != rank}
    for r, memory in peers.items():
        gpu.upload(staging, copied(rank, r))
        gpu.copy(memory + rank * PART, staging, HALF)
        gpu.fill(memory + rank * PART + HALF, filled(rank, r), HALF)
        gpu.finish()
    say("written")

    heard("verify")
    for r, memory in peers.items():
        if gpu.download(own + r * PART, PART) != part(r, rank):
            raise RuntimeError(f"what rank {r} wrote into this rank's GPU memory did not arrive whole")
        gpu.copy(staging, memory + rank * PART, PART)
        gpu.finish()
        if gpu.download(staging, PART) != part(rank, r):
            raise RuntimeError(f"what this rank wrote into rank {r}'s GPU memory does not read back whole")
    say("verified")

    heard("close")
    for memory in peers.values():
        gpu.close(memory)
    say("closed")
    sys.stdin.readline()  # the memory stays until all have closed it: until the parent ends this process


def say(line: str) -> None:
    """To the parent."""
    print(line, flush=True)


def heard(word: str) -> list[str]:
    """What follows the word in the parent's next line; ends the process when the parent is gone."""
    got = sys.stdin.readline().split()
    if not got:
        sys.exit(0)
    if got[0] != word:
        raise RuntimeError(f"got {got[0]!r} from the parent; expected {word!r}")
    return got[1:]


def main(open_gpu: type[Gpu] = Gpu) -> None:
    """Runs with the process's arguments."""
    uuid, rank, seconds = sys.argv[1:]
    signal.alarm(int(float(seconds)) + 5)  # ends this process, also in the driver, should the parent not do it
    try:
        serve(open_gpu(uuid), int(rank))
    except NotVisible as error:
        if os.environ.pop("CUDA_VISIBLE_DEVICES", None) is None:
            say(f"error {error}")
            return
        # The rank's own value may have changed since its CUDA started: look among all devices.
        os.execv(sys.executable, [sys.executable, "-I", "-S", __file__, *sys.argv[1:]])
    except Exception as error:
        say(f"error {error}" if str(error) else f"error {type(error).__name__}")


if __name__ == "__main__":
    main()
