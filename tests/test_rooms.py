"""The house stays in order: what has one owner is called nowhere else, and no file grows beyond what is read in one sitting. `lint-imports` has the arrows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOM = Path(__file__).resolve().parent.parent / "src/longreach"
FILES = sorted(ROOM.rglob("*.py"))
# what is called -> the only places that call it
OWNERS = {
    "os.replace": {"files.py"},
    "tokenizer.apply_chat_template": {"running/prompts.py"},
    "take_back": {"running/prefix.py"},
    "torch.manual_seed": {"checking/families.py"},  # builds random models; an answer has a random state of its own
    "print": {"cli"},
}


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def home(path: Path, owners: set[str]) -> bool:
    place = path.relative_to(ROOM).as_posix()
    return place in owners or place.split("/")[0] in owners


@pytest.mark.parametrize("what", OWNERS)
def test_it_has_one_owner(what):
    callers = [path for path in FILES if what in calls(path)]
    assert callers and all(home(path, OWNERS[what]) for path in callers), callers


def test_configurations_have_one_reader():
    """Nobody else asks a configuration for its window, its rope or the kinds of its layers; who makes one writes them as keywords, or completes what
    Transformers made of a file."""
    facts = {"max_position_embeddings", "rope_parameters", "rope_scaling", "layer_types", "sliding_window", "attention_chunk_size", "num_key_value_heads"}
    readers = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            asked = isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
            if asked and node.args[1].value in facts:
                readers.add(path.name)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in facts and ast.unparse(node.value).endswith("config"):
                readers.add(path.name)
    assert readers == {"configs.py", "gguf_positions.py"}


def test_vllm_is_known_in_one_place():
    """Its names move between releases: by an import or by a string, nobody else has them."""
    knows = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("vllm."):
                names = [node.value]
            if any(name is not None and name.split(".")[0] == "vllm" for name in names):
                knows.add(path.relative_to(ROOM).parent.as_posix())
    assert knows == {"vllm/seam", "cli"}  # the command that hands over names the module to run


def test_a_file_is_read_in_one_sitting():
    assert {path.name: lines for path in FILES if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 350} == {}


def test_a_file_says_what_it_is():
    assert [path for path in FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []
