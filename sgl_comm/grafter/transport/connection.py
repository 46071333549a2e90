"""``Connection``: the channels between a rank and the other side.

Where tensors go from rank i to rank i there is one channel of these two. Else there is a channel of all ranks for the
headers, and for every rank a channel of it and all ranks of the other side, in which it sends its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sgl_comm.grafter.config import GrafterConfig
from sgl_comm.grafter.faults import TransportFault, first_line
from sgl_comm.grafter.transport.channel import Channel
from sgl_comm.grafter.transport.deadline import Deadline, run_until
from sgl_comm.grafter.transport.handshake import Member, Session, handshake


@dataclass(frozen=True)
class Connection:
    """All channels of this rank to the other side. Made by ``open``."""

    session: Session
    headers: Channel
    """The channel of this rank's headers, and of its tensors too where these go from rank i to rank i."""
    tensors: dict[Member, Channel]
    """Sender -> the channel of it and all ranks of the other side; empty where tensors go from rank i to rank i."""

    @staticmethod
    def open(config: GrafterConfig, rank: int) -> Connection:
        """Makes the handshake and the channels, within ``config.timeout``. A collective call of both sides.

        Raises:
            TransportFault: the other side did not come, or no connection to it can be made.
        """
        deadline = Deadline(config.timeout)
        return run_until(
            deadline,
            "connecting to the other side",
            lambda: Connection._open(config, rank, deadline),
            Connection.close,
        )

    @staticmethod
    def _open(config: GrafterConfig, rank: int, deadline: Deadline) -> Connection:
        session = handshake(config, rank, deadline)
        me = session.me
        made: list[Channel] = []

        def channel(key: str, members: Sequence[Member]) -> Channel:
            name = f"{config.group_name}:{config.master_port}/{key}/{me.index}"
            made.append(Channel(key, name, members, session, config.backend, deadline))
            return made[-1]

        try:
            if not session.gathers:
                pair = [session.side(role)[rank] for role in ("baseline", "target")]
                return Connection(session, channel(f"pair{rank}", pair), {})
            headers = channel("all", session.members)
            tensors = {}
            for sender in session.members:
                others = [member for member in session.members if member.role != sender.role]
                if me == sender or me in others:
                    tensors[sender] = channel(f"from{sender.index}", [sender, *others])
            return Connection(session, headers, tensors)
        except BaseException as error:
            for each in made:
                each.close()
            if isinstance(error, RuntimeError) and not isinstance(error, TransportFault):
                raise TransportFault(f"the groups of both sides could not be made: {first_line(error)}") from None
            raise

    def channel_of(self, sender: Member) -> Channel:
        """The channel in which a rank sends its tensors."""
        return self.tensors[sender] if self.tensors else self.headers

    def close(self) -> None:
        """Closes all channels."""
        for channel in (self.headers, *self.tensors.values()):
            channel.close()
