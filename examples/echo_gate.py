"""An echo server behind a condition: some are let in, some refused, some have to wait.

    python echo_gate.py --port 7007 --limit 2 --deny 127.0.0.2
    python echo_gate.py --demo

A caller on the deny list is rejected. The others get one of a limited number of places;
while all are taken, the next caller is deferred: it stays connected and undecided, and is
asked about again when a place is free.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
from typing import TYPE_CHECKING

import condaccept
from condaccept import (
    ACCEPT,
    AnyVerdict,
    Defer,
    Listener,
    Outcome,
    PendingTransport,
    Reject,
    Stream,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


CALLERS = (
    condaccept.ConnectionRejectedError,
    condaccept.PendingResetError,
    condaccept.PendingExpiredError,
    condaccept.NetworkDownError,
)
"""What accept() raises about one caller; the next call goes on to the next."""


class Places:
    """A limited number of places."""

    def __init__(self, limit: int) -> None:
        self.free = limit
        self._given_back = asyncio.Event()

    def give_back(self) -> None:
        """Note that a connection is over."""
        self.free += 1
        self._given_back.set()

    async def until_free(self) -> None:
        """Wait until there is a free place."""
        while self.free < 1:
            self._given_back.clear()
            await self._given_back.wait()


def gate(places: Places, deny: Collection[Address]) -> Callable[[PendingTransport], AnyVerdict]:
    """Return the condition."""

    def condition(pending: PendingTransport) -> AnyVerdict:
        if pending.ip in deny:
            return Reject("on the deny list")
        if places.free < 1:
            return Defer(until_free=True, reason="all places are taken")
        places.free -= 1
        # Given back when the connection is over, whoever ends it and however.
        pending.hold(places.give_back)
        return ACCEPT

    return condition


async def echo(stream: Stream) -> None:
    """Send back what comes, until the caller has finished."""
    try:
        while data := await stream.read(65536):
            await stream.send(data)
    except OSError:
        return  # the caller has left
    finally:
        stream.close()


async def serve(
    listener: Listener[Stream],
    places: Places,
    deny: Collection[Address],
    deferred: Callable[[str, int], None],
) -> None:
    """Accept until the listener is closed; a task for each stream."""
    condition = gate(places, deny)
    async with asyncio.TaskGroup() as echoes:
        while True:
            try:
                stream = await listener.accept(condition)
            except condaccept.ConnectionDeferredError as error:
                # The next call would offer the same connection again: wait until it helps.
                deferred(error.reason, error.caller_id[1])
                await places.until_free()
            except condaccept.ListenerClosedError:
                return
            except (condaccept.DescriptorsExhaustedError, condaccept.BuffersExhaustedError):
                await asyncio.sleep(0.1)
            except CALLERS:
                continue
            else:
                echoes.create_task(echo(stream))


async def main(host: str, port: int, limit: int, deny: Collection[Address]) -> None:
    """Serve until cancelled: Ctrl-C does that."""
    async with await condaccept.listen(host, port) as listener:
        listener.on_outcome(lambda outcome: print(f"{outcome.caller_id}: {outcome.reason}"))
        print(f"echo gate on {listener.sockname}, {limit} places; Ctrl-C ends it")
        await serve(
            listener,
            Places(limit),
            deny,
            lambda reason, port: print(f"port {port}: {reason}"),
        )


DENIED = ipaddress.ip_address("127.0.0.2")


async def demo() -> int:
    """Run the server against three real clients, print what both sides saw."""
    server: dict[int, list[str]] = {}
    client: dict[str, list[str]] = {"first": [], "denied": [], "second": []}
    ports: dict[str, int] = {}

    def outcome(each: Outcome) -> None:
        told = each.verdict.name if each.verdict else each.status.name
        server.setdefault(each.caller_id[1], []).append(f"{told}: {each.reason}")

    def deferred(reason: str, port: int) -> None:
        server.setdefault(port, []).append(f"DEFER: {reason}")
        waiting.set()

    async def dial(name: str, source: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*listener.sockname, local_addr=(source, 0))
        ports[name] = writer.get_extra_info("sockname")[1]
        client[name].append("connected")
        writer.write(f"hello from {name}\n".encode())
        return reader, writer

    async def hear(name: str, reader: asyncio.StreamReader) -> None:
        try:
            client[name].append(f"read {await reader.readline()!r}")
        except ConnectionResetError:
            client[name].append("reset by the server")

    waiting = asyncio.Event()
    async with await condaccept.listen("127.0.0.1", 0) as listener:
        listener.on_outcome(outcome)
        serving = asyncio.create_task(serve(listener, Places(1), {DENIED}, deferred))

        reader, writer = await dial("first", "127.0.0.1")
        await hear("first", reader)
        denied_reader, denied_writer = await dial("denied", str(DENIED))
        await hear("denied", denied_reader)
        second_reader, second_writer = await dial("second", "127.0.0.1")
        hearing = asyncio.create_task(hear("second", second_reader))
        await waiting.wait()
        if not hearing.done():
            client["second"].append("waits")
        client["first"].append("closes")
        writer.close()
        await hearing

        for each in (denied_writer, second_writer):
            each.close()
        listener.close()
        await serving

    print(f"{'client':8} {'what the client saw':58} what the server said")
    for name, seen in client.items():
        print(f"{name:8} {', '.join(seen):58} {', then '.join(server[ports[name]])}")
    as_expected = client == {
        "first": ["connected", "read b'hello from first\\n'", "closes"],
        "denied": ["connected", "reset by the server"],
        "second": ["connected", "waits", "read b'hello from second\\n'"],
    } and [[told.split(":")[0] for told in server[ports[name]]] for name in client] == [
        ["ACCEPT"],
        ["REJECT"],
        ["DEFER", "ACCEPT"],
    ]
    return 0 if as_expected else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An echo server behind a condition.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7007)
    parser.add_argument("--limit", type=int, default=100, help="places (default: 100)")
    parser.add_argument(
        "--deny",
        action="append",
        default=[],
        type=ipaddress.ip_address,
        metavar="IP",
        help="an address to reject; may be given more than once",
    )
    parser.add_argument("--demo", action="store_true", help="run it against clients of its own")
    chosen = parser.parse_args()
    if chosen.demo:
        raise SystemExit(asyncio.run(demo()))
    try:
        asyncio.run(main(chosen.host, chosen.port, chosen.limit, chosen.deny))
    except KeyboardInterrupt:
        print("closed")
