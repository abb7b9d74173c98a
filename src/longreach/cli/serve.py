"""`longreach serve`: a model for many clients at once, over HTTP and in the words of OpenAI's API.

Knows the options and how a server begins and ends; what is served is in the room `serving`.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longreach import files
from longreach.cli import common, fitting, profiles, stored
from longreach.cli.common import Output
from longreach.quantities import CHUNK_SIZE, byte_count, counted, seconds_of
from longreach.serving.limits import LOCAL, Limits

if TYPE_CHECKING:
    from longreach.hf.extension import Extension
    from longreach.hf.interfaces import CausalLM
    from longreach.serving.service import Service

TAKES_METHOD_PARAMETERS = True
CONNECTIONS = 1024  # that are open at a time
BACKLOG = 2048  # connections that wait to be taken, as uvicorn has it
PACKAGES = ("fastapi", "uvicorn", "pydantic", "prometheus_client")


@dataclass(frozen=True)
class Options:
    """How the server listens, steps and ends. `budget`: bytes of keys and values; None: the usual ones. `reserve`: see `Scheduler`."""

    host: str
    api_key: str | None
    step_ms: int
    drain: float
    budget: int | None
    reserve: float
    documents: Path | None


def size(text: str) -> int:
    """ "16MiB" -> bytes."""
    return common.parsed(byte_count, text, "it")


def time(text: str) -> float:
    """ "90s", "10m" or "1h" -> seconds."""
    return common.parsed(seconds_of, text, "it")


def command(
    context: typer.Context,
    model: common.Model = "nano",
    declared: common.Context = None,
    method: common.MethodName = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen at; other machines reach 0.0.0.0.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option("--name", help="What clients call the model; by default the last part of --model.")] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="LONGREACH_API_KEY", help="What clients must send; better in the variable LONGREACH_API_KEY.")
    ] = None,
    documents: Annotated[
        Path | None, typer.Option("--documents", help="Keep texts that clients upload in this folder, read once and asked any number of times.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer to a chat request that names no other.")] = 1024,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Answers that may be on their way at a time; more requests get 429.")] = 64,
    max_body: Annotated[Any, typer.Option("--max-body", parser=size, metavar="SIZE", help="The largest request, such as 16MiB.")] = "16MiB",
    timeout: Annotated[Any, typer.Option("--timeout", parser=time, metavar="TIME", help="The longest time for an answer, such as 10m.")] = "10m",
    drain: Annotated[Any, typer.Option("--drain", parser=time, metavar="TIME", help="How long answers may go on after SIGTERM or Ctrl-C.")] = "30s",
    kv_budget: Annotated[
        Any,
        typer.Option("--kv-budget", parser=size, metavar="SIZE", help="Keys and values of all requests together; half of the free memory if not given."),
    ] = None,
    reserve: Annotated[
        float,
        typer.Option("--reserve", min=0, max=1, help="Share of an answer's tokens that room is kept for. Below 1 more are served, some by way of the disk."),
    ] = 1.0,
    step_ms: Annotated[
        int, typer.Option("--step-ms", min=1, help="Milliseconds of one forward: the chunks of prompts are so short, while others wait for their next token.")
    ] = 500,
    dtype: common.Dtype = None,
    device: common.Device = None,
    trained_window: common.TrainedWindow = None,
    profile: common.ProfileFile = None,
    no_profile: common.NoProfile = False,
    memory: common.Memory = None,
    engine: Annotated[
        Literal["longreach", "vllm"], typer.Option("--engine", help="vllm: hand over to `vllm serve` with the same method; see docs/vllm.md.")
    ] = "longreach",
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Serve a model to OpenAI's clients: completions, chat, streaming; see docs/serving.md. Needs pip install 'longreach\\[serve]'.

    Without --context and --method, the context is the trained window. Parameters of a method are options too: see `longreach methods`.
    """
    with common.output(as_json, verbose, quiet) as out:
        if engine == "vllm":
            from longreach.cli import serve_vllm

            serve_vllm.refuse(context)
            profiles.asked(profile, no_profile, chosen := common.method_of(context, method))
            wanted = serve_vllm.Wanted(model, name or called(model), declared, chosen, trained_window, profile, dtype, host, port)
            warn_if_open(out, host, serve_vllm.key_of(api_key))
            serve_vllm.hand_over(out, wanted, api_key)
            return
        if lacking := [package.replace("_", "-") for package in PACKAGES if find_spec(package) is None]:
            raise ValueError(f"serving needs {' and '.join(lacking)}; pip install 'longreach[serve]'")

        folder = None if documents is None else files.folder(documents, "folder for documents")
        limits = Limits(body=max_body, waiting=queue, seconds=timeout, answer=max_new_tokens)
        chosen = common.method_of(context, method)
        by_profile = profiles.asked(profile, no_profile, chosen, model=model)
        if memory is not None and kv_budget is not None:
            raise ValueError("--memory has budgets of its own; leave out --kv-budget")
        warn_if_open(out, host, api_key)
        with listening(host, port) as where, common.quiet_transformers(verbose):
            loaded, tokenizer = common.load_model(out, model, dtype, device)
            with attached(out, loaded, stored.Choice(chosen, declared, trained_window, CHUNK_SIZE, by_profile, memory)) as extension:
                stored.announce(out, extension)
                serve(out, extension, tokenizer, name or called(model), limits, where, Options(host, api_key, step_ms, drain, kv_budget, reserve, folder))


