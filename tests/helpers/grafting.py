"""Two systems for tests of the grafter: pools of ranks that know nothing of each other but an address."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sgl_comm.grafter import Grafter, GrafterConfig
from sgl_comm.testing import RankContext, RankPool

TIMEOUT_S = 30.0
"""Of exchanges that are to succeed, on a machine that may be busy."""


def free_port() -> int:
    """A port of this host that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def config_of(role: str, worlds: tuple[int, int], port: int, **fields: Any) -> dict[str, Any]:
    """The fields of one side's configuration."""
    return {
        "enable": True, "role": role, "master_address": "127.0.0.1", "master_port": port,
        "baseline_world_size": worlds[0], "target_world_size": worlds[1], "timeout": TIMEOUT_S, **fields,
    }  # fmt: skip


class Systems:
    """Two systems, each with its own launch and default group (gloo, of its side alone)."""

    def __init__(
        self,
        worlds: tuple[int, int],
        device: str = "cpu",
        make_comm: bool = False,
        envs: Sequence[dict[str, str]] = ({}, {}),
    ) -> None:
        self.worlds = worlds
        self.pools = {
            role: RankPool(world, device, env, make_comm)
            for role, world, env in zip(("baseline", "target"), worlds, envs, strict=True)
        }

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        deadline: float = 60.0,
        allow_dead: bool = False,
        baseline: Any = None,
        target: Any = None,
        **fields: Any,
    ) -> tuple[list[Any], list[Any]]:
        """``fn(ctx, fields, *args)`` on all ranks of both at once; each side's results in rank order.

        ``fields`` are the configuration's; ``baseline`` and ``target`` are those that one side alone has.
        """  # fmt: skip
        port, sides = free_port(), {"baseline": baseline or {}, "target": target or {}}

        def run_side(role: str) -> list[Any]:
            config = config_of(role, self.worlds, port, **{**fields, **sides[role]})
            return self.pools[role].run(fn, config, *args, deadline=deadline, allow_dead=allow_dead)

        with ThreadPoolExecutor(2) as both:
            running = [both.submit(run_side, role) for role in sides]
            first, second = [each.exception() for each in running]
            if first or second:
                raise first or second  # type: ignore[misc]
            return running[0].result(), running[1].result()

    def close(self) -> None:
        """Ends all ranks."""
        for pool in self.pools.values():
            pool.close()


@contextmanager
def systems(
    worlds: tuple[int, int], device: str = "cpu", make_comm: bool = False, envs: Sequence[dict[str, str]] = ({}, {})
) -> Iterator[Systems]:
    """Two systems for the duration of a block; ``envs`` are environment variables of either."""
    both = Systems(worlds, device, make_comm, envs)
    try:
        yield both
    finally:
        both.close()


def grafted(ctx: RankContext, fields: dict[str, Any], report_dir: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Passes each call's tensor (``values[role][rank]``) to a grafter; what became of them, and its counts.

    A call has ``values``, ``tags``, and maybe ``extras`` and ``layouts`` by role.
    """
    role = fields["role"]
    found, errors = [], []
    with Grafter(GrafterConfig(**fields, report_dir=report_dir)) as grafter:
        for call in calls:
            value = call["values"][role][ctx.rank]
            value = value.to(ctx.device) if isinstance(value, Tensor) else value
            try:
                grafter.maybe_intercept(
                    value, call["tags"], call.get("extras", {}).get(role), call.get("layouts", {}).get(role)
                )
            except RuntimeError as error:
                errors.append(str(error))
            found.append(value.cpu() if isinstance(value, Tensor) else value)
        return {"found": found, "errors": errors, "counts": grafter.counts, "off": grafter.off}
