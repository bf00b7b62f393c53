"""Middleware: access control, limits of request bodies, response headers."""

import asyncio
import re
from collections.abc import Mapping
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access import NOBODY, AccessPolicy
from server.errors import ApiError

POLICY = 1008  # close code of RFC 6455
BODY_SECONDS = 30.0  # for receiving a body
MAX_BODY = 64 * 1024  # bytes, by default
MAX_DRAINED = 64 * 2**20  # bytes read of a refused body
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Access:
    """Refuses requests without access; sets `scope["state"]["owner"]`.

    open_paths, open_folders: need no key; only Host and Origin are checked.
    """

    def __init__(
        self, app: ASGIApp, policy: AccessPolicy, open_paths: tuple[str, ...] = (), open_folders: tuple[str, ...] = ()
    ):
        self.app, self.policy, self.open_paths, self.open_folders = app, policy, open_paths, open_folders

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        try:
            self.policy.check_place(headers)
            is_open = scope["path"] in self.open_paths or scope["path"].startswith(self.open_folders)
            owner = NOBODY if is_open else self.policy.owner(headers)
        except ApiError as error:
            if scope["type"] == "http":
                return await error.response()(scope, receive, send)
            await receive()
            await send({"type": "websocket.accept"})  # browsers show the reason of a close, but not an HTTP status
            return await send({"type": "websocket.close", "code": POLICY, "reason": error.message[:120]})
        scope.setdefault("state", {})["owner"] = owner
        await self.app(scope, receive, send)


class BoundedBodies:
    """Refuses bodies that are too large or too slow, before or while they are received.

    large: patterns of paths with another limit, and the limit in bytes.
    """

    def __init__(self, app: ASGIApp, large: Mapping[str, int]):
        self.app, self.large = app, large

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        patterns = (pattern for pattern in self.large if re.fullmatch(pattern, scope["path"]))
        most = self.large.get(next(patterns, ""), MAX_BODY)
        too_much = ApiError(413, f"the body has more than {most:,} bytes; send less", code="too_large")
        deadline, arrived, complete = asyncio.get_running_loop().time() + BODY_SECONDS, 0, False

        async def bounded() -> Message:
            nonlocal arrived, complete
            if complete:  # only the end of the connection follows, which may take as long as the response
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                sentence = f"the body took more than {BODY_SECONDS:g} s to arrive; send less"
                raise ApiError(408, sentence, code="too_slow", headers={"Connection": "close"}) from error
            arrived += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if arrived > most:
                await drain()
                raise too_much
            return message

        async def drain() -> None:
            """Receive and drop the rest, because a client that is cut off while sending does not read the response."""
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    size, more = arrived, not complete
                    while more and size < MAX_DRAINED:
                        message = await receive()
                        size += len(message.get("body", b""))
                        more = message.get("more_body", False)

        stated = Headers(scope=scope).get("content-length", "0")
        if not stated.isdecimal() or int(stated[:20]) > most:
            await drain()
            return await too_much.response()(scope, receive, send)
        await self.app(scope, bounded, send)


class AnswerHeaders:
    """Adds HEADERS to responses that lack them. content_policies: by path, if different."""

    def __init__(self, app: ASGIApp, content_policies: Mapping[str, str]):
        self.app, self.content_policies = app, content_policies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if (policy := self.content_policies.get(scope["path"])) is not None:
                    headers["Content-Security-Policy"] = policy
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, with_headers)
