"""Where connections come from."""

from __future__ import annotations

from condaccept.gates._gate import Gate as Gate
from condaccept.gates.handshake import HandshakeGate as HandshakeGate

__all__ = ("Gate", "HandshakeGate")
