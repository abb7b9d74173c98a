"""`longreach run --show-retrieval PNG`: what the tokens of an answer have chosen of the text, as a picture and as data.

Knows answers and how they are watched; not how one is drawn, or what an index does.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longreach.quantities import counted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from longreach.engine.watch import Choices
    from longreach.hf.extension import Extension
    from longreach.hf.interfaces import CausalLM, Tokenizer
    from longreach.methods.base import Method

OPTION = "--show-retrieval"


def require(model: CausalLM, method: Method | None, trained_window: int | None) -> None:
    """Raises ValueError, with the fix, where the method that was asked for chooses nothing: before a text is read."""
    from longreach import configs
    from longreach.hf.checks import find_base
    from longreach.hf.retrieval import chooses_nothing

    if method is not None and method.choice is None:
        raise ValueError(f"{OPTION}: {chooses_nothing(method, configs.trained_window(find_base(model).config, trained_window).tokens)}")


@contextmanager
def watched(extension: Extension, png: Path | None, prompt: int) -> Iterator[Choices | None]:
    """Inside, the last of `prompt` tokens and those after it are watched; they write the answer. None: no picture was asked for."""
    watching: AbstractContextManager[Choices | None] = nullcontext() if png is None else extension.watching_choices(prompt - 1)
    with watching as choices:
        yield choices


def finish(extension: Extension, tokenizer: Tokenizer, choices: Choices, ids: list[int], hidden: str | None, png: Path) -> dict[str, Any]:
    """Draws the picture -> its data. `ids`: the text and its answer, as they were read."""
    from longreach.drawing import retrieval
    from longreach.hf.retrieval import retrieved

    found = retrieved(extension.facts, choices, len(ids))
    marked = [] if hidden is None else place(ids, tokenizer(f" {hidden.strip()}", add_special_tokens=False)["input_ids"])
    retrieval.draw(found, title(extension.method, found), png, marked)
    return {**found, "hidden": marked, "picture": str(png)}


def place(ids: list[int], sentence: list[int]) -> list[tuple[int, int]]:
    """Where a sentence lies in a text: its tokens but the first and the last, which its neighbours may change. [] where that is nowhere."""
    inner = sentence[1:-1]
    if not inner:
        return []
    found = (at for at, first in enumerate(ids) if first == inner[0] and ids[at : at + len(inner)] == inner)
    return [(at - 1, at + len(inner) + 1) for at in found][:1]


def title(method: Method, found: dict[str, Any]) -> str:
    """Method, tokens, budget; where nobody chose, that."""
    if not found["queries"]:
        return f"{method.brief()}\n{found['tokens']} tokens; no token of the answer chose: each saw all that it may (a longer answer shows what is chosen)"
    layer = next(layer for layer in found["layers"] if layer["chooses"])
    blocks = f"{layer['keep']} blocks of {layer['block']} tokens" if layer["block"] > 1 else counted(layer["keep"], "token")
    who = f", apart in {layer['apart']} heads" if layer["apart"] > 1 else ""
    return f"{method.brief()}\n{found['tokens']} tokens; {counted(found['queries'], 'token')} of the answer chose at most {blocks} each{who}"