def warn_if_open(out: Output, host: str, api_key: str | None) -> None:
    """Whoever serves, this or vLLM: say it where anybody may ask."""
    if host not in LOCAL and api_key is None:
        out.warn(f"{host} may be reached from other machines, and anybody there may ask; pass --api-key KEY (or LONGREACH_API_KEY), or leave out --host")


def called(model: str) -> str:
    """What clients call a model: the id of a Hub, or the last part of a path."""
    path = Path(model).expanduser()
    return (path.stem if path.suffix.lower() == ".gguf" else path.resolve().name) if path.exists() else model


def listening(host: str, port: int) -> socket.socket:
    """The socket. A port that others have is known before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family, kind, protocol)
        if sys.platform != "win32":
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"{host} port {port} cannot be listened at ({reason}); pass another --port, 0 for any that is free, or another --host") from error
    return found


def attached(out: Output, model: CausalLM, choice: stored.Choice) -> Extension:
    """The method in force for all requests; by default that of the trained window."""
    import longreach

    window, limit = fitting.limits(model, choice)
    context = choice.context
    if context is None and choice.method is None:
        context = window
        out.note(f"the context is the trained window of {counted(window, 'token')}; --context N serves a longer one")
    profile = profiles.find(out, choice.profile, model, choice.method, context, choice.trained_window)
    return longreach.extend(model, choice.method, context=context or limit, trained_window=choice.trained_window, profile=profile, memory=choice.memory)


def serve(out: Output, extension: Extension, tokenizer: Any, name: str, limits: Limits, where: socket.socket, options: Options) -> None:
    """Serve until SIGTERM or Ctrl-C, then let answers end. Who is moved out to make room lies in a folder that goes with the server."""
    from longreach.serving.room import usual_budget
    from longreach.serving.scheduler import Scheduler
    from longreach.serving.service import Service

    log(out)
    moved = nullcontext() if options.reserve == 1 else tempfile.TemporaryDirectory(prefix="longreach-moved-")
    with moved as folder:
        budget, place = options.budget or usual_budget(extension), None if folder is None else Path(folder)
        scheduler = Scheduler(extension, budget=budget, step_ms=options.step_ms, reserve=options.reserve, moved=place)
        listen(out, Service(extension, tokenizer, name, limits, scheduler, options.documents), where, options)


def listen(out: Output, service: Service, where: socket.socket, options: Options) -> None:
    import uvicorn

    from longreach.serving.api import application
    from longreach.serving.connections import Connection

    app = application(service, options.api_key, options.host in LOCAL)
    drain = max(1, round(options.drain))
    quiet: Any = dict(log_config=None, access_log=False, server_header=False, ws="none", http=Connection)
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=drain, limit_concurrency=CONNECTIONS, **quiet))
    address, port = where.getsockname()[:2]
    url = f"http://{f'[{address}]' if ':' in address else address}:{port}"

    def end(number: int, frame: Any) -> None:  # before uvicorn listens to signals, and once more when it raises them anew at its end
        server.should_exit = True

    where.listen(BACKLOG)  # who reads that it is served may ask at once
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        out.finish({"url": url, "model": service.name, "context": service.room.context, "method": service.facts["method"]}, lambda console: None)
        out.say(f"{service.name} is served at {url}/v1")
        server.run(sockets=[where])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    out.note("ended")


class Line(logging.Formatter):
    """One JSON object a line: when, how serious, what, and the facts of a request. Never a text of one."""

    def format(self, record: logging.LogRecord) -> str:
        said = {"time": self.formatTime(record), "level": record.levelname.lower(), "event": record.getMessage(), **getattr(record, "said", {})}
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        return json.dumps(said)


def log(out: Output) -> None:
    """What is logged goes to standard error."""
    handler = logging.StreamHandler(out.errors.file)
    handler.setFormatter(Line())
    for name, level in (("longreach.serving", logging.WARNING if out.quiet else logging.INFO), ("uvicorn.error", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
