"""A pass key in the first turn of a conversation with nano, turns of something else, and the question: which caches of one size still answer?

    python benchmarks/dialogue.py --turns 20 --size 256
"""

from __future__ import annotations

import argparse
import random

import longreach
from longreach import LMInfinite, SirLLM, StreamingLLM
from longreach.evals.samples.fitting import FILLER
from longreach.evals.samples.haystack import PASS_KEY, number_in
from longreach.evals.tasks.passkey import INSTRUCTION
from longreach.methods.base import Method
from longreach.running.conversation import Conversation

WORDS = 39  # of a passage of the book


def methods(size: int) -> list[Method]:
    kept = size - 4
    return [SirLLM(kept), SirLLM(kept, decay=0.9), SirLLM(kept, alignment="official"), StreamingLLM(kept, 4), LMInfinite(kept, 4)]


def talk(model: object, tokenizer: object, method: Method, key: str, between: list[str]) -> tuple[bool, int]:
    """Whether the key was answered, and the tokens that were read."""
    with longreach.extend(model, method) as extension:  # type: ignore[arg-type]
        conversation = Conversation(model, tokenizer, extension=extension)  # type: ignore[arg-type]
        conversation.ask(f"{INSTRUCTION} {PASS_KEY.statement.format(key=key)}", 1)
        for text in between:
            conversation.ask(text, 1)
        answer = conversation.ask(f"{PASS_KEY.question} {PASS_KEY.lead}", 12)
        return number_in(answer.text) == key, conversation.known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--size", type=int, default=256, help="tokens of a cache")
    parser.add_argument("--keys", type=int, default=5)
    given = parser.parse_args()
    model, tokenizer = longreach.load("nano")
    words = longreach.shipped_book().split()
    for what in ("filler", "book"):
        for method in methods(given.size):
            rng, found, tokens = random.Random(5), 0, 0
            for _ in range(given.keys):
                key = str(rng.randrange(10_000, 100_000))
                starts = [rng.randrange(len(words) - WORDS) for _ in range(given.turns)]
                between = [" ".join([FILLER] * 3)] * given.turns if what == "filler" else [" ".join(words[a : a + WORDS]) for a in starts]
                right, tokens = talk(model, tokenizer, method, key, between)
                found += right
            print(f"{what:<7} {method.brief():<55} {found} of {given.keys}   {tokens} tokens", flush=True)


if __name__ == "__main__":
    main()
