"""Echo servers under measurement: ``python _serve_echo.py LOOP CONTESTANT``."""

from __future__ import annotations

import asyncio
import sys

from _serving import BACKLOG, HOST, announce, run

import condaccept

SIZE = 65536  # what one read may return


async def echo_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Echo with asyncio's streams."""
    while data := await reader.read(SIZE):
        writer.write(data)
        await writer.drain()
    writer.close()


async def streams() -> None:
    """`asyncio.start_server`, in the form that its documentation shows."""
    server = await asyncio.start_server(echo_streams, HOST, 0, backlog=BACKLOG)
    announce(server.sockets[0].getsockname()[1])
    await server.serve_forever()


class Echo(asyncio.Protocol):
    """The least that asyncio can be asked to do. No backpressure."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Keep what writes."""
        self.write = transport.write

    def data_received(self, data: bytes) -> None:
        """Send it back."""
        self.write(data)


async def protocol() -> None:
    """A bare protocol."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Echo, HOST, 0, backlog=BACKLOG)
    announce(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def send(stream: condaccept.Stream) -> None:
    """Echo with `send()`."""
    while data := await stream.read(SIZE):
        await stream.send(data)
    stream.close()


async def drain(stream: condaccept.Stream) -> None:
    """Echo with `write()` and `drain()`, word for word what `streams()` does."""
    while data := await stream.read(SIZE):
        stream.write(data)
        await stream.drain()
    stream.close()


async def accepting(name: str) -> None:
    """A task per stream that `accept()` returns."""
    echo = {"send": send, "drain": drain}[name]
    listener = await condaccept.listen(HOST, 0)
    announce(listener.sockname[1])
    async with asyncio.TaskGroup() as group:
        while True:
            group.create_task(echo(await listener.accept()))


if __name__ == "__main__":
    loop, name = sys.argv[1:]
    run(loop, {"streams": streams, "protocol": protocol}.get(name, lambda: accepting(name))())
