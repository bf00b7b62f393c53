"""Live video from a Diagonal Distillation server, in Python: `LiveClient`, on httpx and websockets alone.

    async with LiveClient("http://127.0.0.1:7860") as live:
        await live.open("a red circle moves right", seconds=10)
        async for chunk in live:
            ...  # chunk.data: a fragment of MP4; chunk.frame, chunk.frames: what it shows

`BlockingLiveClient` has the same calls for programs without asyncio. docs/live-protocol.md describes the protocol.
`python -m client.record` and `python -m client.steer` are examples.
"""

from client.blocking import BlockingLiveClient
from client.live import Chunk, LiveClient, LiveError, Place, Receipt, Refused, StreamEnded
from client.recorder import Recorder

__all__ = [
    "BlockingLiveClient", "Chunk", "LiveClient", "LiveError", "Place", "Receipt", "Recorder", "Refused", "StreamEnded",
]  # fmt: skip
