"""`Stream` beside asyncio's `StreamReader` and `StreamWriter`: one script over both."""

from __future__ import annotations

import asyncio
import random
import socket
from collections import deque
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pytest

from tests.support import LIMIT, Dial, reset, turns

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from condaccept import Listener, Stream

Step: TypeAlias = tuple[Any, ...]
"""A call by its name, and its arguments."""
Ending: TypeAlias = tuple[Any, ...]
"""What a call ended with, in a form that compares."""

SEPARATORS: Final = [b"\n", b"\r\n", b"ab", b"aab"]
WRITTEN: Final = [b"", b"x", b"hello\n", bytes(1000), bytes(range(256)) * 400]
WRONG: Final = ["text", 5]


class Both:
    """The reading and the writing half of a connection, whoever made them."""

    def __init__(self, reader: Any, writer: Any) -> None:
        self.reader = reader
        self.writer = writer

    async def step(self, name: str, *args: Any) -> object:
        """Make one call."""
        if name == "iterate":
            return [line async for line in self.reader]
        if name == "impatient":
            return await self._impatient(*args)
        if name.startswith("read"):
            return await getattr(self.reader, name)(*args)
        result = getattr(self.writer, name)(*args)
        return await result if name in ("drain", "wait_closed") else result

    async def _impatient(self, name: str, *args: Any) -> object:
        """Make one call that reads; by timeouts it is cancelled again and again."""
        while True:
            try:
                async with asyncio.timeout(0):
                    return await self.step(name, *args)
            except TimeoutError:
                await asyncio.sleep(0)

    async def play(self, script: list[Step]) -> list[Ending]:
        """Return what each call of *script* ended with."""
        endings: list[Ending] = []
        for step in script:
            try:
                endings.append(("returned", await self.step(*step)))
            except asyncio.IncompleteReadError as error:
                endings.append(("incomplete", error.partial, error.expected))
            except (TypeError, ValueError, RuntimeError) as error:
                endings.append(("raised", type(error)))
        return endings


def read_step(rng: random.Random) -> Step:
    """Draw a call that reads, and whose result does not depend on the chunks."""
    name = rng.choice(["readexactly", "readuntil", "readline"])
    if name == "readexactly":
        return name, rng.choice([0, 1, 2, 7, 40, 300])
    return (name, rng.choice(SEPARATORS)) if name == "readuntil" else (name,)


def write_step(rng: random.Random) -> Step:
    """Draw a call that writes, or asks."""
    name = rng.choices(["write", "drain", "is_closing", "wrong", "write_eof"], [8, 4, 1, 1, 0.5])[0]
    if name == "wrong":
        return "write", rng.choice(WRONG)
    kind = rng.choice([bytes, bytearray, memoryview])
    return (name, kind(rng.choice(WRITTEN))) if name == "write" else (name,)


def drawn(rng: random.Random) -> list[Step]:
    """Draw a script, which reads to the end and closes."""
    script: list[Step] = []
    for _ in range(rng.randrange(40)):
        chance = rng.random()
        if chance < 0.5:
            script.append(read_step(rng))
        elif chance < 0.6:
            script.append(("impatient", *read_step(rng)))
        elif chance < 0.62:
            script.append(("readexactly", -1))
        elif chance < 0.64:
            script.append(("readuntil", b""))
        elif (step := write_step(rng)) in [("write", wrong) for wrong in WRONG]:
            # Behind an end, uvloop would speak of that first.
            script.insert(0, step)
        else:
            script.append(step)
    script.append(rng.choice([("read", -1), ("read",), ("iterate",)]))
    script += [("read", 10), ("read", 0), ("readline",), ("readexactly", 3), ("readuntil", b"x")]
    script += rng.sample([("write_eof",), ("write", b"bye"), ("drain",)], rng.randrange(4))
    return [*script, ("is_closing",), ("close",), ("close",), ("is_closing",), ("wait_closed",)]


