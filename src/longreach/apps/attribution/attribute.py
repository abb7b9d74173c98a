"""attribute(): a text, a question and an answer in; which parts of the text made the answer, and how sure one may be of it, out.

The value of some parts is log p(answer | a prompt with these parts only), in the same template that the answer was written in. Knows models under an extension,
texts and conversations; prints and draws nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from longreach.apps.attribution.scores import Coalition, Scorer, named
from longreach.apps.attribution.search import TOP, Search, expected, require_searchable, search
from longreach.apps.parts import WORDS, Part, Unit, cut
from longreach.hf.checks import require_in_force
from longreach.hf.extension import Extension
from longreach.hf.interfaces import Tokenizer
from longreach.quantities import CHUNK_SIZE, require_whole
from longreach.running import generation, prompts
from longreach.running.continuations import Continuations, Stopped
from longreach.running.conversation import Conversation
from longreach.running.prefix import Prefix
from longreach.running.together import AT_ONCE

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Scored:
    """A part of the text, text[start:stop], or an earlier turn of a conversation. After a search that was stopped, several parts that follow each other.

    turn    the number of the turn from 1 on, whose question and answer `text` then is; None: the part is of the text.
    score   the largest of `scores`, each times the weight of its scorer.
    scores  by the names of the scorers that kept it to the end, nats.
    upto    where turns were not told apart, the last of them: from `turn` on, or from 1 on behind a part of the text. None: there are no others.
    """

    start: int
    stop: int
    text: str
    turn: int | None
    score: float
    scores: Mapping[str, float]
    upto: int | None = None


@dataclass(frozen=True)
class Evidence:
    """log p(answer | ...) in nats: what the found parts do, all of them together. `found` are those with a score above 0.

    whole    with the whole text.
    without  without the parts that were found.
    only     with these alone.
    nothing  without any text: what the model would say anyway.
    """

    whole: float
    without: float
    only: float
    nothing: float


@dataclass(frozen=True)
class Work:
    """What it took.

    evaluations    different sets of parts whose prompts were read with the answer.
    forwards       calls of the model for them.
    tokens_asked   of all these prompts and answers.
    tokens_read    of them; the rest were shared beginnings.
    one_by_one     why prompts were not read together, where the model or method does not allow it.
    """

    evaluations: int
    forwards: int
    tokens_asked: int
    tokens_read: int
    seconds: float
    one_by_one: str | None


@dataclass(frozen=True)
class Attribution:
    """parts     the best, the largest score first.
    count     parts that the text was cut into.
    evidence  None where the search was stopped before.
    complete  whether the search came to its end; else the parts are as fine as it came.
    """

    question: str
    answer: str
    answer_tokens: int
    parts: tuple[Scored, ...]
    count: int
    evidence: Evidence | None
    work: Work
    complete: bool


@dataclass(frozen=True)
class Places:
    """What may be left out, in order, and the ids of a prompt with some of it."""

    parts: Sequence[Part]
    turns: Sequence[int | None]
    prompt: Callable[[Coalition], list[int]]


def attribute(
    extension: Extension,
    tokenizer: Tokenizer,
    text: str,
    question: str,
    answer: str | None = None,
    *,
    by: Unit = "passage",
    words: int = WORDS,
    parts: Sequence[Part] | None = None,
    top: int = TOP,
    scorers: Sequence[Scorer] | None = None,
    system: str | None = None,
    max_new_tokens: int = 128,
    at_once: int = AT_ONCE,
    chunk_size: int = CHUNK_SIZE,
    progress: Progress = lambda done, expected: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Attribution:
    """Which parts of `text` made the answer to `question`?

    answer      None: the model answers first, greedily.
    by, words   the text is cut into a "sentence", "paragraph" or "passage" of so many words each.
    parts       or into these, which cover it; see `apps.parts.cut` and `at`.
    top         so many parts are searched for.
    scorers     see `scores.named`; None: the ensemble of the paper.
    at_once     prompts that are read together; 1: one after the other. Memory and speed depend on it, the result does not.
    progress    gets the evaluations that are done, and about how many there will be.
    stopped     asked before each forward; once it is true the search ends with what it has found so far.

    Raises ValueError for an empty text, question or answer, for more than 10000 parts, and for a text that does not fit the declared context.
    """
    require_in_force(extension)
    for value, what in ((text, "the text"), (question, "the question"), *(() if answer is None else ((answer, "the answer"),))):
        prompts.require_text(value, what=what)
    for number, name in ((words, "words"), (top, "top"), (max_new_tokens, "max_new_tokens")):
        require_whole(name, number)
    parts = cut(text, by, words) if parts is None else parts
    at = 0
    for part in parts:
        at = part.stop if part.start == at and part.text == text[at : part.stop] else len(text) + 1
    if at != len(text):
        raise ValueError("the parts do not cover the text; pass those of longreach.apps.parts.cut(text) or at(text, places)")
    if not text.strip():
        raise ValueError("there is no text to attribute the answer to; pass one with words in it")
    if not question.strip():
        raise ValueError("there is no question; pass what was asked about the text")
    talk = Conversation(extension.model, tokenizer, system=system)  # type: ignore[arg-type,unused-ignore]
    places = of_text(talk, text, parts, question)
    if answer is None:
        ids = places.prompt(Coalition(range(len(parts))))
        _require_room(extension, len(ids), max_new_tokens)
        found = generation.answer(extension.model, tokenizer, ids, max_new_tokens, extension=extension, chunk_size=chunk_size)
        answer, answer_ids = found.text, without_end(found.ids, extension, tokenizer)
    else:
        answer_ids = encoded(tokenizer, answer)
    reader = Continuations(extension, at_once=at_once, chunk_size=chunk_size)
    return _attribute(places, question, answer, answer_ids, reader, top, scorers, progress, stopped)


def why(
    talk: Conversation,
    *,
    by: Unit = "passage",
    words: int = WORDS,
    top: int = TOP,
    scorers: Sequence[Scorer] | None = None,
    at_once: int = AT_ONCE,
    progress: Progress = lambda done, expected: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Attribution:
    """Which parts of a conversation made its last answer: of its text, and of the turns before. Arguments are those of `attribute`.

    Raises ValueError where there is no answer yet, or nothing before it.
    """
    if talk.extension is None:
        raise ValueError("only an extended model can be asked why; pass extension=longreach.extend(model, ...)")
    require_in_force(talk.extension)
    if not talk.turns:
        raise ValueError("there is no answer yet; ask a question first")
    *before, (question, found) = talk.turns
    document = cut(talk.document, by, words)
    if not document and not before:
        raise ValueError("the conversation has no text and no earlier turn that could have made the answer; ask again after another question")
    places = of_talk(talk, document)
    ids = without_end(found.ids, talk.extension, talk.tokenizer)
    reader = Continuations(talk.extension, at_once=at_once, chunk_size=talk.chunk_size)
    return _attribute(places, question, found.text, ids, reader, top, scorers, progress, stopped)


# -- prompts ----------------------------------------------------------------------------------------------------------------------


def of_text(talk: Conversation, text: str, parts: Sequence[Part], question: str) -> Places:
    """The prompts of `longreach run`."""
    return Places(parts, [None] * len(parts), lambda who: talk.sequence(prompts.about(_joined(text, parts, who), question)))


def of_talk(talk: Conversation, document: Sequence[Part]) -> Places:
    """Those of the conversation before its last answer, with some parts of its text and some of the turns before."""
    *before, (question, _) = talk.turns
    said = [prompts.about(asked, answer.text) for asked, answer in before]
    parts = [*document, *(Part(0, len(words), words) for words in said)]

    def prompt(who: Coalition) -> list[int]:
        turns = [turn for n, turn in enumerate(before, len(document)) if n in who]
        return replace(talk, document=_joined(talk.document, document, who), turns=turns, prefix=Prefix()).sequence(question)

    return Places(parts, [None] * len(document) + [n + 1 for n in range(len(before))], prompt)


def _joined(text: str, parts: Sequence[Part], who: Coalition) -> str:
    """Some parts, with the white space at their end that the text has at its own."""
    left = "".join(part.text for n, part in enumerate(parts) if n in who).rstrip()
    return left + text[len(text.rstrip()) :] if left else ""


def encoded(tokenizer: Tokenizer, answer: str) -> list[int]:
    """The ids of an answer that somebody typed. Without a chat template a word stands apart from the question before it, as models write it."""
    if not answer.strip():
        raise ValueError("the answer is empty; pass its words, or leave it out to have the model answer")
    apart = "" if prompts.has_template(tokenizer) or answer[0].isspace() else " "
    return prompts.encode(tokenizer, apart + answer, special=False)


def without_end(ids: Sequence[int], extension: Extension, tokenizer: Tokenizer) -> list[int]:
    """The ids that a model wrote without the token that ended them. Raises ValueError where nothing is left."""
    kept = [*ids]
    if kept and kept[-1] in generation.ends_of(extension.model, tokenizer):
        kept.pop()
    if not kept:
        raise ValueError("the model answered nothing, so there is nothing to attribute; pass another question, or the answer")
    return kept


def _require_room(extension: Extension, prompt: int, new: int) -> None:
    if extension.context is not None and prompt + new > extension.context:
        raise ValueError(
            f"the text and its question have {prompt} tokens, and with {new} of the answer exceed the declared context of {extension.context}; shorten the "
            f"{'text' if prompt >= new else 'answer (max_new_tokens)'}, or extend(model, context={prompt + new})"
        )


# -- the search -------------------------------------------------------------------------------------------------------------------


@dataclass
class Likelihoods:
    """The value of sets of parts, each read once."""

    places: Places
    answer: list[int]
    reader: Continuations
    progress: Callable[[int], None]
    stopped: Callable[[], bool]
    known: dict[Coalition, float] = field(default_factory=dict)
    asked: int = 0

    def __call__(self, coalitions: Sequence[Coalition]) -> list[float]:
        new = [who for who in dict.fromkeys(coalitions) if who not in self.known]
        ids = [self.places.prompt(who) for who in new]
        before = len(self.known)
        values = self.reader.log_probabilities(ids, self.answer, done=lambda count: self.progress(before + count), stopped=self.stopped)
        self.known.update(zip(new, values))
        self.asked += sum(len(each) + len(self.answer) - 1 for each in ids)
        return [self.known[who] for who in coalitions]


def _attribute(
    places: Places,
    question: str,
    answer: str,
    answer_ids: list[int],
    reader: Continuations,
    top: int,
    scorers: Sequence[Scorer] | None,
    progress: Progress,
    stopped: Callable[[], bool],
) -> Attribution:
    count, scorers = len(places.parts), named() if scorers is None else scorers
    names = [each.name if isinstance(each, Scorer) else None for each in scorers]
    if not names or None in names or len({*names}) < len(names):
        raise ValueError("pass at least one scorer, and each kind once, such as scorers=longreach.apps.attribution.scores.named(('alone', 'leave-one-out'))")
    require_searchable(count, top)
    everything = Coalition(range(count))
    _require_room(reader.extension, len(places.prompt(everything)), len(answer_ids))  # the longest prompt: said now, not after a search among shorter ones
    started = time.perf_counter()
    most = expected(count, scorers, top)
    value = Likelihoods(places, answer_ids, reader, lambda done: progress(min(done, most), most), stopped)
    searches = [Search(scorer, count, top) for scorer in scorers]
    evidence, complete = None, False
    try:
        search(searches, value)
        complete = True
        best = _best(places, searches, top)
        those = Coalition(part for group, scored in best if scored.score > 0 for part in group)
        evidence = Evidence(*value([everything, everything - those, those, Coalition()]))
        progress(most, most)  # those for the evidence were beyond what was expected
    except Stopped:
        best = _best(places, searches, top)
    work = Work(len(value.known), reader.forwards, value.asked, reader.tokens, time.perf_counter() - started, reader.alone)
    return Attribution(question, answer, len(answer_ids), tuple(scored for _, scored in best), count, evidence, work, complete)


def _best(places: Places, searches: Sequence[Search], top: int) -> list[tuple[range, Scored]]:
    """The ensemble: of each group the largest of its weighted scores, the best groups first; none overlap."""
    scores: dict[range, dict[str, float]] = {}
    for each in searches:
        for group, score in each.best.items():
            scores.setdefault(group, {})[each.scorer.name] = score
    weight = {each.scorer.name: each.scorer.weight for each in searches}
    found = [(group, max(weight[name] * score for name, score in own.items()), own) for group, own in scores.items()]
    chosen: list[tuple[range, Scored]] = []
    for group, score, own in sorted(found, key=lambda each: (-each[1], each[0].start)):
        if len(chosen) < top and all(group.stop <= other.start or other.stop <= group.start for other, _ in chosen):
            chosen.append((group, scored(places, group, score, own)))
    return chosen


def scored(places: Places, group: range, score: float, scores: Mapping[str, float]) -> Scored:
    written = [places.parts[n] for n in group if places.turns[n] is None]
    turns = [turn for n in group if (turn := places.turns[n]) is not None]
    more = turns[-1] if turns and (written or len(turns) > 1) else None
    if written:
        return Scored(written[0].start, written[-1].stop, "".join(part.text for part in written), None, score, scores, more)
    text = prompts.BETWEEN.join(places.parts[n].text for n in group)
    return Scored(0, len(text), text, turns[0], score, scores, more)
