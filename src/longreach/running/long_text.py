"""One question about a text of any length, which is read in pieces and kept in a folder while it is read.

Knows pieces of a text, ids and generation; not files of text, options or terminals.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from longreach.hf.extension import Extension
from longreach.hf.interfaces import CausalLM, Tokenizer
from longreach.quantities import CHUNK_SIZE
from longreach.running import generation, prompts
from longreach.running.pieces import ALIKE, token_ids
from longreach.running.resuming import Kept
from longreach.running.sampling import GREEDY, Sampling


@dataclass
class LongText:
    """What a conversation is where a text is not in memory: its ids are, 8 bytes for every token, which generate asks for.

    ids      [N] the text and the question about it, as one reads them.
    folder   where what was read is kept.
    own      [N] of them stand before the question, whatever it is (`before_question`): no more are kept.
    """

    model: CausalLM
    tokenizer: Tokenizer
    ids: torch.Tensor
    folder: Path
    own: int
    chunk_size: int = CHUNK_SIZE
    limit: int | None = None
    extension: Extension | None = None
    kept: Kept | None = field(default=None, init=False)

    @property
    def known(self) -> int:
        """Tokens that were read before."""
        return 0 if self.kept is None else self.kept.tokens

    def attach(self, extension: Extension, limit: int | None) -> None:
        """Raises ValueError unless the text begins with what the folder holds."""
        kept = Kept(extension, self.folder, extension.method.apart(self.own))
        kept.rest(self.ids)
        if kept.tokens > (early := extension.method.apart(len(self.ids))):
            raise ValueError(
                f"{str(self.folder)!r} holds {kept.tokens} tokens; of a prompt of {len(self.ids)} {extension.method.brief()} reads {early} before the rest; "
                "pass a longer text or question, or name another folder"
            )
        self.extension, self.limit, self.kept = extension, limit, kept

    def sequence(self, question: str) -> torch.Tensor:
        return self.ids

    def ask(
        self,
        question: str,
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        write: Callable[[str], None] = lambda text: None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> generation.Answer:
        return generation.answer(
            self.model,
            self.tokenizer,
            self.ids,
            max_new_tokens,
            extension=self.extension,
            chunk_size=self.chunk_size,
            sampling=sampling,
            resume=self.kept,
            write=write,
            progress=progress,
        )


def prompt_ids(tokenizer: Tokenizer, text: Iterable[str], question: str, system: str | None) -> torch.Tensor:
    """[N] ids of a text that comes in pieces, with a question about it: those of `Conversation.sequence`."""
    before, behind, trims = prompts.around(tokenizer, question, system)
    pieces = itertools.chain([before], _trimmed(text) if trims else text, [behind])
    ids = array("q", [] if prompts.has_template(tokenizer) else prompts.encode(tokenizer, ""))
    ids.extend(token_ids(tokenizer, pieces, special=False))
    return torch.frombuffer(ids, dtype=torch.int64) if ids else torch.zeros(0, dtype=torch.int64)


def before_question(tokenizer: Tokenizer, tokens: int, question: str, system: str | None) -> int:
    """How many of the `tokens` ids of `prompt_ids` stand before the question and do not depend on it. Next to it a tokenizer may join characters in other
    ways, so a few tokens are left out, as where windows of a text meet."""
    behind = prompts.around(tokenizer, question, system)[1]
    return max(0, tokens - len(prompts.encode(tokenizer, behind, special=False)) - ALIKE)


def _trimmed(text: Iterable[str]) -> Iterator[str]:
    """Without white space at its beginning."""
    pieces = itertools.dropwhile(lambda piece: not piece.strip(), text)
    yield next(pieces, "").lstrip()
    yield from pieces