def chunked(rng: random.Random, data: bytes) -> deque[bytes]:
    """Cut *data* into pieces of random lengths."""
    chunks: deque[bytes] = deque()
    while data:
        n = rng.choice([1, 1, 2, 3, 5, 8, 40, 1000])
        chunks.append(data[:n])
        data = data[n:]
    return chunks


async def talk(client: socket.socket, chunks: deque[bytes], rng: random.Random) -> bytes:
    """Send *chunks* and the end, and return all that comes up to the end."""
    client.setblocking(False)
    got = bytearray()
    ended = False
    while chunks or not ended:
        if chunks and rng.random() < 0.7:
            client.sendall(chunks.popleft())
            if not chunks:
                client.shutdown(socket.SHUT_WR)
        try:
            data = client.recv(rng.choice([1, 100, 65536]))
            got += data
            ended = not data
        except BlockingIOError:
            pass
        await turns(rng.randrange(3))
    return bytes(got)


async def over_stream(listener: Listener[Stream], dial: Dial) -> tuple[socket.socket, Both]:
    """Connect a client to a stream."""
    client = dial(listener)
    stream = await listener.accept()
    return client, Both(stream, stream)


async def over_asyncio(dial: Dial) -> tuple[socket.socket, Both, asyncio.Server]:
    """Connect a client to asyncio's streams."""
    connected: asyncio.Future[Both] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(
        lambda reader, writer: connected.set_result(Both(reader, writer)), "127.0.0.1", 0
    )
    client = dial(server.sockets[0].getsockname())
    return client, await connected, server


@pytest.mark.parametrize("seed", range(30))
async def test_one_script(either: Listener[Stream], dial: Dial, seed: int) -> None:
    """However the bytes come in chunks, every call ends as asyncio's does, and so for the peer."""
    rng = random.Random(seed)  # noqa: S311 - a seeded sequence, no secret
    data = bytes(rng.choices(b"ab\r\n", [4, 3, 1, 2], k=rng.choice([1, 30, 400, 3000])))
    script = drawn(rng)

    async def run(client: socket.socket, both: Both) -> tuple[list[Ending], bytes]:
        async with asyncio.timeout(LIMIT):
            chunks = chunked(rng, data)
            return await asyncio.gather(both.play(script), talk(client, chunks, rng))

    ours = await run(*await over_stream(either, dial))
    client, both, server = await over_asyncio(dial)
    theirs = await run(client, both)
    server.close()
    await server.wait_closed()
    for step, mine, other in zip(script, ours[0], theirs[0], strict=True):
        assert mine == other, step
    assert ours[1] == theirs[1]
    assert either.statistics().streams == 0


async def fate(call: Callable[[], Awaitable[object]]) -> object:
    """Return what a call returns, or the class of the error that it raises."""
    try:
        return await call()
    except OSError as error:
        return type(error)


@pytest.mark.parametrize("call", ["read", "readline", "readexactly", "readuntil", "iterate"])
async def test_reset_of_who_waits(either: Listener[Stream], dial: Dial, call: str) -> None:
    """A reset ends a call that waits, and what is called after it, as asyncio's streams do."""
    args = {"read": [10], "readexactly": [5]}.get(call, [])
    fates = []
    client, both = await over_stream(either, dial)
    other_client, other, server = await over_asyncio(dial)
    for sock, each in ((client, both), (other_client, other)):
        task = asyncio.ensure_future(fate(lambda each=each: each.step(call, *args)))  # type: ignore[misc]
        await turns()
        assert not task.done()
        reset(sock)
        seen = [await task]
        seen += [await fate(lambda each=each: each.step(call, *args))]  # type: ignore[misc]
        seen += [await fate(lambda each=each: each.step("drain"))]  # type: ignore[misc]
        each.writer.close()
        fates.append(seen)
    assert fates == [[ConnectionResetError] * 3] * 2
    await fate(other.writer.wait_closed)
    server.close()
    await server.wait_closed()
