"""Servers under a flood that they reject: ``python _serve_flood.py LOOP CONTESTANT``.

Whoever comes from FRIEND is let in and gets an echo; everybody else is reset.
"""

from __future__ import annotations

import asyncio
import sys

from _serve_echo import Echo, echo_streams, send
from _serve_streams import abort, reject
from _serving import BACKLOG, HOST, announce, run

import condaccept
from condaccept import ACCEPT, REJECT

FRIEND = "127.0.0.2"


async def streams() -> None:
    """`asyncio.start_server`: whom to reject is seen in the callback."""

    async def callback(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if writer.get_extra_info("peername")[0] == FRIEND:
            await echo_streams(reader, writer)
        else:
            await reject(reader, writer)

    server = await asyncio.start_server(callback, HOST, 0, backlog=BACKLOG)
    announce(server.sockets[0].getsockname()[1])
    await server.serve_forever()


class Guarded(Echo):
    """A bare protocol that rejects as early as it can."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Reset all but the friend."""
        if transport.get_extra_info("peername")[0] == FRIEND:
            super().connection_made(transport)
        else:
            abort(transport)


async def protocol() -> None:
    """A bare protocol."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Guarded, HOST, 0, backlog=BACKLOG)
    announce(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def condition(pending: condaccept.PendingTransport) -> condaccept.Verdict:
    """Let the friend in."""
    return ACCEPT if pending.caller_id[0] == FRIEND else REJECT


async def serve() -> None:
    """`Listener.serve()`."""
    listener = await condaccept.listen(HOST, 0)
    announce(listener.sockname[1])
    await listener.serve(send, condition)


if __name__ == "__main__":
    loop, name = sys.argv[1:]
    run(loop, {"streams": streams, "protocol": protocol, "serve": serve}[name]())
