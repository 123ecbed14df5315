"""Several processes that serve one port.

    python workers.py --port 7007 --workers 4
    python workers.py --port 7007 --workers 4 --inherit
    python workers.py --demo

Each worker has a listening socket of its own on the port (SO_REUSEPORT): the kernel deals
callers out to them evenly, and those dealt to a worker that ends are reset. With
``--inherit`` all take from one socket: whoever is free first has the next caller, and a
worker that ends leaves the queue to the others.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import sys
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import condaccept
from condaccept import Listener, Stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LAST = 5.0
"""Seconds that a worker is given to finish its streams."""


async def answer(stream: Stream, name: str) -> None:
    """Say which worker this is."""
    try:
        await stream.send(f"worker {name}\n".encode())
    except OSError:
        return  # the caller has left
    finally:
        stream.close()


async def worker(name: str, host: str, port: int, descriptor: int | None) -> None:
    """Serve until the end of standard input: so no worker outlives its parent."""
    listener: Listener[Stream]
    if descriptor is None:
        listener = await condaccept.listen(host, port, reuse_port=True)
    else:
        listener = Listener.from_socket(socket.socket(fileno=descriptor))
    loop = asyncio.get_running_loop()
    # Ctrl-C at the terminal goes to every process; the parent's end is ours.
    loop.add_signal_handler(signal.SIGINT, lambda: None)

    def at_eof() -> None:
        loop.remove_reader(sys.stdin)
        listener.close()

    async with listener:
        loop.add_reader(sys.stdin, at_eof)
        print(f"worker {name} serves {listener.sockname}", flush=True)
        with contextlib.suppress(condaccept.ListenerClosedError):  # closed before it began
            await listener.serve(partial(answer, name=name))


@contextlib.asynccontextmanager
async def running(
    host: str, port: int, workers: int, *, inherit: bool
) -> AsyncIterator[tuple[str, int]]:
    """Run the workers; the value is the address they serve."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if not inherit:
            # Only bound, so that it gets nobody: it keeps a port chosen by the kernel.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        if inherit:
            sock.listen(4096)
        address = sock.getsockname()
        command = [sys.executable, __file__, "--host", host, "--port", str(address[1])]
        if inherit:
            command += ["--descriptor", str(sock.fileno())]
        processes = [
            await asyncio.create_subprocess_exec(
                *command,
                *("--name", str(number + 1)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=[sock.fileno()] if inherit else [],
            )
            for number in range(workers)
        ]
        try:
            for process in processes:
                assert process.stdout is not None  # noqa: S101 - a pipe was asked for
                line = await process.stdout.readline()
                if b" serves " not in line:
                    message = f"worker {process.pid} did not come up"
                    raise RuntimeError(message)
            yield address
        finally:
            for process in processes:
                await end(process)


async def end(process: asyncio.subprocess.Process) -> None:
    """Have a worker close its listener and finish its streams."""
    try:
        async with asyncio.timeout(LAST):
            await process.communicate(b"")
    except TimeoutError:
        process.kill()
        await process.wait()


async def main(host: str, port: int, workers: int, *, inherit: bool) -> None:
    """Serve until Ctrl-C."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    async with running(host, port, workers, inherit=inherit) as address:
        print(f"{workers} workers on {address}; Ctrl-C ends them")
        await stop.wait()
    print("closed")


CALLERS = 100
WORKERS = 3
PATIENCE = 30.0
"""Seconds for the whole demo."""


async def call(address: tuple[str, int]) -> str:
    """Call once; return what was answered, or what went wrong."""
    try:
        reader, writer = await asyncio.open_connection(*address)
        answered = await reader.read()
        writer.close()
        await writer.wait_closed()
    except OSError as error:
        return repr(error)
    return answered.decode().strip()


async def demo() -> int:
    """Call the workers of both kinds; return 0 if everybody was served."""
    expected = {f"worker {number + 1}" for number in range(WORKERS)}
    served = True
    async with asyncio.timeout(PATIENCE):
        for inherit in (False, True):
            print("one socket for all:" if inherit else "a socket for each:")
            async with running("127.0.0.1", 0, WORKERS, inherit=inherit) as address:
                ends = Counter(await asyncio.gather(*(call(address) for _ in range(CALLERS))))
            for end, count in sorted(ends.items()):
                print(f"    {end:10} {count:4}")
            served = served and expected >= set(ends)
    return 0 if served else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Several processes that serve one port.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7007)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--inherit", action="store_true", help="one socket for all")
    parser.add_argument("--demo", action="store_true", help="run it against callers of its own")
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--descriptor", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.demo:
        raise SystemExit(asyncio.run(demo()))
    if chosen.name is not None:
        asyncio.run(worker(chosen.name, chosen.host, chosen.port, chosen.descriptor))
    else:
        asyncio.run(main(chosen.host, chosen.port, chosen.workers, inherit=chosen.inherit))
