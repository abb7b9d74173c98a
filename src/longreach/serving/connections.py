"""uvicorn's HTTP, where nobody keeps a connection for nothing: who sends no request, or takes nothing of what is sent, is let go.

uvicorn waits for the first request of a connection as long as it takes, and a transport that is closed waits until its client has read what was written. Knows
uvicorn and asyncio's transports; not requests.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE = 15.0  # seconds without a whole head of a request
SILENT = 5.0  # seconds in which a client takes nothing of the end of an answer


class Connection(H11Protocol):
    """A connection of a client. `idle`, `silent`: those seconds."""

    idle, silent = IDLE, SILENT

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Closing(transport, self.loop, self.silent))  # type: ignore[arg-type]
        self._before: Any = None  # the last request, where it was answered when this was looked at
        self._watch = self.loop.call_later(self.idle, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        answered = self.cycle is None or self.cycle.response_complete
        if answered and self.cycle is self._before:
            self.transport.close()
            return
        self._before = self.cycle if answered else self
        self._watch = self.loop.call_later(self.idle, self._look)


class Closing:
    """A transport whose end does not wait for a client that does not read: what was written still goes to one that takes some of it every few seconds."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, silent: float) -> None:
        self._transport, self._loop, self._silent = transport, loop, silent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._transport.close()
        self._wait()

    def _wait(self) -> None:
        if left := self._transport.get_write_buffer_size():
            self._loop.call_later(self._silent, self._look, left)

    def _look(self, before: int) -> None:
        if self._transport.get_write_buffer_size() >= before:
            self._transport.abort()
        else:
            self._wait()
