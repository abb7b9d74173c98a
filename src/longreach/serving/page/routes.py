"""The page's routes: its files, and as JSON what it shows beside answers: how much memory is taken, what a method sees, a text to begin with.

Knows FastAPI and the service. What the page asks the model goes through the same routes as everybody's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI, Query, Response
from pydantic import BaseModel, Field

from longreach.memory.pooled import Tiers
from longreach.methods import registry
from longreach.methods.base import Method
from longreach.planning import dial
from longreach.running import prompts
from longreach.running.loading import shipped_book
from longreach.serving.page import files, seen
from longreach.serving.protocol import Missing
from longreach.serving.service import Service

DIAL = "dial"  # stands for the method that it chooses
SAMPLE = "The pass key is 48213. Remember it. 48213 is the pass key."
QUESTION = "What is the pass key?"
LONGEST_SAMPLE = 16_384  # tokens
SHARE = 0.75  # of the context


class Place(BaseModel):
    name: str
    bytes: int
    budget: int | None = Field(description="null: there is no limit.")


class State(BaseModel):
    """How the server is doing."""

    running: int
    waiting: int
    read: int = Field(description="Tokens of prompts, since the beginning.")
    memory: list[Place]


class MethodFacts(BaseModel):
    name: str
    recalls: str
    served: bool = Field(description="It is the one in force.")


class Methods(BaseModel):
    data: list[MethodFacts]


class Sight(BaseModel):
    """What a method sees of a text."""

    method: dict[str, Any]
    brief: str
    recalls: str
    served: bool
    tokens: int
    trained_window: int
    capacity: int | None = Field(description="The largest text with trained distances only; null: there is no limit.")
    rescales: bool = Field(description="It changes the frequencies at which these distances are encoded.")
    chosen: int | None = Field(description="Keys that a query sees at most of those that are drawn, chosen by content; null: all of them.")
    distances: list[list[float | None]] = Field(description="Of some queries to stretches of keys; null: not visible.")
    last: list[float | None] = Field(description="Of the last token, in finer stretches.")
    command: str = Field(description="What serves the model with it.")


class Look(BaseModel):
    """What it sees, or why the method has no setting for such a length."""

    sight: Sight | None = None
    problem: str | None = None


class Sample(BaseModel):
    text: str
    question: str


def attach(app: FastAPI, service: Service) -> None:
    for path, name in files.FILES.items():
        app.add_api_route(path, _file(name), methods=["GET", "HEAD"], include_in_schema=False)

    @app.get("/page/state")
    async def state() -> State:
        stats, memory = service.worker.stats, service.extension.forward.memory
        places = [Place(name="device", bytes=stats.held, budget=stats.budget)]
        if isinstance(memory, Tiers):  # whose bookkeeping belongs to the worker
            report = await service.worker.do(lambda scheduler: memory.report())
            places = [Place(name=name, bytes=one["bytes"], budget=one["budget"]) for name, one in report["tiers"].items()]
        return State(running=stats.running, waiting=stats.waiting, read=stats.read, memory=places)

    @app.get("/page/methods")
    async def methods() -> Methods:
        own = service.extension.method.name
        return Methods(data=[MethodFacts(name=name, recalls=kind.recalls, served=name == own) for name, kind in registry().items()])

    @app.get("/page/sight")
    def sight(tokens: Annotated[int, Query(ge=1, le=seen.MOST_TOKENS)], method: Annotated[str | None, Query(max_length=100)] = None) -> Look:
        """Of the method in force; of another one, with the setting that its authors recommend for a text of so many tokens; or of `dial`, what the dial
        would choose for it."""
        return look(service, method, tokens)

    @app.get("/page/sample")
    def sample() -> Sample:
        """A part of the book that comes with the package, with a key hidden in it."""
        tokens = min(LONGEST_SAMPLE, int(SHARE * (service.room.context or LONGEST_SAMPLE)))
        book = shipped_book()[: 3 * tokens]  # a token of English has three characters and more
        return Sample(text=prompts.hide(book, SAMPLE, 0.3), question=QUESTION)


def _file(name: str) -> Callable[[], Response]:
    data = files.content(name)

    def send() -> Response:
        return Response(data, media_type=files.kind(name), headers=files.HEADERS)

    return send


def look(service: Service, name: str | None, tokens: int) -> Look:
    extension = service.extension
    window, own = extension.facts.chosen.window, extension.method
    served, method = name is None or name == own.name, own
    if not served:
        try:
            method = dial.choose(window, tokens).method if name == DIAL else dial.recommended(_kind(str(name)), window, tokens)
        except ValueError as error:
            return Look(problem=str(error))
    choice = method.choice
    sight = Sight(
        method=method.to_json(),
        brief=method.brief(),
        recalls=method.known,
        served=served,
        tokens=tokens,
        trained_window=window.tokens,
        capacity=method.capacity(window.tokens),
        rescales=method.rescales,
        chosen=None if choice is None else choice.keep * choice.block,
        distances=seen.picture(method, tokens),
        last=seen.strip(method, tokens),
        command=command(service.name, method, extension.context if served else tokens),
    )
    return Look(sight=sight)


def _kind(name: str) -> type[Method]:
    kind = registry().get(name)
    if kind is None:
        raise Missing(f"there is no method {name!r}; /page/methods lists them", "method", "method_not_found")
    return kind


def command(model: str, method: Method, context: int | None) -> str:
    """What serves a model with a method. `MODEL` stands for a model that is not known by its name alone."""
    declared = [] if context is None else ["--context", str(context)]
    return " ".join(["longreach serve --model", model if model == "nano" else "MODEL", *declared, "--method", *method.options()])
