"""One transfer to each client, paced or not: ``python _serve_pacing.py LOOP SIZE RATE``.

A RATE of 0 asks for no flow spec.
"""

from __future__ import annotations

import sys

from _serving import HOST, announce, run

import condaccept
from condaccept import ACCEPT, FlowSpec


async def serve(size: int, rate: int) -> None:
    """Send *size* bytes to one client after the other until the process is killed."""
    data = bytes(size)

    def condition(pending: condaccept.PendingTransport) -> condaccept.Verdict:
        if rate:
            assert pending.sqos is not None
            pending.sqos.sending = FlowSpec(token_rate=rate)
        return ACCEPT

    listener = await condaccept.listen(HOST, 0)
    announce(listener.sockname[1])
    while True:
        async with await listener.accept(condition) as stream:
            await stream.send(data)


if __name__ == "__main__":
    loop, size, rate = sys.argv[1:]
    run(loop, serve(int(size), int(rate)))
