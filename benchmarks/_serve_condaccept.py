"""``Listener.accept()`` under measurement: ``python _serve_condaccept.py LOOP TASKS JOB``."""

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


async def serve(job: str, tasks: int) -> None:
    """Serve *job* in so many tasks until the process is killed."""
    condition = {"accept": accept, "reject": reject}[job]
    listener = await condaccept.listen(HOST, 0)
    announce(listener.sockname[1])
    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(take(listener, condition))


if __name__ == "__main__":
    loop, tasks, job = sys.argv[1:]
    run(loop, serve(job, int(tasks)))
