"""A server under load, over HTTP on this machine: tokens per second, waiting times, what was lost and what memory stayed.

    python benchmarks/load.py                                             # nano in its window: 1, 16 and 50 clients, and `transformers serve` with 50
    python benchmarks/load.py --servers longreach --clients 50 --context 16384 --long 0.05
    python benchmarks/load.py --model SmolLM2-135M-Instruct.Q4_1.gguf --context 1024 --clients 1,16

Each client asks, reads the stream of its answer, and asks again; some leave in the middle. Prompts are stretches of Moby-Dick. `--long` is the share of
prompts that fill the context. When the time is up no new question is asked, and what is on its way ends. Then some questions are asked again, alone: in fp32
nothing is printed unless the answers are the same. Transformers' server gets the weights of a GGUF file as safetensors, as we compute with them. Every load is
bounded in clients and seconds, and goes to the loopback interface only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import httpx
from common import ROOT, device_of, facts, table, write_json
from model import named

import longreach
from longreach.quantities import token_count

CHECKED = 16  # answers that are asked for again
LEFT = 5  # pieces that a client reads before it leaves


@dataclass
class Answer:
    question: dict[str, Any]
    text: str = ""
    tokens: int = 0
    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    left: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    model: str
    process: subprocess.Popen[str]

    @property
    def resident(self) -> float:
        """MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


@contextmanager
def stock(model: str) -> Iterator[str]:
    """What `transformers serve` takes for a model."""
    if model == "nano":
        with as_file(files("longreach") / "nano") as folder:
            yield str(folder)
    elif not model.endswith(".gguf"):
        yield model
    else:
        with tempfile.TemporaryDirectory() as name:
            for part in longreach.load(model):
                part.save_pretrained(name)
            yield name


@contextmanager
def served(name: str, model: str, context: int, extra: list[str]) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with stock(model) if name == "transformers" else nullcontext(model) as called:
        if name == "longreach":
            command = [sys.executable, "-m", "longreach.cli", "serve", "--model", model, "--context", f"{context}", "--port", f"{port}", "--quiet"]
        else:
            command = [str(Path(sys.executable).with_name("transformers")), "serve", called, "--continuous-batching", "--port", f"{port}", "--device", "cpu"]
        process = subprocess.Popen([*command, *extra], text=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                if process.poll() is not None:
                    raise SystemExit(f"{name} did not start; run it by hand: {' '.join(command)}")
                try:
                    if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.5)
            yield Server(name, url, named(model) if name == "longreach" else called, process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


class Questions:
    """The same for every server: number n of a client is drawn from a seed of its own."""

    def __init__(self, tokenizer: Any, context: int, longest: int, long: float) -> None:
        self.words = longreach.shipped_book()
        self.spans = tokenizer(self.words, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        self.context, self.longest, self.long = context, longest, long

    def question(self, client: int, number: int) -> tuple[dict[str, Any], bool]:
        """-> (the question, whether its client leaves before the answer is whole)."""
        chance = random.Random(f"{client} {number}")
        new = chance.randint(16, 64)
        tokens = int((self.context - new) * 0.9) if chance.random() < self.long else chance.randint(32, self.longest)
        at = chance.randrange(len(self.spans) - tokens)
        prompt = self.words[self.spans[at][0] : self.spans[at + tokens - 1][1]]
        return {"prompt": prompt, "max_tokens": new, "temperature": 0}, chance.random() < 0.05


async def ask(client: httpx.AsyncClient, server: Server, question: dict[str, Any], leaves: bool) -> Answer:
    answer, begun = Answer(question), time.perf_counter()
    last = 0.0
    try:
        more = {"model": server.model, "stream": True, "stream_options": {"include_usage": True}}
        async with client.stream("POST", f"{server.url}/v1/completions", json=question | more) as found:
            if found.status_code != 200:
                answer.problem = f"{found.status_code} {(await found.aread())[:200]!r}"
                return answer
            whole = False
            async for line in found.aiter_lines():
                data = line.removeprefix("data: ")
                if not line.startswith("data: ") or data == "[DONE]":
                    whole = whole or data == "[DONE]"
                    continue
                piece = json.loads(data)
                if "error" in piece:
                    answer.problem = str(piece["error"])[:200]
                    return answer
                if usage := piece.get("usage"):
                    answer.tokens = usage["completion_tokens"]
                for choice in piece.get("choices", []):
                    whole = whole or choice.get("finish_reason") is not None
                    if choice.get("text"):
                        now = time.perf_counter()
                        if answer.text:
                            answer.gaps.append(now - last)
                        else:
                            answer.first = now - begun
                        answer.text, last = answer.text + choice["text"], now
                if leaves and len(answer.gaps) >= LEFT:
                    answer.left = True
                    return answer
            if not whole:
                answer.problem = "the stream broke off"
    except httpx.HTTPError as error:
        answer.problem = f"{type(error).__name__}: {error}"
    return answer


async def load(server: Server, questions: Questions, clients: int, seconds: float) -> tuple[list[Answer], float]:
    begun = time.perf_counter()
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None), trust_env=False) as http:

        async def one(client: int) -> list[Answer]:
            found: list[Answer] = []
            while time.perf_counter() - begun < seconds:
                found.append(await ask(http, server, *questions.question(client, len(found))))
            return found

        answers = [answer for own in await asyncio.gather(*map(one, range(clients))) for answer in own]
        return answers, time.perf_counter() - begun


