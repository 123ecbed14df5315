"""`asyncio.start_server` under measurement: ``python _serve_streams.py LOOP JOB``.

The callbacks are coroutine functions, the form that asyncio's documentation shows and
services use; asyncio makes a task of each. A plain function saves that task.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys

from _serving import BACKLOG, GREETING, HOST, announce, run

RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, for 0 seconds


async def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Greet and close."""
    writer.write(GREETING)
    writer.close()


async def reject(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reset."""
    abort(writer.transport)


def abort(transport: asyncio.WriteTransport) -> None:
    """Reset; ``abort()`` alone would end in a FIN, which no caller takes for a rejection."""
    sock: socket.socket = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    transport.abort()


async def serve(job: str) -> None:
    """Serve *job* until the process is killed."""
    callback = {"accept": accept, "reject": reject}[job]
    server = await asyncio.start_server(callback, HOST, 0, backlog=BACKLOG)
    announce(server.sockets[0].getsockname()[1])
    await server.serve_forever()


if __name__ == "__main__":
    loop, job = sys.argv[1:]
    run(loop, serve(job))
