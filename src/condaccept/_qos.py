"""Quality of service: what a flow asks of the network, and what a SYN tells about a caller.

Pure: bytes in, values out.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import attrs

__all__ = ("ECN", "QOS", "FlowSpec", "Syn", "parse_syn")

ECN: Final = 0b11
"""The bits of the DS field's byte that belong to TCP itself (RFC 3168, 5)."""

BYTE: Final = 0xFF
_IPV4, _IPV6 = 4, 6
_IPV4_HEADER: Final = 20  # without options
_IPV6_HEADER: Final = 40
_TCP: Final = 6  # RFC 9293, 3.1, as the protocol of an IP header
_TCP_HEADER: Final = 20
_SYN: Final = 0x02
_ETHERNET_HEADER: Final = 14
_ETHERTYPES: Final = frozenset({b"\x08\x00", b"\x86\xdd"})
# RFC 8200, 4: hop-by-hop, routing and destination options say their length in units of
# eight bytes, the first not counted.
_EXTENSIONS: Final = frozenset({0, 43, 60})

# RFC 9293, 3.2, and RFC 7323: kinds of TCP options.
_SHORTEST: Final = 2  # an option with its kind and its length alone
_END, _NOTHING, _MSS, _WINDOW_SCALE, _SACK_PERMITTED, _TIMESTAMPS = 0, 1, 2, 3, 4, 8


@attrs.frozen
class FlowSpec:
    """What one direction of a connection asks of the network.

    Attributes:
        token_rate: Bytes per second, from 1 to 2**64 - 1; ``None``: not limited, or not
            known. Only what TCP sends is paced, so a short answer that fits into its
            first window goes out at once.
        service_type: The byte of the DS field, with the DSCP in its upper six bits, so 184
            (0xb8) for expedited forwarding; ``None``: as it is, or not known.

    Raises:
        TypeError, ValueError: A part is not what it should be, which the message says.

    Source: FLOWSPEC of Winsock's QOS; socket(7), SO_MAX_PACING_RATE; RFC 2474, 3.
    """

    token_rate: int | None = attrs.field(default=None)
    service_type: int | None = attrs.field(default=None)

    @token_rate.validator
    def _check_token_rate(self, _attribute: attrs.Attribute[Any], value: object) -> None:
        _check_integer("token_rate", value)
        if isinstance(value, int) and not 1 <= value < 2**64:
            message = f"token_rate is from 1 to 2**64 - 1 bytes per second, or None; got {value!r}"
            raise ValueError(message)

    @service_type.validator
    def _check_service_type(self, _attribute: attrs.Attribute[Any], value: object) -> None:
        _check_integer("service_type", value)
        if not isinstance(value, int):
            return
        if not 0 <= value <= BYTE:
            message = f"service_type is a byte, from 0 to 255, or None; got {value!r}"
            raise ValueError(message)
        if value & ECN:
            # The kernel would drop them without a word.
            message = (
                f"the two lowest bits of service_type are TCP's own, for ECN: pass "
                f"{value & ~ECN}, or DSCP << 2; got {value!r}"
            )
            raise ValueError(message)


