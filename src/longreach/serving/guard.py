"""Who may ask, and what is noted of it: the API key, foreign web pages, slow bodies, a line in the log and a number for each request.

Knows HTTP headers and ASGI; not what is asked. No text of a request is logged here.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longreach.serving.limits import LOCAL, Limits
from longreach.serving.page import files
from longreach.serving.problems import Said

logger = logging.getLogger("longreach.serving")
OPEN = ("/health", *files.FILES)  # to everybody: a browser sends no key for a page


class Guard:
    """Wraps an application. `local`: it is bound to this machine only, so a request for another host's name comes from a web page that plays tricks with
    names. `note` gets the path of the route and the status of each answer."""

    def __init__(self, app: ASGIApp, key: str | None, local: bool, limits: Limits, note: Callable[[str, int], None]) -> None:
        self.app, self.local, self.limits, self.note = app, local, limits, note
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        number, begun, status = f"req_{secrets.token_hex(12)}", time.perf_counter(), 500
        facts: dict[str, Any] = {}
        scope.setdefault("state", {})["facts"] = facts

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", number.encode()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            refused = self._refused(scope["path"], Headers(scope=scope))
            await (refused or self.app)(scope, receive if refused else self._limited(receive), answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.note(route, status)
            said: dict[str, Any] = {"request": number, "method": scope["method"], "route": route, "status": status, **facts}
            logger.info("answered", extra={"said": {**said, "seconds": round(time.perf_counter() - begun, 4)}})

    def _refused(self, path: str, headers: Headers) -> Response | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            said = "are not taken; ask from a program, or from this server's own page"
            return Said(403, f"requests from the web pages of {origin[:100]!r} {said}").response()
        if self.local and _name(host) not in LOCAL:
            return Said(403, f"this server is for its own machine, and goes by {', '.join(LOCAL)}; not by {host[:100]!r}").response()
        if self._key is not None and path not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode("utf-8", "replace"), self._key):
                said = "pass the server's API key in the header 'Authorization: Bearer KEY'"
                return Said(401, f"the API key is wrong or missing; {said}", None, "invalid_api_key").response({"WWW-Authenticate": "Bearer"})
        if (coding := headers.get("content-encoding", "identity")).strip().lower() not in ("identity", ""):
            return Said(415, f"a body in the Content-Encoding {coding[:100]!r} is not taken; send it as it is, and leave out the header").response()
        if "transfer-encoding" in headers and "content-length" in headers:  # a proxy may take the other one for true, and a part of the body for a request
            return Said(400, "a request has a Transfer-Encoding or a Content-Length, not both; leave one out").response({"Connection": "close"})
        with suppress(ValueError):
            if int(headers.get("content-length", "0")) > self.limits.body:
                return Said(413, self._too_large).response()
        return None

    @property
    def _too_large(self) -> str:
        return f"the request is larger than the {self.limits.body} bytes that this server takes; send less, or start it with a larger --max-body"

    def _limited(self, receive: Receive) -> Callable[[], Awaitable[Message]]:
        """The same, where the whole of a request must come in time and not be too large."""
        end, left, whole = time.perf_counter() + self.limits.body_seconds, self.limits.body, False

        async def received() -> Message:
            nonlocal whole, left
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.perf_counter()))
            except TimeoutError:
                raise HTTPException(408, f"the request did not arrive within {self.limits.body_seconds:g} seconds; send it at once") from None
            whole = not message.get("more_body", False)
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, self._too_large)
            return message

        return received


def _name(host: str) -> str | None:
    """The name in a Host header."""
    with suppress(ValueError):
        return urlsplit(f"//{host}").hostname
    return None
