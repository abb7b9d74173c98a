"""How many tokens of a text are read, and remembered, in one forward. Knows extensions and their layers; not questions or texts."""

from __future__ import annotations

from dataclasses import dataclass

from longreach.engine.layer import Layer
from longreach.hf.extension import Extension
from longreach.quantities import counted

CHUNK = 1024  # tokens of a chunk, where the window has room for them
LEAST = 32  # tokens of a chunk, and of what is remembered
LONGEST = 128  # tokens of a sentence
SPARE = 16  # tokens of a prompt: where texts meet, a tokenizer may make a few more


class NoRoom(ValueError):
    """The window has no room for what is asked."""


@dataclass(frozen=True)
class Sizes:
    """Tokens: of a chunk, of what is remembered, of a sentence, and of the largest prompt."""

    chunk: int
    memory: int
    sentence: int
    limit: int

    @classmethod
    def of(cls, extension: Extension, layer: int, around: int, new: int, chunk_tokens: int | None, memory_tokens: int | None) -> Sizes:
        """What has room in a prompt whose end a layer is looked at from.

        around  tokens that the question and all else around a text take; new: those of the answer.

        Raises NoRoom, with the numbers, where the window has no room for what is asked.
        """
        limit = limit_of(extension, layer)
        room = limit - around - SPARE
        chunk = chunk_tokens or min(CHUNK, room * 2 // 3 if memory_tokens is None else room - memory_tokens)
        memory = memory_tokens or min(chunk // 2, room - max(chunk, new))
        if chunk < LEAST or memory < LEAST or chunk + memory > room or memory + new > room:
            raise NoRoom(
                f"a prompt may have {counted(limit, 'token')} here ({extension.method.brief()}), of which question and template take {around + SPARE}; there "
                f"is no room for chunks of {max(chunk, LEAST)} and an answer of {new}, each beside {max(memory, LEAST)} that are remembered; "
                "shorten the question, pass smaller chunk_tokens, memory_tokens or max_new_tokens, or extend the model to a longer context"
            )
        return cls(chunk, memory, min(LONGEST, memory // 2, chunk // 2), limit)


def limit_of(extension: Extension, layer: int) -> int:
    """Tokens that a prompt may have: so many that the layer sees the whole from its end."""
    known = (extension.context, extension.capacity, _reach(extension.layers[layer]))
    return min((tokens for tokens in known if tokens is not None), default=extension.window.tokens)


def whole(extension: Extension) -> list[int]:
    """The layers that see a whole prompt from its end; the last layer, if there are none."""
    return [layer.index for layer in extension.layers if _reach(layer) is None] or [len(extension.layers) - 1]


def _reach(layer: Layer) -> int | None:
    """How far back a layer looks; None: to the first token."""
    reaches = [segment.visible.reach for segment in layer.layout.segments if segment.visible.last_key is None]
    known = [reach for reach in reaches if reach is not None]
    return None if len(known) < len(reaches) else max(known, default=None)
