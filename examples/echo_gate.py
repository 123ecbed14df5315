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
import socket
from typing import TYPE_CHECKING

import condaccept
from condaccept import ACCEPT, AnyVerdict, Defer, Outcome, PendingTransport, Reject, Stream

if TYPE_CHECKING:
    from collections.abc import Collection

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Gate:
    """The condition: a deny list, and a limited number of places."""

    def __init__(self, limit: int, deny: Collection[Address]) -> None:
        self._free = limit
        self._deny = deny

    def __call__(self, pending: PendingTransport) -> AnyVerdict:
        """Say who may come in."""
        if pending.ip in self._deny:
            return Reject("on the deny list")
        if self._free < 1:
            return Defer(until_free=True, reason="all places are taken")
        self._free -= 1
        # Given back when the connection is over, whoever ends it and however.
        pending.hold(self._give_back)
        return ACCEPT

    def _give_back(self) -> None:
        self._free += 1


async def echo(stream: Stream) -> None:
    """Send back what comes, until the caller has finished."""
    try:
        while data := await stream.read(65536):
            await stream.send(data)
    except OSError:
        return  # the caller has left


async def main(host: str, port: int, limit: int, deny: Collection[Address]) -> None:
    """Serve until cancelled: Ctrl-C does that."""
    gate = Gate(limit, deny)

    def condition(pending: PendingTransport) -> AnyVerdict:
        verdict = gate(pending)
        if isinstance(verdict, Defer):
            print(f"{pending.caller_id}: {verdict.reason}", flush=True)
        return verdict

    async with await condaccept.listen(host, port) as listener:
        listener.on_outcome(lambda outcome: print(f"{outcome.caller_id}: {outcome.reason}"))
        print(f"echo gate on {listener.sockname}, {limit} places; Ctrl-C ends it")
        await listener.serve(echo, condition)


DENIED = ipaddress.ip_address("127.0.0.2")


async def demo() -> int:
    """Run the server against three real clients, print what both sides saw."""
    server: dict[int, list[str]] = {}
    client: dict[str, list[str]] = {"first": [], "denied": [], "second": []}
    ports: dict[str, int] = {}

    def outcome(each: Outcome) -> None:
        told = each.verdict.name if each.verdict else each.status.name
        server.setdefault(each.caller_id[1], []).append(f"{told}: {each.reason}")

    def condition(pending: PendingTransport) -> AnyVerdict:
        verdict = gate(pending)
        if isinstance(verdict, Defer):
            server.setdefault(pending.caller_id[1], []).append(f"DEFER: {verdict.reason}")
            waiting.set()
        return verdict

    async def dial(name: str, source: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # At once, since the server is in the same loop, and quick: a loop's own connect would
        # see the rejection first.
        sock = socket.create_connection(listener.sockname, source_address=(source, 0))
        reader, writer = await asyncio.open_connection(sock=sock)
        ports[name] = writer.get_extra_info("sockname")[1]
        client[name].append("connected")
        writer.write(f"hello from {name}\n".encode())
        return reader, writer

    async def hear(name: str, reader: asyncio.StreamReader) -> None:
        try:
            client[name].append(f"read {await reader.readline()!r}")
        except ConnectionResetError:
            client[name].append("reset by the server")

    gate = Gate(1, {DENIED})
    waiting = asyncio.Event()
    async with await condaccept.listen("127.0.0.1", 0) as listener:
        listener.on_outcome(outcome)
        serving = asyncio.create_task(listener.serve(echo, condition))

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
