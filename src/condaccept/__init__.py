"""Conditional accept for asyncio: ask a condition before a connection gets in.

::

    import condaccept
    from condaccept import ACCEPT, DEFER, REJECT

    async def main():
        async with await condaccept.listen("127.0.0.1", 7007) as listener:
            while True:
                try:
                    stream = await listener.accept(lambda pending: ACCEPT)
                except condaccept.ConnectionRejectedError:
                    continue
                ...

The model is Winsock's WSPAccept. Start reading at `Listener.accept()`.
"""

from __future__ import annotations

from condaccept._capacity import Limit as Limit
from condaccept._capacity import Slots as Slots
from condaccept._delivery import EventRecord as EventRecord
from condaccept._events import Event as Event
from condaccept._events import EventCallback as EventCallback
from condaccept._events import Outcome as Outcome
from condaccept._events import Subscription as Subscription
from condaccept._exhaustion import Episode as Episode
from condaccept._group import StreamGroup as StreamGroup
from condaccept._inherited import inherited_sockets as inherited_sockets
from condaccept._inherited import receive_sockets as receive_sockets
from condaccept._inherited import send_listener as send_listener
from condaccept._ledger import Statistics as Statistics
from condaccept._listen import listen as listen
from condaccept._listener import Listener as Listener
from condaccept._pending import CalleeData as CalleeData
from condaccept._pending import Condition as Condition
from condaccept._pending import Credentials as Credentials
from condaccept._pending import PendingTransport as PendingTransport
from condaccept._pending import Status as Status
from condaccept._qos import QOS as QOS
from condaccept._qos import FlowSpec as FlowSpec
from condaccept._qos import Syn as Syn
from condaccept._serving import Streams as Streams
from condaccept._shutdown import Leftovers as Leftovers
from condaccept._stream import Stream as Stream
from condaccept._verdict import Accept as Accept
from condaccept._verdict import AnyVerdict as AnyVerdict
from condaccept._verdict import Defer as Defer
from condaccept._verdict import Reject as Reject
from condaccept._verdict import Verdict as Verdict
from condaccept.exceptions import AcceptError as AcceptError
from condaccept.exceptions import AcceptInProgressError as AcceptInProgressError
from condaccept.exceptions import AcceptInterruptedError as AcceptInterruptedError
from condaccept.exceptions import BuffersExhaustedError as BuffersExhaustedError
from condaccept.exceptions import CalleeDataError as CalleeDataError
from condaccept.exceptions import ConditionNotCallableError as ConditionNotCallableError
from condaccept.exceptions import ConnectionDeferredError as ConnectionDeferredError
from condaccept.exceptions import ConnectionRejectedError as ConnectionRejectedError
from condaccept.exceptions import DescriptorsExhaustedError as DescriptorsExhaustedError
from condaccept.exceptions import InvalidGroupError as InvalidGroupError
from condaccept.exceptions import InvalidVerdictError as InvalidVerdictError
from condaccept.exceptions import ListenerClosedError as ListenerClosedError
from condaccept.exceptions import NetworkDownError as NetworkDownError
from condaccept.exceptions import NoPendingError as NoPendingError
from condaccept.exceptions import NotASocketError as NotASocketError
from condaccept.exceptions import NotListeningError as NotListeningError
from condaccept.exceptions import NotStreamSocketError as NotStreamSocketError
from condaccept.exceptions import PendingExpiredError as PendingExpiredError
from condaccept.exceptions import PendingResetError as PendingResetError
from condaccept.exceptions import QualityOfServiceError as QualityOfServiceError

ACCEPT = Verdict.ACCEPT
REJECT = Verdict.REJECT
DEFER = Verdict.DEFER

__all__ = (
    "ACCEPT",
    "DEFER",
    "QOS",
    "REJECT",
    "Accept",
    "AcceptError",
    "AcceptInProgressError",
    "AcceptInterruptedError",
    "AnyVerdict",
    "BuffersExhaustedError",
    "CalleeData",
    "CalleeDataError",
    "Condition",
    "ConditionNotCallableError",
    "ConnectionDeferredError",
    "ConnectionRejectedError",
    "Credentials",
    "Defer",
    "DescriptorsExhaustedError",
    "Episode",
    "Event",
    "EventCallback",
    "EventRecord",
    "FlowSpec",
    "InvalidGroupError",
    "InvalidVerdictError",
    "Leftovers",
    "Limit",
    "Listener",
    "ListenerClosedError",
    "NetworkDownError",
    "NoPendingError",
    "NotASocketError",
    "NotListeningError",
    "NotStreamSocketError",
    "Outcome",
    "PendingExpiredError",
    "PendingResetError",
    "PendingTransport",
    "QualityOfServiceError",
    "Reject",
    "Slots",
    "Statistics",
    "Status",
    "Stream",
    "StreamGroup",
    "Streams",
    "Subscription",
    "Syn",
    "Verdict",
    "inherited_sockets",
    "listen",
    "receive_sockets",
    "send_listener",
)
