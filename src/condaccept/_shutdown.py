"""An orderly end: decide who is there, wait for the streams, and say what was left."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from condaccept._deciding import Deciding
    from condaccept._pending import Address

__all__ = ("Leftovers", "shutdown")


@attrs.frozen(kw_only=True)
class Leftovers:
    """What did not end by itself before a shutdown was over.

    Attributes:
        undecided: ``(caller_id, why)`` of each connection that had no verdict, or that
            nobody had taken yet; it was reset.
        aborted: ``(caller_id, why)`` of each stream that was still open; it was aborted.
        queued: How many callers the kernel had queued when the listening sockets were
            closed, because the deque had no place for them, or the process no descriptor.
            Unless another process has the sockets, too, they were reset.
    """

    undecided: tuple[tuple[Address, str], ...]
    aborted: tuple[tuple[Address, str], ...]
    queued: int

    def __bool__(self) -> bool:
        """Whether anything was left."""
        return bool(self.undecided or self.aborted or self.queued)


async def shutdown(deciding: Deciding[Any], timeout: float | None) -> Leftovers:  # noqa: ASYNC109
    """Stop, wait, and report what is left; the caller closes what that names."""
    queued = deciding.stop()
    deciding.consumer.closed()
    why = "still there after the shutdown began"
    try:
        async with asyncio.timeout(timeout):
            await deciding.quiet()
    except TimeoutError:
        why = f"still there {timeout} s after the shutdown began"
    return Leftovers(
        undecided=tuple(
            (pending.caller_id, f"{pending.status.value}, {why}")
            for pending in deciding.undecided()
        ),
        aborted=tuple((stream.caller_id, f"open, {why}") for stream in deciding.streams()),
        queued=queued,
    )
