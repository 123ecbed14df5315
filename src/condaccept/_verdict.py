"""Verdicts: what a condition says of a pending connection. No sockets, no asyncio."""

from __future__ import annotations

import enum
from typing import Any, Final, TypeAlias

import attrs

__all__ = ("PEEK_LIMIT", "Accept", "AnyVerdict", "Defer", "Reject", "Verdict")

PEEK_LIMIT: Final = 16384
"""The most bytes that are looked at before a verdict: a TLS record, so that a whole
ClientHello fits."""


class Verdict(enum.Enum):
    """The three answers of a condition.

    Source: CF_ACCEPT, CF_REJECT and CF_DEFER of WSPAccept.
    """

    ACCEPT = "accept"
    REJECT = "reject"
    DEFER = "defer"


def _text(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, str):
        message = f"{attribute.name} is text for a person, got {value!r}"
        raise TypeError(message)


def _seconds(_instance: object, attribute: attrs.Attribute[Any], value: float | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        message = f"{attribute.name} is a number of seconds or None, got {value!r}"
        raise TypeError(message)
    if not value >= 0:  # "not >=" also refuses NaN
        message = f"{attribute.name} cannot be negative, got {value!r}"
        raise ValueError(message)


@attrs.frozen
class Accept:
    """`ACCEPT` with a reason.

    Attributes:
        reason: Text for the log and the `Outcome`.
    """

    reason: str = attrs.field(default="accepted by the condition", validator=_text)


@attrs.frozen
class Reject:
    """`REJECT` with a reason and, if wanted, callee data.

    Attributes:
        reason: Text for the error, the log and the `Outcome`. The caller never sees it.
        data: Bytes the caller reads before the end of the stream, at most the capacity
            of `PendingTransport.callee_data`; ``None`` sends what the condition put
            there. Without any the caller is reset.
    """

    reason: str = attrs.field(default="rejected by the condition", validator=_text)
    data: bytes | None = attrs.field(default=None)

    @data.validator
    def _check_data(self, _attribute: attrs.Attribute[Any], value: object) -> None:
        if value is not None and not isinstance(value, bytes):
            message = f"data is bytes or None, got {value!r}"
            raise TypeError(message)


@attrs.frozen(kw_only=True)
class Defer:
    """`DEFER` with hints about when asking again makes sense; the first fulfilled counts.

    `Listener.streams()` and `Listener.serve()` ask again then, and not before; without any
    hint, when somebody calls `reconsider()`. Under `Listener.accept()` the next call offers
    the connection again whatever the hints say: there they make `wait_pending()` return,
    and go to the caller in `ConnectionDeferredError.defer`.

    Attributes:
        after: Ask again when this many seconds have passed.
        until_bytes: Ask again when this many bytes can be peeked, at most 16 KiB, or when
            the caller will send no more.
        within: With *until_bytes*: the seconds after which to ask again all the same;
            then `PendingTransport.timed_out` is true.
        until_free: Ask again when an accepted connection of the listener is over, or has
            started: the oldest that waits so, one for each.
        reason: Text for the error, the log and the `Outcome`.
    """

    after: float | None = attrs.field(default=None, validator=_seconds)
    until_bytes: int | None = attrs.field(default=None)
    within: float | None = attrs.field(default=None, validator=_seconds)
    until_free: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))
    reason: str = attrs.field(default="deferred by the condition", validator=_text)

    @until_bytes.validator
    def _check_until_bytes(self, _attribute: attrs.Attribute[Any], value: object) -> None:
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            message = f"until_bytes is a number of bytes or None, got {value!r}"
            raise TypeError(message)
        if not 1 <= value <= PEEK_LIMIT:
            message = f"until_bytes is from 1 to {PEEK_LIMIT}, which can be peeked; got {value!r}"
            raise ValueError(message)

    @within.validator
    def _check_within(self, _attribute: attrs.Attribute[Any], value: object) -> None:
        if value is not None and self.until_bytes is None:
            message = "within bounds the wait for bytes: give until_bytes too, or use after"
            raise ValueError(message)


AnyVerdict: TypeAlias = Verdict | Accept | Reject | Defer
"""What a condition may return: a bare member, or one of the three with its details."""
