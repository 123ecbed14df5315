"""An orderly end: decide who is there, wait for the streams, and say what was left."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import attrs

from condaccept._delivery import current_task

if TYPE_CHECKING:
    from condaccept._deciding import Deciding
    from condaccept._pending import Address
    from condaccept._stream import Stream

__all__ = ("Leftovers", "shutdown")

_NOBODY = object()


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
        rejecting: How many rejected callers had not read their callee data to the end.
    """

    undecided: tuple[tuple[Address, str], ...]
    aborted: tuple[tuple[Address, str], ...]
    queued: int
    rejecting: int

    def __bool__(self) -> bool:
        """Whether anything was left."""
        return bool(self.undecided or self.aborted or self.queued or self.rejecting)


async def shutdown(
    deciding: Deciding[Any],
    timeout: float | None,  # noqa: ASYNC109 - what is left is told, not raised
    own: Stream | None,
) -> Leftovers:
    """Stop, wait, and report what is left; the caller closes what that names.

    *own* is the stream of the handler that calls this: only it can end that.
    """
    queued = deciding.stop()
    deciding.consumer.closed()
    await asyncio.sleep(0)
    why = ""
    try:
        async with asyncio.timeout(timeout):
            await deciding.quiet(own)
    except TimeoutError:
        why = f"still there {timeout} s after the shutdown began"
    task = current_task()
    return Leftovers(
        undecided=tuple(
            (pending.caller_id, f"{pending.status.value}, {why}")
            for pending in deciding.undecided()
            if deciding.deciders.get(pending, _NOBODY) is not task
        ),
        aborted=tuple(
            (stream.caller_id, f"open, {why}") for stream in deciding.streams() if stream is not own
        ),
        queued=queued,
        rejecting=deciding.rejecting,
    )
