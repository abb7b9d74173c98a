"""`longreach serve --engine vllm`: the same words, handed over to `vllm serve` with the plugin. Knows options; what vLLM then does is in the room `vllm`."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from longreach.cli.common import Output

if TYPE_CHECKING:
    from longreach.methods.base import Method

KEY = "VLLM_API_KEY"
OWN = (  # options of our own server only
    "documents", "max_new_tokens", "queue", "max_body", "timeout", "drain", "kv_budget", "reserve", "step_ms", "device", "memory",
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What vLLM is to serve, in our words."""

    model: str
    name: str
    context: int | None
    method: Method | None
    trained_window: int | None
    profile: Path | None
    dtype: str | None
    host: str
    port: int


def refuse(context: typer.Context) -> None:
    """Options that vLLM has others for, if they were given. Raises ValueError."""
    sources = {name: context.get_parameter_source(name) for name in OWN}
    given = ["--" + name.replace("_", "-") for name, source in sources.items() if source is not None and not source.name.startswith("DEFAULT")]
    if given:
        raise ValueError(f"{' and '.join(given)} belong to longreach's own server; leave them out with --engine vllm, whose own options docs/vllm.md names")


def command_of(out: Output, wanted: Wanted) -> list[str]:
    """What follows `vllm serve`; the method is decided, and said, before vLLM starts. Raises ValueError, with the fix, where it cannot apply."""
    from longreach import configs
    from longreach.vllm import settings

    if configs.gguf_of(wanted.model) is not None:
        raise ValueError("vLLM reads few GGUF files; write the model as a folder first, with longreach.load(FILE) and save_pretrained: docs/vllm.md shows how")
    config, _ = configs.load(wanted.model)
    text, own = config.get_text_config(), {}
    longest = wanted.context
    if longest is None:
        window = configs.trained_window(text, wanted.trained_window).tokens
        longest = window if wanted.method is None else wanted.method.capacity(window)
        if longest is None:
            raise ValueError(f"{wanted.method} reads texts of any length, and vLLM plans its memory for a longest one; pass --context N")
    asked = settings.Settings(wanted.method, longest, wanted.trained_window, wanted.profile)
    decided = settings.decide(asked, text, longest)
    out.note(f"method: {decided.said}")
    if decided.memory:
        out.note(decided.memory)
    if decided.warning:
        out.warn(decided.warning)
    if not decided.plain:
        own = {"additional_config": json.dumps({settings.KEY: decided.to_json()})}
    embedded = configs.embedded(wanted.model)
    dtype = configs.parse_dtype(wanted.dtype or ("float32" if embedded else None))
    options: dict[str, Any] = {
        "served_model_name": wanted.name, "host": wanted.host, "port": wanted.port, "max_model_len": longest,
        **({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}), **own,
    }  # fmt: skip
    model = str(files("longreach") / "nano") if embedded else wanted.model
    return [model, *(part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value)))]


def hand_over(out: Output, wanted: Wanted, api_key: str | None) -> None:
    """Become `vllm serve`. Raises ValueError where vLLM is not installed, or its environment says something else than the options do."""
    from longreach.vllm import settings

    if find_spec("vllm") is None:
        raise ValueError("vLLM is not installed here; docs/vllm.md says how, in an environment of its own")
    if "longreach" not in os.environ.get("VLLM_PLUGINS", "longreach").split(","):
        raise ValueError("VLLM_PLUGINS leaves longreach out, so that vLLM would serve the model as it is; add longreach to it, or unset it")
    if settings.VARIABLE in os.environ:
        raise ValueError(f"{settings.VARIABLE} is set, and here the options of this command choose the method; unset it, or call vllm serve yourself")
    command = command_of(out, wanted)
    out.finish({"command": ["vllm", "serve", *command]}, lambda console: None)
    out.say("vllm serve " + shlex.join(command))
    environment = dict(os.environ) if api_key is None else {**os.environ, KEY: api_key}
    execute([sys.executable, "-m", *program(), *command], environment)


def key_of(api_key: str | None) -> str | None:
    """What vLLM will ask clients for: ours, or its own variable."""
    return api_key or os.environ.get(KEY) or None


def program() -> list[str]:
    """What `vllm serve` runs. The command refuses to start where the package has another name than vllm, as that of its CPU build; its server does not."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model"]
    return ["vllm.entrypoints.cli.main", "serve"]


def execute(command: list[str], environment: dict[str, str]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environment)
