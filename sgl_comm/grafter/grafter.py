"""``Grafter``: what a model calls, or what hooks call for it."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sgl_comm.errors import SglCommError
from sgl_comm.grafter.compare import Comparison, compare, comparison_of
from sgl_comm.grafter.config import GrafterConfig
from sgl_comm.grafter.exchange import LivePeer, Peer
from sgl_comm.grafter.faults import ExchangeFault
from sgl_comm.grafter.filters import Filter
from sgl_comm.grafter.header import DTYPES, Extras, Header, tags_of
from sgl_comm.grafter.layouts import Layout, as_layout
from sgl_comm.grafter.plan import BY_TRANSFORM
from sgl_comm.grafter.records import RecordedPeer, Recorder
from sgl_comm.grafter.report import ReportWriter
from sgl_comm.grafter.transforms import load_transform

logger = logging.getLogger(__name__)

_MAX_DEPTH = 16
"""How many levels of containers in a module's output are searched for tensors."""

_EXIT_S = 1.0
"""How long, at exit, a thread may go on with an exchange before its grafter is left open."""

_open_grafters: weakref.WeakSet[Grafter] = weakref.WeakSet()


class Grafter:
    """Moves tensors between this running system and another one, as its configuration says.

    Each side calls it with its tensors, in one order; those that match a filter are exchanged, others cost nothing.
    The first exchange connects the two sides. A context manager; ``close`` ends it.

    Args:
        config: by default what the environment says.

    Raises:
        SglCommError: no rank for this process, or no such transform; or records that cannot be read.
    """

    def __init__(self, config: GrafterConfig | None = None) -> None:
        self.config = config = GrafterConfig.from_env() if config is None else config
        self.enabled: bool = config.enable
        if not config.enable:
            return
        self.rank: int = config.side_rank()
        self.off: str = ""
        """Why the grafter has switched itself off; empty while it has not."""
        parsed = {name: Filter.parse(text, name) for name, text in config.filters().items()}
        self._b2t, self._t2b = parsed.get("b2t_filter"), parsed.get("t2b_filter")
        self._sends = "b2t" if config.role == "baseline" else "t2b"
        self._transform = load_transform(config.transform_path) if config.transform_path else None
        self._lock = threading.RLock()
        self._sequence = 0
        self._report = ReportWriter(config, self.rank)
        peer = LivePeer if config.live else Recorder if config.mode == "record" else RecordedPeer
        self._peer: Peer = peer(config, self.rank)
        _open_grafters.add(self)

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors were sent, received, observed, recorded, skipped, unmatched, faults."""
        return dict(self._report.counts) if self.config.enable else {}

    def maybe_intercept(
        self,
        value: Tensor,
        tags: Mapping[str, Any],
        extras: Extras | None = None,
        layout: Layout | str | None = None,
    ) -> None:
        """Exchanges a tensor if its tags match a filter; in mode "graft" the receiver's ``value`` is overwritten.

        Args:
            value: any dtype, device and strides. Its bits arrive as they are.
            tags: which tensor it is: its ``name``, and more names with text, numbers, booleans or None. Both sides must
                give the same ones. ``rank``, this process's inside its side, is added for the filters.
            extras: what a transform on the other side gets with it: names with JSON's values, of 8 KiB at most.
            layout: how this side's ranks hold this tensor, instead of the configuration's layout.

        Raises:
            SglCommError: the tags match both filters, or a CUDA graph is being captured. With ``strict`` also: the
                sides are out of step, their tensors do not go together, a transform failed, or the other side is not
                there; without, these are logged and counted, ``value`` stays as it is, and after the last of them the
                grafter is off.
        """
        if not self.enabled:
            return
        if torch.compiler.is_compiling():
            from sgl_comm.grafter import graph_break

            graph_break.call(self._intercept, value, tags, extras, layout)
        else:
            self._intercept(value, tags, extras, layout)

    def dump(self, name: str, value: Tensor, **tags: Any) -> None:
        """``maybe_intercept`` of a tensor by this name and these tags; for model code."""
        if not self.enabled:
            return
        self.maybe_intercept(value, {"name": name, **tags})

    def hook_modules(
        self, model: nn.Module, patterns: Sequence[str] = ("*",), **tags: Any
    ) -> AbstractContextManager[None]:
        """While it is entered, what these modules return is intercepted.

        Args:
            model: its modules are known by their path inside it, such as "layers.3.mlp".
            patterns: of paths, as file names are matched (``fnmatch``).
            **tags: more tags for all of them.

        A tensor's name is the module's path, with ".0", ".1" or ".key" after it where a module returns a tuple, list
        or dict of tensors; ``layer`` is the first number in the path, ``step`` how often the module has run since then.
        """
        return self._hooks(model, patterns, tags) if self.enabled else ExitStack()

    @contextmanager
    def _hooks(self, model: nn.Module, patterns: Sequence[str], tags: Mapping[str, Any]) -> Iterator[None]:
        steps: dict[str, int] = {}
        with ExitStack() as stack:
            for path, module in model.named_modules():
                if not path or not any(fnmatchcase(path, pattern) for pattern in patterns):
                    continue

                def hook(_module: nn.Module, _args: Any, output: Any, path: str = path) -> None:
                    step = steps[path] = steps.get(path, -1) + 1
                    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
                    counters = {"layer": int(number[1]) if number else None, "step": step}
                    for name, tensor in _tensors_of(path, output):
                        self.maybe_intercept(tensor, {"name": name, **counters, **tags})

                stack.callback(module.register_forward_hook(hook).remove)
            yield

    def close(self) -> None:
        """Leaves the other side and ends the report; nothing is exchanged from then on. Safe to call twice."""
        if not self.enabled:
            return
        with self._lock:
            self.enabled = False
            self._peer.close()
            self._report.close()
        _open_grafters.discard(self)

    def __enter__(self) -> Grafter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _intercept(
        self, value: Tensor, tags: Mapping[str, Any], extras: Extras | None, layout: Layout | str | None
    ) -> None:
        with self._lock:
            if not self.enabled:  # closed by another thread meanwhile
                return
            tags = tags if isinstance(tags, Mapping) else {}
            direction = self._direction({**tags, "rank": self.rank})
            if direction is None:
                self._report.counts["unmatched"] += 1
                return
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                raise SglCommError(
                    f"grafter: got {tags.get('name')!r} inside a CUDA graph capture; expected an eager call: a replay"
                    " could not reach the other side (capture without the grafter, or run eagerly)"
                )
            if self.off or (not self.config.live and (direction == self._sends) != (self.config.mode == "record")):
                self._report.counts["skipped"] += 1
                return
            own = self._header(direction, value, tags, extras, layout)
            self._sequence += 1
            try:
                # A tensor made in inference mode may be written in inference mode alone.
                is_inference = not own.problem and value.is_inference()
                with torch.inference_mode() if is_inference else torch.no_grad():
                    self._exchange(own, None if own.problem else value.detach())
            except ExchangeFault as error:
                self._fail(own, error)
            except Exception as error:
                self._switch_off(str(error) or type(error).__name__)
                self._fail(own, error)

    def _direction(self, tags: Mapping[str, Any]) -> str | None:
        b2t = self._b2t is not None and self._b2t(tags)
        t2b = self._t2b is not None and self._t2b(tags)
        if b2t and t2b:
            raise SglCommError(
                f"grafter: {tags.get('name')!r} matched BOTH grafter_b2t_filter and grafter_t2b_filter; expected one of"
                " them at most"
            )
        return "b2t" if b2t else "t2b" if t2b else None

    def _header(
        self, direction: str, value: object, tags: Mapping[str, Any], extras: Extras | None, layout: Layout | str | None
    ) -> Header:
        """This rank's header of its tensor; what is wrong with the tensor goes to all ranks as the ``problem``."""
        config = self.config
        fields: dict[str, Any] = {"sequence": self._sequence, "direction": direction}
        fields |= {"on_dtype": config.on_dtype, "on_shape": config.on_shape}
        name = ""
        try:
            name, tags_sent = tags_of(tags)
            if extras is not None and not isinstance(extras, dict):
                raise SglCommError(f"got a {type(extras).__name__} as extras; expected a dict")
            if not isinstance(value, Tensor):
                raise SglCommError(f"got a {type(value).__name__} as {name!r}; expected a tensor")
            written = direction != self._sends and config.mode == "graft"
            header = Header(
                **fields, name=name, tags=tags_sent, dtype=_dtype_of(value, written), shape=tuple(value.shape),
                layout=self._layout(direction, layout), extras=extras or {},
            )  # fmt: skip
            header.bytes()
            return header
        except Exception as error:
            problem = str(error) if isinstance(error, SglCommError) else f"{type(error).__name__}: {error}"
            return Header(**fields, name=_short(name, 200), tags={}, dtype="", shape=(), problem=_short(problem, 1000))

    def _layout(self, direction: str, layout: Layout | str | None) -> str:
        if not self.config.gathers:
            if layout is not None:
                raise SglCommError(
                    f"got layout {layout} and a configuration without one; expected GrafterConfig.layout on both sides"
                )
            return ""
        if self._transform is not None and direction != self._sends:
            return BY_TRANSFORM
        chosen = as_layout(layout) or self.config.layout
        return str(chosen or "")

    def _exchange(self, own: Header, value: Tensor | None) -> None:
        """``value`` is None where the header tells of a problem, which the peer raises."""
        start = time.perf_counter()
        transfer = self._peer.exchange(own, value, own.direction == self._sends)
        assert value is not None
        num_bytes = value.numel() * value.element_size()

        def report(outcome: str, comparison: Comparison | None = None, why: str = "") -> None:
            self._report.exchange(own, comparison, outcome, num_bytes, time.perf_counter() - start, why)

        if transfer.received is None:
            sent = "recorded" if self.config.mode == "record" else "sent"
            report("skipped" if transfer.plan.skipped else sent, why=transfer.plan.skipped)
            return
        takes, by_baseline = self.config.mode == "graft", own.direction == "b2t"
        if transfer.received.totals is not None:
            comparison = comparison_of(value, transfer.received.totals, by_baseline)
        else:
            incoming = transfer.incoming(value, self._transform, own, self.config.on_dtype)
            if incoming.skipped:
                report("skipped", why=incoming.skipped)
                return
            comparison = compare(incoming.tensor, incoming.target, by_baseline)
            if takes:
                incoming.target.copy_(incoming.tensor)
        report("received" if takes else "observed", comparison)

    def _fail(self, own: Header, error: Exception) -> None:
        self._report.fault(own, str(error))
        text = f"grafter: {self.config.role} rank {self.rank}, {own}: {error}"
        if self.off:
            text += "; the grafter is off from here on"
        logger.error("sgl_comm: %s", text, exc_info=not isinstance(error, SglCommError))
        if self.config.strict:
            raise SglCommError(text) from error

    def _switch_off(self, why: str) -> None:
        self.off = why
        self._peer.close()


