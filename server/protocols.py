"""uvicorn's protocols with timeouts for peers that do not read, or do not complete their headers.

Without them, an idle peer would keep its connection, stream or download, and the buffered data, for ever. Bodies have a
timeout in server/middleware.py.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from server.limits import MAX_MESSAGE

SEND_SECONDS = 30.0  # for a peer to receive the data of one `send`
HEADER_SECONDS = 10.0  # for the request line and headers, from the connection or their first byte
MAX_CONNECTIONS = 500  # a process may usually open 1,024 files


class _Deadline:
    """At most one timer that aborts the connection."""

    _timer: asyncio.TimerHandle | None = None

    def start(self, seconds: float, transport: asyncio.Transport) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, transport.abort)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _WriteDeadline(asyncio.Protocol):
    """Aborts the connection where data has waited for the peer for SEND_SECONDS, during a close as well."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._unread = _Deadline()
        transport.set_write_buffer_limits(high=0)  # any byte that waits calls pause_writing
        super().connection_made(transport)

    def pause_writing(self) -> None:
        self._unread.start(SEND_SECONDS, self.transport)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._unread.stop()
        super().resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._unread.stop()
        super().connection_lost(error)


class HTTPProtocol(_WriteDeadline, H11Protocol):
    """With a deadline for headers, and a bound on connections."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._headers = _Deadline()
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            return transport.abort()
        self._headers.start(HEADER_SECONDS, transport)

    def data_received(self, data: bytes) -> None:
        self._headers.start(HEADER_SECONDS, self.transport)
        super().data_received(data)  # which begins a request, or hands over to the WebSocket, once headers are complete
        if self.cycle is not None and not self.cycle.response_complete:
            self._headers.stop()

    def send_400_response(self, msg: str) -> None:
        """What arrived is no HTTP. A request that runs, whose body it was, gets no more and answers nothing."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                return self.transport.close()
        super().send_400_response(msg)

    def handle_websocket_upgrade(self, event: object) -> None:
        self._headers.stop()
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        self._headers.stop()  # the next request has its own; until it begins, uvicorn's keep-alive counts
        super().on_response_complete()

    def connection_lost(self, error: Exception | None) -> None:
        self._headers.stop()
        super().connection_lost(error)


class WebSocketProtocol(_WriteDeadline, WebSocketsSansIOProtocol):
    pass


# Of uvicorn: no log of requests, and no compression, which makes video no smaller.
SOCKET = {
    "http": HTTPProtocol,
    "ws": WebSocketProtocol,
    "ws_per_message_deflate": False,
    "ws_max_size": MAX_MESSAGE,
    "ws_max_queue": 16,
    "access_log": False,
    "log_level": "error",
    "server_header": False,
}
