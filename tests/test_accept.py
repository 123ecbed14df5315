"""`Listener.accept()`: what one call does, alone and beside others."""

from __future__ import annotations

import asyncio

import pytest

from condaccept import ConnectionRejectedError, Listener, Stream
from tests.support import Dial, accept, reject, wire


async def test_accept_gives_a_stream(listener: Listener[Stream], dial: Dial) -> None:
    """ACCEPT returns a stream that both ends can use."""
    client = dial(listener, data=b"ping")
    stream = await listener.accept(accept)
    stream.write(b"pong")

    assert await stream.read(10) == b"ping"
    assert wire(client) == b"pong"
    stream.close()


async def test_reject_resets(listener: Listener[Stream], dial: Dial) -> None:
    """REJECT raises, and the caller is reset."""
    client = dial(listener)
    with pytest.raises(ConnectionRejectedError) as caught:
        await listener.accept(reject)

    assert caught.value.caller_id == client.getsockname()
    assert wire(client) == "reset"


async def test_accept_waits(listener: Listener[Stream], dial: Dial) -> None:
    """With nobody pending, accept() waits for the next caller."""
    call = asyncio.ensure_future(listener.accept())
    await asyncio.sleep(0)
    assert not call.done()
    dial(listener)
    (await call).close()
