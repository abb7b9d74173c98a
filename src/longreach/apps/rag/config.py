"""What is asked for and what comes back: the configuration and the result of retrieval-augmented generation, as plain frozen data.

Knows no models and no texts beyond those of the result.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from longreach.apps.rag.asking import Ended
from longreach.apps.rag.chunks import MOST_WORDS
from longreach.apps.rag.prompts import Order, Step
from longreach.apps.rag.retrievers import BM25
from longreach.quantities import MOST_TOKENS

MOST_ROUNDS = 100


@dataclass(frozen=True)
class RagConfig:
    """How a question about documents is answered.

    top_k           chunks that are retrieved for a question, and for each sub-question; 0 for none, None for as many as fit (only without rounds).
    chunk_words     words of a chunk ("Retrieval meets long context" has 300); None: every document is one chunk.
    order           "rank" (DRAG): the best chunk nearest to the question; "position": as in the documents.
    rounds          sub-questions that the model may ask. 0 is DRAG; more is IterDRAG, for which the paper has up to 5.
    budget          effective context length: input tokens of all calls for a question together; None: each call may fill the context.
    max_new_tokens  of each call, its control words not counted.
    retriever       "bm25", or the name or folder of a sentence-transformers model.
    instruction     opens every prompt. None: that of Self-Ask with rounds, and none without.
    """

    top_k: int | None = None
    chunk_words: int | None = 300
    order: Order = "rank"
    rounds: int = 0
    budget: int | None = None
    max_new_tokens: int = 128
    retriever: str = BM25
    instruction: str | None = None

    def __post_init__(self) -> None:
        for name, least, most, what in (
            ("top_k", 0, MOST_TOKENS, "chunks"),
            ("chunk_words", 1, MOST_WORDS, "words"),
            ("rounds", 0, MOST_ROUNDS, "sub-questions"),
            ("budget", 1, MOST_TOKENS, "tokens"),
            ("max_new_tokens", 1, MOST_TOKENS, "tokens"),
        ):
            value = getattr(self, name)
            optional = name in ("top_k", "chunk_words", "budget")
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"{name} must be a whole number of {what} from {least} to {most}{', or None' if optional else ''}, not {value!r}")
        if self.order not in ("rank", "position"):
            raise ValueError(f"there is no order {self.order!r}; pass rank (the best chunk nearest to the question) or position (as in the documents)")
        if self.rounds and self.top_k is None:
            raise ValueError("with rounds, every sub-question needs room for chunks of its own; pass top_k (--top-k), such as 3")


@dataclass(frozen=True)
class Passage:
    """A chunk that the last call has read: `text` is characters `start` to `stop` of a document, the `score` is the retriever's for the query of a `round`
    (0: the question). `document` is a name, or counts from 0 where documents have none."""

    document: str | int
    start: int
    stop: int
    score: float
    round: int
    text: str


@dataclass(frozen=True)
class RagAnswer:
    """passages     in the order in which they were read.
    steps           sub-questions and intermediate answers.
    ended           why the answer came: "one call" (DRAG), "by itself", after all "rounds", because the "budget" left no more, or a sub-question was empty.
    calls           input tokens of each call; `tokens`, their sum, is the effective context length.
    reused_tokens   of them, those that a call before had read already.
    top_k           chunks that were retrieved for the question.
    """

    answer: str
    passages: tuple[Passage, ...]
    steps: tuple[Step, ...]
    ended: Ended
    calls: tuple[int, ...]
    new_tokens: int
    reused_tokens: int
    top_k: int
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(self.calls)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens": self.tokens}
