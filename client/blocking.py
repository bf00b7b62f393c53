"""The live client for programs without asyncio: the same calls, each of which waits for its answer."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from functools import wraps
from types import TracebackType
from typing import Any

from client.live import Chunk, LiveClient, Place, Receipt


def _waits(method: Callable[..., Coroutine]) -> Callable[..., Any]:
    """A method of LiveClient as one that waits."""

    @wraps(method)
    def call(self: "BlockingLiveClient", *args: Any, **kwargs: Any) -> Any:
        return self._wait(method(self._live, *args, **kwargs))

    return call


class BlockingLiveClient:
    """LiveClient as a context manager and iterator of chunks of the ordinary kind. For one thread.

        with BlockingLiveClient("http://127.0.0.1:7860") as live:
            live.open("a red circle moves right", seconds=10)
            for chunk in live:
                ...

    Connection and stream run in a thread of their own, so that a program that computes between two chunks keeps both.
    """

    def __init__(self, url: str, key: str | None = None, *, paced: bool = False):
        self._live = LiveClient(url, key, paced=paced)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="live client", daemon=True)

    @property
    def hello(self) -> Mapping[str, Any]:
        return self._live.hello

    @property
    def takes(self) -> Mapping[int, Mapping[str, Any]]:
        return self._live.takes

    def __enter__(self) -> "BlockingLiveClient":
        self._thread.start()
        try:
            self._wait(self._live.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._wait(self._live.__aexit__(kind, error, trace))
        finally:
            self._end()

    open = _waits(LiveClient.open)
    set_prompt = _waits(LiveClient.set_prompt)
    set_seed = _waits(LiveClient.set_seed)
    set_schedule = _waits(LiveClient.set_schedule)
    set_image = _waits(LiveClient.set_image)
    pause = _waits(LiveClient.pause)
    resume = _waits(LiveClient.resume)
    seek = _waits(LiveClient.seek)
    branch = _waits(LiveClient.branch)
    describe = _waits(LiveClient.describe)
    close = _waits(LiveClient.close)
    shown = _waits(LiveClient.shown)
    upload = _waits(LiveClient.upload)

    def applied(self, receipt: Receipt) -> Place:
        """Wait until a control shows, and say from where on. After the chunk that shows it has been asked for."""
        return self._wait(_result(receipt.applied))

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        try:
            return self._wait(self._live.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def _wait(self, answer: Coroutine) -> Any:
        """Its result; a Ctrl-C while waiting gives it up."""
        running = asyncio.run_coroutine_threadsafe(answer, self._loop)
        try:
            return running.result()
        except BaseException:
            running.cancel()
            raise

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _result(applied: asyncio.Future[Place]) -> Place:
    return await asyncio.shield(applied)
