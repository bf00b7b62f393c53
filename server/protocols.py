"""uvicorn's protocols with a deadline on what is sent: a peer that does not read is cut off.

Without one, whoever opens a stream or a download and reads nothing holds its place and its data for ever.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

SEND_SECONDS = 30.0  # in which a peer must take what one `send` gave


class _WriteDeadline(asyncio.Protocol):
    """Aborts the connection where data has waited for the peer for SEND_SECONDS, during a close as well."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        transport.set_write_buffer_limits(high=0)  # any byte that waits calls pause_writing
        super().connection_made(transport)

    def pause_writing(self) -> None:
        self._deadline = asyncio.get_running_loop().call_later(SEND_SECONDS, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._forget_deadline()
        super().resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(error)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class HTTPProtocol(_WriteDeadline, H11Protocol):
    pass


class WebSocketProtocol(_WriteDeadline, WebSocketsSansIOProtocol):
    pass
