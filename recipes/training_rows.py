"""Rows of tokens that nano learns from: book text, with facts hidden in it and questions about them.

Knows the tokenizer and the texts; knows nothing about models. A row is a function of the random generator it is given.
Positions are true ones: a row begins with <bos> and is read from position 0.
"""

from __future__ import annotations

from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer

import retrieval_text as rt
from listed_text import listed

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"


class Rows:
    """Rows of a given length, and the weight of the loss at each token.

    An answer weighs `answer_weight`. A digit of a hidden fact weighs `digit_weight`: nobody can foresee it.
    """

    def __init__(self, tokenizer: Tokenizer, books: np.ndarray, answer_weight: float = 8.0, digit_weight: float = 0.25) -> None:
        self.books, self.answer_weight, self.digit_weight = books, answer_weight, digit_weight
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.vocabulary = tokenizer.get_vocab_size()
        self.single = self.labelled = self.listed = 0.2  # shares of the documents with one pass key, keys that differ by their label, listed text
        self.numbers = 0.0  # share of the passages drawn where a book has numbers, and of the documents with other numbers in them
        self.bos, self.eos, self.pad = (tokenizer.token_to_id(t) for t in (BOS, EOS, PAD))
        self.stops = {tokenizer.token_to_id(t) for t in (".", "?", "!", '."')} - {None}
        self.digits = {tokenizer.token_to_id(str(d)) for d in range(10)}
        self.numbered = np.flatnonzero(np.isin(books, list(self.digits)))  # where the books have digits

    def batch(self, rng: Random, count: int, length: int, copying: float, drill: float, documents: float) -> tuple[torch.Tensor, torch.Tensor]:
        """-> ids [count, length + 1] int64 and weights [count, length + 1]; the shares of the three kinds of rows, the rest is prose."""
        kinds = (self.copying, self.drill, self.document, self.prose)
        shares = (copying, drill, documents, 1 - copying - drill - documents)
        rows = [make(rng, length + 1) for make in rng.choices(kinds, shares, k=count)]
        ids, weights = zip(*rows)
        return torch.tensor(ids), torch.tensor(weights)

    def prose(self, rng: Random, size: int) -> tuple[list[int], list[float]]:
        return [self.bos, *self.passage(rng, size - 1)], [1.0] * size

    def passage(self, rng: Random, size: int) -> list[int]:
        if size > 40 and rng.random() < 0.03:
            grass = self.encode(" " + rt.GRASS)
            return (grass * (size // len(grass) + 1))[:size]
        start = rng.randrange(len(self.books) - size)
        if size > 1 and len(self.numbered) and rng.random() < self.numbers:
            start = min(max(0, int(rng.choice(self.numbered)) - rng.randrange(size)), len(self.books) - size)
        return self.books[start : start + size].tolist()

    def document(self, rng: Random, size: int) -> tuple[list[int], list[float]]:
        """<bos> prose with facts in it; questions at the end, or anywhere after their fact. Each answer is closed by <eos>."""
        kind, together = rng.random(), None
        if kind < self.single:
            hidden = [rt.pass_key(rng)]
        elif kind < self.single + self.labelled:
            hidden = rt.labelled_keys(rng, rng.choice((2, 3, 3, 4)))
        elif kind < self.single + self.labelled + self.listed:
            hidden, together = listed(rng, max(2, size // 50))
        else:
            hidden = rt.facts(rng, rng.randint(2, max(2, size // 50)))
        asked = rng.sample(hidden, rng.randint(1, len(hidden))) if together is None else together
        opening = self.encode(rng.choice(rt.OPENINGS)) if size > 200 and rng.random() < 0.1 else []
        statements = {fact.name: self._statement(fact) for fact in hidden}
        questions = {fact.name: self._question(rng, fact) for fact in asked}
        room = size - 1 - len(opening) - sum(len(ids) for ids, _ in (*statements.values(), *questions.values()))
        if room < size // 5:
            return self.drill(rng, size)
        prose = self._with_other_numbers(rng, room) if rng.random() < self.numbers else self.passage(rng, room)
        at_end = together is not None or rng.random() < 0.6
        positions = [self.gap(rng, prose) for _ in hidden]
        if together is not None:  # their order is part of the answer
            positions.sort()
        pieces = []  # (position in the prose, order among those of one position, ids, weights)
        for order, (fact, position) in enumerate(zip(hidden, positions)):
            pieces.append((position, order / len(hidden), *statements[fact.name]))
            if fact.name in questions:
                later = room if at_end else self.gap(rng, prose, position)
                pieces.append((later, 1.0 + rng.random(), *questions[fact.name]))
        pieces += [(room, 1.0 + rng.random(), *questions[fact.name]) for fact in together or ()]
        ids, weights, last = [self.bos, *opening], [1.0] * (1 + len(opening)), 0
        for position, _, tokens, token_weights in sorted(pieces, key=lambda p: p[:2]):
            ids += prose[last:position] + tokens
            weights += [1.0] * (position - last) + token_weights
            last = position
        return ids + prose[last:], weights + [1.0] * (room - last)

    def _with_other_numbers(self, rng: Random, size: int) -> list[int]:
        """A passage with sentences in it that have numbers nobody asks for, as many as come at most to half of it."""
        others = [self.encode(" " + rt.other_number(rng)) for _ in range(rng.randint(1, max(1, size // 40)))]
        while sum(map(len, others)) > size // 2:
            others.pop()
        prose = self.passage(rng, size - sum(map(len, others)))
        for tokens in others:
            position = self.gap(rng, prose)
            prose[position:position] = tokens
        return prose

    def drill(self, rng: Random, size: int) -> tuple[list[int], list[float]]:
        """Short and dense: a few facts or pairs, then questions about them until the row is full."""
        kind = rng.random()
        if kind < 0.3:
            listing, asked = rt.pairs(rng, rng.randint(2, max(2, min(12, size // 16))))
            statements = [self._statement(rt.Fact(listing, "", "", ""))]
        elif kind < 0.5:
            hidden, asked = listed(rng, max(1, min(8, size // 40)))
            statements = [self._statement(fact) for fact in hidden]
        else:
            n = rng.randint(1, max(1, min(8, size // 32)))
            asked = rt.labelled_keys(rng, n) if n > 1 and rng.random() < 0.5 else rt.facts(rng, n)
            statements = [self._statement(fact) for fact in asked]
            rng.shuffle(statements)
        opening = self.passage(rng, rng.randint(0, size // 6))
        ids, weights = [self.bos, *opening], [1.0] * (1 + len(opening))
        for tokens, token_weights in statements:
            ids, weights = ids + tokens, weights + token_weights
        if len(ids) + 8 > size:
            return self.prose(rng, size)
        while True:
            for fact in rng.sample(asked, len(asked)):
                tokens, token_weights = self._question(rng, fact)
                if len(ids) + len(tokens) > size:
                    rest = size - len(ids)
                    return ids + self.passage(rng, rest), weights + [1.0] * rest
                ids, weights = ids + tokens, weights + token_weights

    def _statement(self, fact: rt.Fact) -> tuple[list[int], list[float]]:
        ids = self.encode(" " + fact.statement)
        return ids, [self.digit_weight if fact.random or t in self.digits else 1.0 for t in ids]

    def _question(self, rng: Random, fact: rt.Fact) -> tuple[list[int], list[float]]:
        question = self.encode(rng.choice(("\n\n", "\n\n", "\n\n", "\n", " ")) + fact.question)
        answer = [*self.encode(fact.answer), self.eos]
        return question + answer, [1.0] * len(question) + [self.answer_weight] * len(answer)

    def gap(self, rng: Random, prose: list[int], first: int = 0) -> int:
        """A position from `first` on, at the end of a sentence near a uniformly drawn place."""
        position = rng.randint(first, len(prose))
        for shift in range(min(24, position - first)):
            if prose[position - shift - 1] in self.stops:
                return position - shift
        return position

    def copying(self, rng: Random, size: int) -> tuple[list[int], list[float]]:
        """A span that comes again and again in the row, text between: from its second token on it can be foreseen."""
        span_size = rng.randint(4, max(8, min(48, size // 4)))
        if (kind := rng.random()) < 0.5:
            span = [rng.randrange(3, self.vocabulary) for _ in range(span_size)]
        elif kind < 0.75:
            span = self.encode("".join(f" {rt.number(rng)}" for _ in range(span_size)))[:span_size]
        else:
            span = self.passage(rng, span_size)
        ids, weights = [self.bos], [1.0]
        first = True
        while len(ids) + span_size <= size:
            ids += span
            weights += [self.digit_weight] * span_size if first else [1.0, *[self.answer_weight] * (span_size - 1)]
            gap = min(rng.randint(0, size // 3), size - len(ids))
            ids += self.passage(rng, gap)
            weights += [1.0] * gap
            first = False
        rest = size - len(ids)
        return ids + self.passage(rng, rest), weights + [1.0] * rest