async def again(server: Server, answers: list[Answer]) -> int:
    """Of whole answers, asked for anew one by one: how many differ."""
    whole = [answer for answer in answers if answer.problem is None and not answer.left]
    async with httpx.AsyncClient(timeout=600, trust_env=False) as http:
        return sum([(await ask(http, server, answer.question, False)).text != answer.text for answer in whole[:: max(1, len(whole) // CHECKED)][:CHECKED]])


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """The 50th and the 99th, in ms."""
    if len(seconds) < 2:
        return (float("nan"),) * 2
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return 1000 * cuts[49], 1000 * cuts[98]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--context", default="512")
    parser.add_argument("--longest", type=int, default=384, help="tokens of a usual prompt")
    parser.add_argument("--long", type=float, default=0.0, help="share of prompts that fill the context")
    parser.add_argument("--clients", default="1,16,50")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--servers", default="longreach,transformers")
    parser.add_argument("--half", action="store_true", help="the servers compute in half precision, where answers may differ: it is said, not required")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/load.json")
    args, extra = parser.parse_known_args()
    context, counts = token_count(args.context, "--context"), [int(one) for one in args.clients.split(",")]
    questions = Questions(longreach.load(args.model)[1], context, min(args.longest, context - 64), args.long)
    rows, measured = [], []
    for name in args.servers.split(","):
        with served(name, args.model, context, extra if name == "longreach" else []) as server:
            asyncio.run(load(server, questions, 2, 3))  # what is made at first use
            for clients in counts if name == "longreach" else counts[-1:]:
                before = server.resident
                answers, seconds = asyncio.run(load(server, questions, clients, args.seconds))
                differ = asyncio.run(again(server, answers))
                lost = [answer.problem for answer in answers if answer.problem is not None]
                if differ and not args.half and name == "longreach":
                    raise SystemExit(f"{differ} answers of {clients} clients differ from the same asked alone; nothing is printed")
                tokens = sum(answer.tokens or len(answer.gaps) + 1 for answer in answers if answer.problem is None)
                first = percentiles([answer.first for answer in answers if answer.text])
                between = percentiles([gap for answer in answers for gap in answer.gaps])
                left = sum(answer.left for answer in answers)
                memory = server.resident
                line = [name, f"{clients}", f"{len(answers)}", f"{left}", f"{len(lost)}", f"{differ}", f"{tokens / seconds:.0f}"]
                rows.append([*line, *(f"{value:.0f}" for value in (*first, *between, before, memory))])
                measured.append(
                    {"server": name, "clients": clients, "answers": len(answers), "left": left, "lost": lost, "differ": differ, "tokens": tokens,
                     "seconds": seconds, "first_ms": first, "between_ms": between, "resident_mib": [before, memory]}
                )  # fmt: skip
                print(rows[-1], flush=True)
    head = ["server", "clients", "answers", "left", "lost", "differ", "tokens/s"]
    head += ["first 50 %", "first 99 %", "between 50 %", "between 99 %", "MiB before", "after"]
    print(table(f"{named(args.model)}, context {context}; waiting in ms", head, rows))
    write_json(args.out, {"facts": facts(device_of("cpu")), "load": vars(args) | {"model": named(args.model), "out": args.out.name}, "measured": measured})


if __name__ == "__main__":
    main()
