"""A bare protocol under measurement: ``python _serve_protocol.py LOOP JOB``.

The earliest and the least that asyncio lets anybody do: no streams, no task.
"""

from __future__ import annotations

import asyncio
import sys

from _serve_streams import abort
from _serving import BACKLOG, GREETING, HOST, announce, run


class Greeting(asyncio.Protocol):
    """Greets and closes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Write, and close when that is written."""
        transport.write(GREETING)
        transport.close()


class Rejecting(asyncio.Protocol):
    """Resets."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Reset."""
        abort(transport)


async def serve(job: str) -> None:
    """Serve *job* until the process is killed."""
    protocol = {"accept": Greeting, "reject": Rejecting}[job]
    loop = asyncio.get_running_loop()
    server = await loop.create_server(protocol, HOST, 0, backlog=BACKLOG)
    announce(server.sockets[0].getsockname()[1])
    await server.serve_forever()


if __name__ == "__main__":
    loop, job = sys.argv[1:]
    run(loop, serve(job))
