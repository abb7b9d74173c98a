"""The HTTP interface: OpenAI's routes over a service, and errors in their shape.

Knows FastAPI, and which answer belongs to which request; what is computed, and how, is the service's.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from longreach.serving import problems, replies
from longreach.serving.asking import Prompts
from longreach.serving.guard import OPEN, Guard
from longreach.serving.limits import Limits
from longreach.serving.page import routes
from longreach.serving.protocol import ChatRequest, CompletionRequest, DocumentName, DocumentRequest, Missing, Sampled, TokenizeRequest
from longreach.serving.service import Service, Tally
from longreach.serving.worker import Asked, Failed, Gone, Piece, Stopping, TooLong
from longreach.serving.writing import Chat, Plain, Shape, event
from longreach.version import __version__

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "With stream=true, server-sent events.", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
}
LAST = 1.0  # seconds for the event that says that it took too long
METRICS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def application(service: Service, key: str | None = None, local: bool = True) -> FastAPI:
    """The application that serves it.

    key    what clients must send as `Authorization: Bearer KEY`; None: nothing.
    local  it is bound to this machine alone.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="Longreach",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # a page that takes its scripts from elsewhere
        redoc_url=None,
        responses=problems.DOCUMENTED,
        redirect_slashes=False,
    )
    app.add_middleware(
        Guard, key=key, local=local, limits=service.limits, note=lambda path, status: service.metrics.answered.labels(path, str(status)).inc()
    )
    problems.attach(app, service.limits)
    routes.attach(app, service)

    def require_model(name: str | None) -> None:
        if name not in (None, service.name):
            raise Missing(f"there is no model {name!r} here; pass {service.name!r}, or leave out model", "model", "model_not_found")

    @app.get("/health")
    async def health() -> replies.Health:
        if not service.worker.alive:
            raise Stopping
        return replies.Health()

    @app.get("/metrics", response_class=Response, responses=METRICS)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> replies.Models:
        return replies.Models(data=[service.model()])

    @app.get("/v1/models/{name:path}")
    async def model(name: Annotated[str, Path(max_length=500)]) -> replies.Model:
        require_model(name)
        return service.model()

    @app.post("/tokenize")
    async def tokenize(request: TokenizeRequest, http: Request) -> replies.Tokens:
        require_model(request.model)
        async with admitted(http, 1) as asked:
            return await service.worker.prepared(asked, service.tokens(request))

    @app.get("/v1/documents")
    async def documents() -> replies.Documents:
        return replies.Documents(data=service.documents.all())

    @app.post("/v1/documents", status_code=201, responses=problems.TAKEN)
    async def upload(request: DocumentRequest, http: Request) -> replies.Document:
        async with admitted(http, 1, progress=True) as asked:
            return await service.documents.add(request, asked)

    @app.get("/v1/documents/{name}")
    async def one(name: DocumentName) -> replies.Document:
        return service.documents.one(name)

    @app.delete("/v1/documents/{name}", responses=problems.TAKEN)
    async def delete(name: DocumentName) -> replies.Deleted:
        return await service.documents.remove(name)

    @app.post("/v1/completions", response_model=replies.Completion, responses=STREAMED)
    async def completions(request: CompletionRequest, http: Request) -> Any:
        require_model(request.model)
        return await answered(http, request, service.completion(request), Plain)

    @app.post("/v1/chat/completions", response_model=replies.ChatCompletion, responses=STREAMED)
    async def chat(request: ChatRequest, http: Request) -> Any:
        require_model(request.model)
        return await answered(http, request, service.chat(request), Chat)

    @asynccontextmanager
    async def admitted(http: Request, count: int, progress: bool = False) -> AsyncIterator[Asked]:
        async with service.admitted(count, progress) as asked:
            watched = asyncio.create_task(_until_gone(http, service, asked))
            try:
                yield asked
            finally:
                watched.cancel()

    async def answered(http: Request, request: Sampled, made: Coroutine[Any, Any, Prompts], kind: type[Plain] | type[Chat]) -> Any:
        head = {"id": kind.prefix + secrets.token_hex(12), "created": int(time.time()), "model": service.name, "system_fingerprint": service.fingerprint}
        async with AsyncExitStack() as stack:
            stack.callback(made.close)
            asked = await stack.enter_async_context(admitted(http, request.answers))
            prompts = await service.worker.prepared(asked, made)
            shape = Plain(service.spell, prompts.logprobs, asked.count) if kind is Plain else Chat(service.spell, prompts.logprobs)
            tally = await stack.enter_async_context(service.begun(asked, prompts))
            stack.callback(lambda: http.scope["state"]["facts"].update(tally.facts()))
            pieces = service.pieces(asked, tally, prompts.n)
            if request.stream:
                return Events(stack.pop_all(), _events(head, request, asked, tally, pieces, shape, service.limits), asked.since + service.limits.seconds + LAST)
            own: list[list[Piece]] = [[] for _ in prompts.samplings]
            async for piece in pieces:
                own[piece.index].append(piece)
            return shape.answer({**head, "object": shape.whole}, own, tally.usage())

    document = app.openapi

    def openapi() -> dict[str, Any]:
        """What FastAPI writes of the routes, without the answer to what is not of its shape that is not ours, and with the key that they need."""
        found = document()
        for path, operations in found["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if key is not None and path in OPEN:
                    operation["security"] = []
        if key is not None:
            found.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "The server's API key."}}
            found["security"] = [{"key": []}]
        return found

    app.openapi = openapi  # type: ignore[method-assign]
    return app


class Events(StreamingResponse):
    """An answer as server-sent events. `kept` is left when it ends, however it does. `end`: by the loop's clock; a client that does not
    read what is sent to it is not waited for any longer."""

    def __init__(self, kept: AsyncExitStack, events: AsyncIterator[bytes], end: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._kept, self._end = kept, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._kept:
            with suppress(TimeoutError):  # uvicorn closes the connection of an answer that is not whole
                async with asyncio.timeout_at(self._end):
                    await super().__call__(scope, receive, send)


async def _events(
    head: dict[str, Any], request: Sampled, asked: Asked, tally: Tally, pieces: AsyncIterator[Piece], shape: Shape, limits: Limits
) -> AsyncIterator[bytes]:
    head = {**head, "object": shape.part}
    usage: dict[str, Any] = {"usage": None} if request.wants_usage else {}
    for index in range(asked.count):
        if (choice := shape.begin(index)) is not None:
            yield event({**head, "choices": [choice], **usage})
    try:
        async for piece in pieces:
            if piece.text or piece.finish is not None or shape.logprobs is not None:
                yield event({**head, "choices": [shape.chunk(piece)], **usage})
    except Gone:
        return
    except (Failed, Stopping, TooLong) as error:
        yield event(problems.said(error, limits).body())
        return
    if usage:
        yield event({**head, "choices": [], "usage": tally.usage().model_dump()})
    yield event("[DONE]")


async def _until_gone(http: Request, service: Service, asked: Asked) -> None:
    """Tells those who wait for an answer when its client has left. The request itself was received before. After the end of an answer the same is received."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    if asked.left:
        return
    service.metrics.cancelled.inc()
    service.worker.end(asked, Gone())
