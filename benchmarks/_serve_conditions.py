"""Conditions under measurement: ``python _serve_conditions.py LOOP CONDITION JOB``."""

from __future__ import annotations

import asyncio
import ipaddress
import sys

from _serve_condaccept import greet
from _serving import HOST, announce, run

import condaccept
from condaccept import ACCEPT, REJECT

ELSEWHERE = ipaddress.ip_network("10.0.0.0/8")
PREAMBLE = b"let me in"


class Conditions:
    """All that say the same in the end, and take different ways there."""

    none = None

    def __init__(self, verdict: condaccept.Verdict) -> None:
        """Say *verdict* to everybody."""
        self.verdict = verdict

    def constant(self, _pending: condaccept.PendingTransport) -> condaccept.Verdict:
        """Look at nothing."""
        return self.verdict

    def looks(self, pending: condaccept.PendingTransport) -> condaccept.Verdict:
        """Look at where the caller is, and at what it has sent."""
        if pending.ip in ELSEWHERE or (pending.caller_data or b"").startswith(PREAMBLE):
            return ACCEPT
        return self.verdict

    async def at_once(self, _pending: condaccept.PendingTransport) -> condaccept.Verdict:
        """Wait for nothing."""
        return self.verdict

    async def turn(self, _pending: condaccept.PendingTransport) -> condaccept.Verdict:
        """Wait for the loop to come around once."""
        await asyncio.sleep(0)
        return self.verdict


async def serve(name: str, job: str) -> None:
    """Serve *job* until the process is killed."""
    conditions = Conditions({"accept": ACCEPT, "reject": REJECT}[job])
    listener = await condaccept.listen(HOST, 0)
    announce(listener.sockname[1])
    await listener.serve(greet, getattr(conditions, name))


if __name__ == "__main__":
    loop, name, job = sys.argv[1:]
    run(loop, serve(name, job))
