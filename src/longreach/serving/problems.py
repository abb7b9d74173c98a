"""Errors in OpenAI's shape: which status and which sentence an error gets, whoever raised it.

Knows FastAPI's errors and ours; not what was asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from longreach.serving import replies
from longreach.serving.limits import Limits
from longreach.serving.protocol import Missing, Refused, Taken
from longreach.serving.worker import Busy, Failed, Gone, Stopping, TooLong, Unfit

GONE = 499  # in logs only: the client has left
AGAIN = {"Retry-After": "1"}
NOT_AGAIN = {"x-should-retry": "false"}  # OpenAI's clients ask again at once otherwise
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error"}
OF_UNIONS = re.compile(r"(str|Part|constrained-.*|.*\[.*\])$")  # how pydantic names the kinds that a value may have
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": replies.ErrorAnswer, "description": what}
    for status, what in {
        400: "What is asked for cannot be; the sentence says why, and what can.", 401: "The API key is wrong or missing.",
        403: "Asked from the web page of another site.", 404: "There is no such thing.", 408: "It took too long.",
        413: "The request is too large.", 415: "The body is encoded.", 429: "Too many requests wait; come again after `Retry-After` seconds.",
        500: "The model failed.", 503: "The server is about to end.",
    }.items()
}  # fmt: skip

TAKEN: dict[int | str, dict[str, Any]] = {409: {"model": replies.ErrorAnswer, "description": "There is one of this name already, or it is being read."}}


@dataclass(frozen=True)
class Said:
    """An error as it is told."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return replies.ErrorAnswer(error=replies.Problem(message=self.message, type=kind, param=self.param, code=self.code)).model_dump()

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """In ASCII, for what is named may be no text."""
        more = AGAIN if self.status in (429, 503) else NOT_AGAIN if self.status in (408, 409, 500) else {}
        return Response(json.dumps(self.body()), self.status, {**more, **(headers or {})}, "application/json")


def said(error: Exception, limits: Limits) -> Said:
    """What is told of an error of ours."""
    match error:
        case Refused():
            return Said(400, str(error), error.param, error.code)
        case Missing():
            return Said(404, str(error), error.param, error.code)
        case Taken():
            return Said(409, str(error))
        case Busy():
            return Said(429, "too many requests wait for their answers; come again in a second", None, "rate_limit_exceeded")
        case Stopping():
            return Said(503, "the server is about to end; come again when it is back")
        case TooLong():
            return Said(408, f"the answer took longer than {limits.seconds:g} seconds; ask for fewer new tokens, or start the server with a larger --timeout")
        case Gone():
            return Said(GONE, "the client has left")
        case Unfit():
            return Said(400, str(error))
        case Failed():
            return Said(500, f"the model failed, and the server goes on: {error}")
        case _:
            return Said(500, "the server failed; its log says why")


def invalid(error: RequestValidationError) -> Said:
    """What is told of a request that is not of its shape. Of a value that could have been one of several things, what it almost was."""
    found = error.errors()
    same = [one for one in found if one["loc"][:2] == found[0]["loc"][:2]]
    first = max(same, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, Refused):
        return Said(400, str(cause), cause.param, cause.code)
    place = first["loc"][1:]
    where = ".".join(str(part) for n, part in enumerate(place) if n == 0 or not OF_UNIONS.match(str(part))) or None
    if first["type"] == "json_invalid" or where is None:
        return Said(400, f"the body is no JSON object ({cause or first['msg']}); send one, with Content-Type: application/json")
    if first["type"] == "extra_forbidden":
        return Said(400, f"unrecognized request argument supplied: {where}", where, "unknown_parameter")
    return Said(400, f"{where}: {first['msg'].removeprefix('Value error, ')}", where)


def attach(app: FastAPI, limits: Limits) -> None:
    """Every error leaves the application in this shape."""

    @app.exception_handler(RequestValidationError)
    async def of_shape(http: Request, error: RequestValidationError) -> Response:
        return invalid(error).response()

    @app.exception_handler(HTTPException)
    async def of_http(http: Request, error: HTTPException) -> Response:
        sentence = str(error.detail)
        if sentence == "Not Found":
            sentence = f"there is nothing at {http.url.path[:200]!r}; /openapi.json says what there is"
        elif sentence == "There was an error parsing the body":  # FastAPI's, of what Python's own parser raises
            sentence = "the body is JSON that nests too deep, has a number of thousands of digits, or is no UTF-8; send it without"
        elif sentence == "Method Not Allowed":
            sentence = f"{http.method} does nothing at {http.url.path[:200]!r}; /openapi.json says what does"
        return Said(error.status_code, sentence).response(error.headers)

    async def ours(http: Request, error: Exception) -> Response:
        return said(error, limits).response()

    for kind in (Refused, Missing, Taken, Busy, Stopping, TooLong, Failed, Gone, Exception):
        app.add_exception_handler(kind, ours)