def _dtype_of(tensor: Tensor, written: bool) -> str:
    """The name of a tensor's dtype.

    Raises:
        SglCommError: one that cannot be sent, or into which nothing could be written.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    what = f"a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}, {tensor.layout}"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise SglCommError(f"got {what}; expected a plain tensor, such as a DTensor's to_local() gives")
    if dtype not in DTYPES or tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
        raise SglCommError(f"got {what}; expected a tensor with strides, on the CPU or a GPU, of {', '.join(DTYPES)}")
    if written and torch.ops.sgl_comm._overlaps_itself(tensor.detach()):
        raise SglCommError(f"got {what} in which several elements share memory (expand); expected one to write into")
    return dtype


def _short(text: str, length: int) -> str:
    """The text cut to ``length`` letters, each of which is one byte of a header."""
    return text.encode("ascii", "backslashreplace").decode()[:length]


def _tensors_of(name: str, output: Any, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield name, output
    elif depth >= _MAX_DEPTH:
        return
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors_of(f"{name}.{key}", value, depth + 1)
    elif isinstance(output, (tuple, list)):
        for index, value in enumerate(output):
            yield from _tensors_of(f"{name}.{index}", value, depth + 1)


@atexit.register
def _close_all() -> None:
    """A gloo group that outlives the interpreter aborts the process."""
    for grafter in list(_open_grafters):
        if grafter._lock.acquire(timeout=_EXIT_S):  # a thread may wait in an exchange
            try:
                grafter.close()
            finally:
                grafter._lock.release()


def _forget_all() -> None:
    """In a forked child, where gloo's threads are not: nothing of the parent's is used, and nothing is ended."""
    for grafter in list(_open_grafters):
        grafter.enabled = False
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(grafter))
    _open_grafters.clear()


os.register_at_fork(after_in_child=_forget_all)
