"""`condaccept._verdict`: what a condition may return, and what it may not be made of."""

from __future__ import annotations

import copy
import math
import pickle
from typing import TYPE_CHECKING, Any

import attrs
import pytest

import condaccept
from condaccept import ACCEPT, DEFER, REJECT, Accept, Defer, Reject, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable


def test_three_verdicts() -> None:
    """There are three verdicts, and the package's names are they."""
    assert list(Verdict) == [Verdict.ACCEPT, Verdict.REJECT, Verdict.DEFER]
    assert ACCEPT is Verdict.ACCEPT
    assert REJECT is Verdict.REJECT
    assert DEFER is Verdict.DEFER
    assert condaccept.ACCEPT is ACCEPT


def test_defaults() -> None:
    """Without arguments there is a reason to read, and nothing else."""
    assert Accept() == Accept(reason="accepted by the condition")
    assert Reject() == Reject(reason="rejected by the condition", data=None)
    assert Defer() == Defer(
        after=None,
        until_bytes=None,
        within=None,
        until_free=False,
        reason="deferred by the condition",
    )


def test_positional_arguments() -> None:
    """A reason, and the data of a rejection, can be given by position; a hint cannot."""
    assert Accept("known").reason == "known"
    assert Reject("full", b"later") == Reject(reason="full", data=b"later")
    with pytest.raises(TypeError, match="positional"):
        Defer(1)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [Accept, Reject, Defer])
@pytest.mark.parametrize("reason", [None, 5, b"bytes"])
def test_a_reason_is_text(kind: Callable[..., Any], reason: object) -> None:
    """A reason that is no text is refused, with what was given."""
    with pytest.raises(TypeError, match="reason is text for a person, got"):
        kind(reason=reason)


@pytest.mark.parametrize("data", ["text", 5, bytearray(b"x"), memoryview(b"x"), [1]])
def test_data_is_bytes(data: Any) -> None:
    """The data of a rejection is bytes, which nobody can change later, or None."""
    with pytest.raises(TypeError, match="data is bytes or None, got"):
        Reject(data=data)


@pytest.mark.parametrize("data", [None, b"", b"bye", bytes(100_000)])
def test_data(data: bytes | None) -> None:
    """Any bytes will do: how many fit is the connection's affair."""
    assert Reject(data=data).data == data


@pytest.mark.parametrize("value", [0, 0.0, 0.25, 3, math.inf, None], ids=repr)
def test_seconds(value: float | None) -> None:
    """Seconds are a number from zero up, or None."""
    assert Defer(after=value).after == value
    assert Defer(until_bytes=1, within=value).within == value


@pytest.mark.parametrize("name", ["after", "within"])
@pytest.mark.parametrize("value", [-1, -0.001, math.nan, -math.inf])
def test_seconds_out_of_range(name: str, value: float) -> None:
    """A negative time, or none at all, is refused."""
    hints: dict[str, Any] = {"until_bytes": 1, name: value}
    with pytest.raises(ValueError, match=f"{name} cannot be negative, got"):
        Defer(**hints)


@pytest.mark.parametrize("name", ["after", "within"])
@pytest.mark.parametrize("value", ["1", True, b"1", 1j, [1]], ids=repr)
def test_seconds_of_the_wrong_type(name: str, value: object) -> None:
    """What is no number, a bool among it, is refused."""
    hints: dict[str, Any] = {"until_bytes": 1, name: value}
    with pytest.raises(TypeError, match=f"{name} is a number of seconds or None, got"):
        Defer(**hints)


@pytest.mark.parametrize("value", [1, 1024, 16384, None])
def test_until_bytes(value: int | None) -> None:
    """`until_bytes` is a number of bytes from one up, or None."""
    assert Defer(until_bytes=value).until_bytes == value


@pytest.mark.parametrize("value", [0, -1, 16385])
def test_until_bytes_out_of_range(value: int) -> None:
    """To wait for less than one byte, or for more than can be peeked, is refused."""
    with pytest.raises(ValueError, match="until_bytes is from 1 to 16384, which can be peeked"):
        Defer(until_bytes=value)


@pytest.mark.parametrize("value", ["1", 1.0, True, b"1"], ids=repr)
def test_until_bytes_of_the_wrong_type(value: Any) -> None:
    """What is no whole number, a bool among it, is refused."""
    with pytest.raises(TypeError, match="until_bytes is a number of bytes or None, got"):
        Defer(until_bytes=value)


@pytest.mark.parametrize("within", [0, 1.5])
def test_within_needs_something_to_bound(within: float) -> None:
    """`within` without `until_bytes` is refused, and the message says what to do."""
    with pytest.raises(ValueError, match="give until_bytes too, or use after"):
        Defer(within=within)


@pytest.mark.parametrize(
    "verdict",
    [Accept("a"), Reject("r", b"d"), Defer(after=1, until_bytes=2, within=3, reason="w"), DEFER],
)
def test_verdicts_are_values(verdict: Any) -> None:
    """A verdict equals its copies, hashes alike, and survives pickling."""
    for other in (copy.copy(verdict), copy.deepcopy(verdict), pickle.loads(pickle.dumps(verdict))):  # noqa: S301 - made here
        assert other == verdict
        assert hash(other) == hash(verdict)
        assert repr(other) == repr(verdict)


@pytest.mark.parametrize("verdict", [Accept(), Reject(), Defer()])
def test_verdicts_cannot_be_changed(verdict: Any) -> None:
    """A verdict that was made stays as it is, and grows no attributes."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        verdict.reason = "another"
    with pytest.raises((attrs.exceptions.FrozenInstanceError, AttributeError)):
        verdict.another = 1

    assert verdict == type(verdict)()


def test_different_verdicts_differ() -> None:
    """Verdicts of different kinds, and those with other details, are not equal."""
    same = "because"
    assert len({Accept(same), Reject(same), Defer(reason=same), Accept(), ACCEPT}) == 5
    assert Reject(same) != Reject(same, b"")
    assert Defer(until_free=True) != Defer()
