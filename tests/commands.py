"""What tests of the command line share: running a command, its result, folders with tiny models, a text, standard input. conftest.py hands the fixtures on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from longreach.cli import main
from tiny import SMALL, WINDOW, save


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """name -> a folder with a tiny model."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    llama = t.LlamaForCausalLM(t.LlamaConfig(**SMALL))
    found = {"llama": save(root / "llama", llama), "chat": save(root / "chat", llama, chat=True)}
    found["bf16"] = save(root / "bf16", llama.bfloat16())
    found["gpt2"] = save(root / "gpt2", t.GPT2LMHeadModel(t.GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=WINDOW)))
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    wrapper = t.Gemma3Config(text_config={**SMALL, "head_dim": 8, "sliding_window": 24}, vision_config=vision, mm_tokens_per_image=4)
    found["multimodal"] = save(root / "multimodal", t.Gemma3ForConditionalGeneration(wrapper))
    hybrid = t.Qwen3NextConfig(
        **SMALL,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    found["hybrid"] = save(root / "hybrid", t.Qwen3NextForCausalLM(hybrid))
    return found


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 bytes, so 201 tokens as plain text."""
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_text("".join(f"{i:04d}," for i in range(40)))
    return file


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[bytes], None]]:
    opened = []

    def put(data: bytes) -> None:
        (tmp_path / "stdin").write_bytes(data)
        opened.append((tmp_path / "stdin").open())
        monkeypatch.setattr(sys, "stdin", opened[-1])

    yield put
    for stream in opened:
        stream.close()


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as the one object that it must be."""
        assert self.out.endswith("}\n") and self.out.count("\n") == 1, self.out
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        return Result(code, *capsys.readouterr())

    return run


def refused(run: Run, *arguments: object, says: str) -> None:
    """Exit code 2, one sentence on standard error, nothing on standard output; with --json exactly one error object."""
    plain = run(*arguments)
    assert (plain.code, plain.out) == (2, ""), plain
    last = plain.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and says in last, plain.err
    assert "Traceback" not in plain.err
    assert run(*arguments, "--json").json == {"error": last.removeprefix("error: ")}
