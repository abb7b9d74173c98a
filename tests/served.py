"""A real server on a free port, in a thread, for tests of the HTTP interface."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import uvicorn

from longreach.hf.extension import Extension
from longreach.serving.api import application
from longreach.serving.connections import Connection
from longreach.serving.limits import Limits
from longreach.serving.scheduler import Scheduler
from longreach.serving.service import Service


@dataclass(frozen=True)
class Served:
    url: str
    service: Service
    app: Any
    connections: set[Any]  # that are open

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60)

    def until(self, what: Any) -> None:
        """Wait for something that another thread brings about."""
        end = time.monotonic() + 30
        while not what():
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.01)


@contextmanager
def served(
    extension: Extension, tokenizer: Any, *, limits: Limits | None = None, key: str | None = None, documents: Path | None = None
) -> Iterator[Served]:
    service = Service(extension, tokenizer, "nano", limits or Limits(), Scheduler(extension), documents)
    app = application(service, key)
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_config=None, access_log=False, http=Connection))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Served(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", service, app, server.server_state.connections)
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`longreach serve` in a process of its own, and its address."""
    command = [sys.executable, "-m", "longreach.cli", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as found:
        assert found.stderr is not None
        try:
            said = []
            for line in found.stderr:
                said.append(line)
                if " is served at " in line:
                    break
            else:
                raise AssertionError(said)
            yield found, line.split(" is served at ")[1].strip()
        finally:
            found.kill()
