"""A server that is replaced by its next generation without refusing or resetting anybody.

    python hot_restart.py --port 7007 --control /run/user/1000/hot.sock    # the first
    python hot_restart.py --port 7007 --control /run/user/1000/hot.sock    # replaces it
    python hot_restart.py --demo

Each generation listens on a control socket for its successor. The successor is given the
listening sockets there, with whoever waits in the kernel's queue, and begins to serve. When
it has said that it holds them, the old generation takes nobody any more, finishes the
streams it has, and ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections import Counter

import condaccept
from condaccept import Listener, Stream

HAND_OVER = 10.0
"""Seconds that a successor is given to take the sockets; without, the old one serves on."""


async def answer(stream: Stream) -> None:
    """Answer each line with the number of this process, until the caller has finished."""
    try:
        async for _ in stream:
            await stream.send(b"%d\n" % os.getpid())
    except OSError:
        return  # the caller has left
    finally:
        stream.close()


async def take_over(control: str) -> Listener[Stream] | None:
    """Take over from the generation that runs; ``None`` if none does."""
    with socket.socket(socket.AF_UNIX) as predecessor:
        predecessor.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(predecessor, control)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        (sock,) = await condaccept.receive_sockets(predecessor)
    return Listener.from_socket(sock)


def listen_for_successor(control: str) -> socket.socket:
    """Listen on the control socket; the file of the generation before is replaced."""
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(control)
    sock.bind(control)
    # Whoever can connect here can have the listening sockets.
    os.chmod(control, 0o600)
    sock.listen()
    return sock


async def hand_over(listener: Listener[Stream], control: socket.socket) -> None:
    """Return when a successor holds the sockets."""
    while True:
        successor, _ = await asyncio.get_running_loop().sock_accept(control)
        with successor:
            try:
                async with asyncio.timeout(HAND_OVER):
                    await condaccept.send_listener(listener, successor)
            except (OSError, ValueError, TimeoutError) as error:
                print(f"{os.getpid()} goes on: {error!r}", flush=True)
            else:
                return


async def generation(host: str, port: int, control: str, *, until_eof: bool) -> None:
    """Serve until a successor has taken over, or a signal has come."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, stop.set)

    def at_eof() -> None:
        loop.remove_reader(sys.stdin)
        stop.set()

    if until_eof:
        loop.add_reader(sys.stdin, at_eof)
    listener = await take_over(control) or await condaccept.listen(host, port)
    with listen_for_successor(control) as waiting:
        async with listener, asyncio.TaskGroup() as tasks:
            tasks.create_task(listener.serve(answer))
            succeeded = tasks.create_task(hand_over(listener, waiting))
            stopped = tasks.create_task(stop.wait())
            print(f"{os.getpid()} serves {listener.sockname[1]}", flush=True)
            await asyncio.wait([succeeded, stopped], return_when=asyncio.FIRST_COMPLETED)
            # What is in the kernel's queue is the successor's now; the streams are ours.
            listener.close()
            succeeded.cancel()
            stopped.cancel()
    print(f"{os.getpid()} has ended", flush=True)


# -- the demo

GENERATIONS = 3
CALLERS = 16
"""Callers at once; each calls again and again."""
ENOUGH = 200
"""Calls that each generation is to answer, at least."""
PATIENCE = 30.0
"""Seconds for the whole demo."""
LAST = 5.0
"""Seconds for what has to end."""


class Load:
    """Callers that call all the time, and who answered them."""

    def __init__(self, port: int) -> None:
        self.served: Counter[int] = Counter()
        self.errors: list[str] = []
        self.over = False
        self._told = asyncio.Condition()
        self._port = port

    async def call(self) -> None:
        """Call again and again."""
        while not self.errors and not self.over:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.write(b"who is there?\n")
                pid = int(await reader.readline())
                async with self._told:
                    self.served[pid] += 1
                    self._told.notify_all()
                writer.write_eof()
                if await reader.read():
                    await self._failed("bytes that nobody sent")
                writer.close()
                await writer.wait_closed()
            except (OSError, ValueError) as error:
                await self._failed(repr(error))

    async def _failed(self, error: str) -> None:
        async with self._told:
            self.errors.append(error)
            self._told.notify_all()

    async def enough(self, pid: int) -> None:
        """Wait until a generation has answered often enough."""
        async with self._told:
            await self._told.wait_for(lambda: self.served[pid] >= ENOUGH or self.errors)


async def start(control: str) -> tuple[asyncio.subprocess.Process, int]:
    """Start a generation; return it when it serves, and its port."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, "--port", "0", "--control", control, "--until-eof"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None  # noqa: S101 - a pipe was asked for
    line = await process.stdout.readline()
    if b" serves " not in line:
        message = f"generation {process.pid} did not come up: {line!r}"
        raise RuntimeError(message)
    return process, int(line.split()[-1])


async def end(process: asyncio.subprocess.Process) -> None:
    """Wait for a generation; the last of them ends when its input does."""
    try:
        async with asyncio.timeout(LAST):
            await process.communicate(b"")
    except TimeoutError:
        process.kill()
        await process.wait()


async def demo() -> int:
    """Replace a server twice under load; return 0 if no caller saw an error."""
    with tempfile.TemporaryDirectory() as folder:
        control = os.path.join(folder, "control")
        async with asyncio.timeout(PATIENCE):
            return await restarts(control)


async def restarts(control: str) -> int:
    """See `demo()`."""
    processes = []
    first, port = await start(control)
    processes.append(first)
    load = Load(port)
    calling = [asyncio.create_task(load.call()) for _ in range(CALLERS)]
    try:
        # One caller stays with the first generation for longer than that listens.
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await load.enough(first.pid)
        for _ in range(GENERATIONS - 1):
            successor, _ = await start(control)
            processes.append(successor)
            await load.enough(successor.pid)
        writer.write(b"still there?\n")
        faithful = int(await reader.readline()) == first.pid
        writer.close()
        await writer.wait_closed()
    finally:
        load.over = True
        await asyncio.wait(calling, timeout=LAST)
        for process in processes:
            await end(process)
    for number, process in enumerate(processes, 1):
        print(f"generation {number} served {load.served[process.pid]:5} callers")
    print(f"a caller of generation 1 was {'' if faithful else 'not '}served by it to the end")
    print(f"errors: {', '.join(load.errors) or 'none'}")
    clean = all(process.returncode == 0 for process in processes)
    everybody = all(load.served[process.pid] >= ENOUGH for process in processes)
    return 0 if clean and everybody and faithful and not load.errors else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A server that is replaced while it serves.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7007)
    parser.add_argument("--control", default="hot_restart.sock", help="where generations meet")
    parser.add_argument("--until-eof", action="store_true", help="end with standard input")
    parser.add_argument("--demo", action="store_true", help="replace it twice, under load")
    chosen = parser.parse_args()
    if chosen.demo:
        raise SystemExit(asyncio.run(demo()))
    asyncio.run(generation(chosen.host, chosen.port, chosen.control, until_eof=chosen.until_eof))
