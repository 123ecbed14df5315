"""How many streams there may be at once, and what happens to the next caller. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Capacity", "Limit", "Overflow", "Place", "Slots", "as_limit")

Overflow: TypeAlias = Literal["queue", "reject", "refuse"]
_OVERFLOWS: Final = ("queue", "reject", "refuse")


def _number(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        message = f"{name} is a number of streams, got {value!r}"
        raise TypeError(message)
    if value < least:
        message = f"{name} is at least {least}, got {value!r}"
        raise ValueError(message)


@attrs.frozen
class Limit:
    """A number of streams, and what happens to who comes when it is reached.

    Attributes:
        n: At most so many. 0 is zero: nobody gets in.
        overflow: ``"queue"``: nobody is taken, the kernel's backlog holds the rest.
            ``"reject"``: the newcomer is reset, no condition is asked. ``"refuse"``: the
            kernel refuses, ``connect()`` fails with ECONNREFUSED; for TCP sockets that
            `listen()` made and nobody shares, elsewhere to set it is an error.
        low: For ``"refuse"``: the kernel listens again at so many. ``None`` is three
            quarters of *n*: to refuse costs those whose handshake is just under way, so
            it should not be switched for every stream.
    """

    n: int = attrs.field()
    overflow: Overflow = attrs.field(default="queue")
    low: int | None = attrs.field(default=None)

    @n.validator
    def _check_n(self, _attribute: attrs.Attribute[Any], value: object) -> None:
        _number("a limit", value, 0)

    @overflow.validator
    def _check_overflow(self, _attribute: attrs.Attribute[Any], value: object) -> None:
        if value not in _OVERFLOWS:
            message = f"overflow is one of {', '.join(map(repr, _OVERFLOWS))}; got {value!r}"
            raise ValueError(message)

    @low.validator
    def _check_low(self, _attribute: attrs.Attribute[Any], value: object) -> None:
        if value is None:
            return
        _number("low", value, 0)
        if self.overflow != "refuse":
            message = f"low is for overflow='refuse', this limit says {self.overflow!r}"
            raise ValueError(message)
        if value >= self.n:  # type: ignore[operator]
            message = f"low is below the limit of {self.n}, got {value!r}"
            raise ValueError(message)

    @property
    def low_mark(self) -> int:
        """The number at which the kernel listens again."""
        return self.n * 3 // 4 if self.low is None else self.low


def as_limit(name: str, value: object) -> Limit | None:
    """Return what somebody gave as a limit: a number, a `Limit`, or ``None`` for none."""
    if value is None or isinstance(value, Limit):
        return value
    _number(name, value, 0)
    return Limit(value)  # type: ignore[arg-type]


class Slots:
    """Places of which so many are taken; each is given back exactly once.

    A limit may be set below what is taken: then nothing is free until enough came back.

    Attributes:
        limit: How many there are; ``None`` for any number.
        taken: How many are taken now.
    """

    __slots__ = ("limit", "taken")

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.taken = 0

    def __repr__(self) -> str:
        return f"<Slots {self.taken} of {self.limit}>"

    @property
    def free(self) -> int | None:
        """How many can be taken, ``None`` for any number; never negative."""
        return None if self.limit is None else max(0, self.limit - self.taken)

    def take(self) -> Callable[[], bool]:
        """Take one, free or not; return what gives it back.

        That may be called any number of times: it returns True at the first, which gave
        the place back, and False from then on.
        """
        self.taken += 1
        held = True

        def give_back() -> bool:
            nonlocal held
            if not held:
                return False
            held = False
            self.taken -= 1
            return True

        return give_back


class Place:
    """What one accepted connection takes of a listener's capacity, until it is over.

    One object for both counts, since every accepted connection has it: streams are counted
    without a limit, too, for the limit that is set later.
    """

    __slots__ = ("_capacity", "_starting")

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._starting = True
        capacity.streams.taken += 1
        capacity.starting.taken += 1

    def give_back(self) -> None:
        """Give it back: the connection is over. Called once."""
        capacity = self._capacity
        capacity.streams.taken -= 1
        if self._starting:
            self._starting = False
            capacity.starting.taken -= 1

    def started(self) -> None:
        """Note that the connection has started; a second call does nothing."""
        if self._starting:
            self._starting = False
            self._capacity.starting.taken -= 1
            self._capacity.freed()


class Capacity:
    """The limits of a listener: open streams, and streams that have still to start.

    Attributes:
        streams: Those that are accepted and open.
        starting: Those of them that have not said yet that they have started.
        limited: Whether there is any limit.
        freed: Called when a connection has started, which gives back half of its place.
    """

    freed: Callable[[], object]

    def __init__(self, max_streams: Limit | None, max_starting: Limit | None) -> None:
        # Counted without a limit, too: one may be set while they are open.
        self.streams = Slots(None)
        self.starting = Slots(None)
        self._limits: dict[str, tuple[Limit, Slots]] = {}
        self.limited = False
        self.set("max_streams", max_streams)
        self.set("max_starting", max_starting)

    def get(self, name: str) -> Limit | None:
        """Return the limit of that name."""
        return self._limits[name][0] if name in self._limits else None

    def set(self, name: str, limit: Limit | None) -> None:
        """Change the limit of that name; what is taken stays taken."""
        slots = {"max_streams": self.streams, "max_starting": self.starting}[name]
        if limit is None:
            slots.limit = None
            self._limits.pop(name, None)
        else:
            slots.limit = limit.n
            self._limits[name] = limit, slots
        self.limited = bool(self._limits)

    @property
    def refuses(self) -> bool:
        """Whether there is one at which the kernel is to refuse."""
        return any(limit.overflow == "refuse" for limit, _ in self._limits.values())

    def room(self) -> int | None:
        """How many more may be accepted; ``None`` for any number."""
        if not self._limits:
            return None
        return min(max(0, limit.n - slots.taken) for limit, slots in self._limits.values())

    def overflow(self) -> tuple[Overflow, str] | None:
        """Return what happens to who comes now, and why; ``None`` while there is room.

        Where both limits are reached, the stricter way: refuse before reject before queue.
        """
        full = [
            (limit.overflow, f"{name}={limit.n} is reached")
            for name, (limit, slots) in self._limits.items()
            if slots.taken >= limit.n
        ]
        return max(full, key=lambda each: _OVERFLOWS.index(each[0]), default=None)

    def may_listen(self) -> bool:
        """Whether each limit that refuses is down at its low mark, and has room."""
        return all(
            slots.taken <= limit.low_mark and slots.taken < limit.n
            for limit, slots in self._limits.values()
            if limit.overflow == "refuse"
        )