def _check_integer(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        message = f"{name} is an integer or None, got {value!r}"
        raise TypeError(message)


@attrs.define
class QOS:
    """The quality of service of a pending connection, in both directions.

    Attributes:
        sending: What the condition wants for what this side sends; applied on ACCEPT.
            ``None``, as at the beginning of each offer, applies nothing.
        receiving: What the caller asked for, as its SYN tells; cannot be set. The token
            rate is always ``None``, since TCP has no word for it; the service type is
            ``None`` where the SYN was not saved.

    Source: lpSQOS of WSPAccept.
    """

    sending: FlowSpec | None = attrs.field(default=None)
    receiving: FlowSpec = attrs.field(
        factory=FlowSpec,
        validator=attrs.validators.instance_of(FlowSpec),
        on_setattr=attrs.setters.frozen,
    )

    @sending.validator
    def _check_sending(self, _attribute: attrs.Attribute[Any], value: object) -> None:
        if value is not None and not isinstance(value, FlowSpec):
            message = f"sending is a FlowSpec or None, got {value!r}"
            raise TypeError(message)


@attrs.frozen
class Syn:
    """What the segment that opened a connection said, as it came from the network.

    Whatever the caller chose freely is a hint: each of these can be forged by whoever can
    send from the caller's address.

    Attributes:
        ttl: The hops that were left when it came; the hop limit of IPv6.
        traffic_class: The byte of the DS field, with the two bits of ECN.
        flow_label: The flow label of IPv6; ``None`` for IPv4.
        window: The receive window, in bytes; a SYN's is never scaled.
        mss: The largest segment the caller takes, in bytes; ``None``: not said.
        window_scale: The shift count of later windows; ``None``: no scaling.
        sack_permitted: Whether selective acknowledgements were offered.
        timestamps: Whether timestamps were offered.
        options: The TCP options in their order, as ``(kind, data)``, up to the end of the
            list or the first that is malformed. Padding (kind 1) is among them.

    Source: RFC 791, 3.1; RFC 8200, 3; RFC 9293, 3.1 and 3.2; RFC 2018, 2; RFC 7323, 2 and 3.
    """

    ttl: int
    traffic_class: int
    flow_label: int | None
    window: int
    mss: int | None
    window_scale: int | None
    sack_permitted: bool
    timestamps: bool
    options: tuple[tuple[int, bytes], ...]


def parse_syn(raw: bytes) -> Syn | None:
    """Return what the headers of a SYN say; ``None`` if *raw* is anything else.

    *raw* is what TCP_SAVED_SYN gives: an IP header and a TCP header, without data. With 2
    for TCP_SAVE_SYN a header of Ethernet comes before them, and is passed over.

    The version is looked up in the headers themselves: an IPv4 caller of an IPv6 socket
    has sent an IPv4 header.
    """
    syn = _parse(raw)
    if syn is None and raw[_ETHERNET_HEADER - 2 : _ETHERNET_HEADER] in _ETHERTYPES:
        syn = _parse(raw[_ETHERNET_HEADER:])
    return syn


def _parse(raw: bytes) -> Syn | None:
    version = raw[0] >> 4 if raw else None
    if version == _IPV4 and len(raw) >= _IPV4_HEADER:
        start = (raw[0] & 0xF) * 4
        protocol, ttl, traffic_class, flow_label = raw[9], raw[8], raw[1], None
    elif version == _IPV6 and len(raw) >= _IPV6_HEADER:
        word: int = struct.unpack_from(">I", raw)[0]
        start, protocol = _skip_extensions(raw)
        ttl, traffic_class, flow_label = raw[7], word >> 20 & BYTE, word & 0xFFFFF
    else:
        return None
    if protocol != _TCP or start < _IPV4_HEADER or len(raw) < start + _TCP_HEADER:
        return None
    end = start + (raw[start + 12] >> 4) * 4
    # The two headers and nothing else: whatever was meant otherwise is not taken for a SYN.
    if end != len(raw) or not raw[start + 13] & _SYN:
        return None
    options = _options(raw[start + _TCP_HEADER :])
    said = dict(options)  # of two alike the last one counts, as for the kernel
    return Syn(
        ttl,
        traffic_class,
        flow_label,
        window=int.from_bytes(raw[start + 14 : start + 16], "big"),
        mss=_number(said, _MSS, 2),
        window_scale=_number(said, _WINDOW_SCALE, 1),
        sack_permitted=_SACK_PERMITTED in said,
        timestamps=_TIMESTAMPS in said,
        options=options,
    )


def _skip_extensions(raw: bytes) -> tuple[int, int]:
    """Return where the headers of IPv6 end, and what comes then."""
    start, protocol = _IPV6_HEADER, raw[6]
    while protocol in _EXTENSIONS and start + 1 < len(raw):
        protocol, start = raw[start], start + (raw[start + 1] + 1) * 8
    return start, protocol


def _options(raw: bytes) -> tuple[tuple[int, bytes], ...]:
    found: list[tuple[int, bytes]] = []
    at = 0
    while at < len(raw) and raw[at] != _END:
        if raw[at] == _NOTHING:
            found.append((_NOTHING, b""))
            at += 1
            continue
        length = raw[at + 1] if at + 1 < len(raw) else 0
        if length < _SHORTEST or at + length > len(raw):
            break
        found.append((raw[at], raw[at + 2 : at + length]))
        at += length
    return tuple(found)


def _number(options: dict[int, bytes], kind: int, size: int) -> int | None:
    data = options.get(kind)
    return None if data is None or len(data) != size else int.from_bytes(data, "big")
