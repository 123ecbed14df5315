"""A listener under measurement: ``python _serve_condaccept.py LOOP HOW JOB``.

HOW is ``serve``, ``streams``, or a number: so many tasks in ``Listener.accept()``.
"""

from __future__ import annotations

import asyncio
import sys

from _serving import GREETING, HOST, announce, run

import condaccept
from condaccept import ACCEPT, REJECT


def accept(_pending: condaccept.PendingTransport) -> condaccept.Verdict:
    """Let everybody in."""
    return ACCEPT


def reject(_pending: condaccept.PendingTransport) -> condaccept.Verdict:
    """Let nobody in."""
    return REJECT


async def take(
    listener: condaccept.Listener[condaccept.Stream], condition: condaccept.Condition
) -> None:
    """Decide one connection after the other; greet and close those let in."""
    while True:
        try:
            stream = await listener.accept(condition)
        except condaccept.ConnectionRejectedError:
            continue
        stream.write(GREETING)
        stream.close()


async def greet(stream: condaccept.Stream) -> None:
    """Greet; serve() closes."""
    stream.write(GREETING)


async def serve(job: str, how: str) -> None:
    """Serve *job* until the process is killed."""
    condition = {"accept": accept, "reject": reject}[job]
    listener = await condaccept.listen(HOST, 0)
    announce(listener.sockname[1])
    if how == "serve":
        await listener.serve(greet, condition)
    elif how == "streams":
        async for stream in listener.streams(condition):
            stream.write(GREETING)
            stream.close()
    else:
        async with asyncio.TaskGroup() as group:
            for _ in range(int(how)):
                group.create_task(take(listener, condition))


if __name__ == "__main__":
    loop, how, job = sys.argv[1:]
    run(loop, serve(job, how))
