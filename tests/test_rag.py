"""Retrieval and long context: chunks cover their texts, prompts are what the papers say, DRAG and IterDRAG walk their states, no budget is exceeded."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import longreach
from longreach import SirLLM
from longreach.apps.parts import word_starts
from longreach.apps.rag import Demonstration, Rag, RagConfig, Step, asking, chunks, prompts, retrievers
from longreach.apps.rag.asking import Room, iterdrag, most
from longreach.apps.rag.prompts import FINAL, FOLLOW_UP, INTERMEDIATE, Prompts, State, Used
from longreach.apps.rag.rag import contains
from longreach.running import beginnings, generation
from longreach.running.prompts import encode, hide
from scripts import ROOT
from tiny import tokenizer as bytes_tokenizer

CITIES = {"Lisbon": "1234567", "Oslo": "7654321", "Cairo": "5550123"}


@pytest.fixture(scope="module")
def nano() -> tuple[Any, Any]:
    return longreach.load("nano")


def overlap(texts: Sequence[str]) -> retrievers.Scores:
    """A retriever without packages: words in common, of which rare ones are not told from others."""
    known = [set(re.findall(r"\w+", text.lower())) for text in texts]
    return lambda query: [float(len(words & set(re.findall(r"\w+", query.lower())))) for words in known]


def haystack(length: int = 30_000) -> str:
    text = longreach.shipped_book()[20_000 : 20_000 + length].strip()
    for number, (city, code) in enumerate(CITIES.items(), 1):
        text = hide(text, f"The courier code of {city} is {code}.", number / 4)
    return text


def asked(city: str) -> dict[str, str]:
    return {"question": f"What is the courier code of {city}?", "lead": f"The courier code of {city} is"}


# -- chunks -----------------------------------------------------------------------------------------------------------------------------


def test_chunks_cover_every_text_exactly():
    rng = Random(1)
    for _ in range(300):
        text = "".join(rng.choice(["a", "word", ". ", "! ", " ", "\n\n", "东京。", "x" * 60]) for _ in range(rng.randrange(1, 80)))
        if not text.strip():
            continue
        words = rng.choice([None, 1, 2, 3, 7, 20])
        documents = chunks.documents_of([text, "second one"])
        found = chunks.split(documents, words)
        assert [chunk.index for chunk in found] == list(range(len(found)))
        for number, document in enumerate(documents):
            own = [chunk for chunk in found if chunk.document == number]
            assert [own[0].start, own[-1].stop] == [0, len(document.text)]
            assert all(one.stop == other.start for one, other in itertools.pairwise(own)) and "".join(chunk.text for chunk in own) == document.text
            assert all(words is None or len(word_starts(chunk.text)) <= words for chunk in own)
            assert all(chunk.text == document.text[chunk.start : chunk.stop] for chunk in own)


def test_a_chunk_ends_with_a_sentence_where_one_ends_in_its_second_half():
    text = "One two three four. Five six seven eight nine ten eleven twelve thirteen."
    assert [chunk.text for chunk in chunks.split(chunks.documents_of(text), 6)] == [
        "One two three four. ", "Five six seven eight nine ten ", "eleven twelve thirteen.",
    ]  # fmt: skip


# -- retrievers -------------------------------------------------------------------------------------------------------------------------


def test_bm25_is_the_formula_and_equal_scores_keep_the_order():
    pytest.importorskip("bm25s")
    texts = ["The courier code of Lisbon is 5.", "Lisbon, the city of Lisbon!", "a whale", "the of and", "another whale swims", "東京都"]
    words = [re.findall(retrievers.TOKEN, text.lower()) for text in texts]
    words = [[word for word in text if word not in {"the", "of", "is", "a", "and"}] for text in words]
    mean = sum(map(len, words)) / len(words)

    def truth(query: list[str]) -> list[float]:
        scores = []
        for text in words:
            count, score = Counter(text), 0.0
            for word in query:
                df = sum(word in other for other in words)
                idf = math.log(1 + (len(words) - df + 0.5) / (df + 0.5))
                score += idf * count[word] / (count[word] + 1.5 * (1 - 0.75 + 0.75 * len(text) / mean))
            scores.append(score)
        return scores

    scores = retrievers.retriever("bm25")(texts)
    for query, of in (("The code of LISBON?", ["code", "lisbon"]), ("whale", ["whale"]), ("京", ["京"]), ("of the", []), ("", []), ("zebra", [])):
        np.testing.assert_allclose(scores(query), truth(of), atol=1e-6)
    assert [place for place, _ in retrievers.best(scores("zebra"), len(texts), 4)] == [0, 1, 2, 3]
    assert [place for place, _ in retrievers.best(scores("whale"), len(texts), 2)] == [2, 4]
    assert list(retrievers.bm25(["the of"])("the")) == [0.0]  # texts without words


def test_a_sentence_transformers_model_ranks_by_cosine_and_a_missing_package_is_said(monkeypatch):
    class Model:
        def __init__(self, name: str, trust_remote_code: bool) -> None:
            if name != "letters":
                raise OSError(f"{name} is not there\nand more")
            assert trust_remote_code is False

        def encode(self, texts: list[str], normalize_embeddings: bool, **how: Any) -> np.ndarray:
            found = np.array([[text.count(letter) + 0.01 for letter in "abc"] for text in texts])
            return found / np.linalg.norm(found, axis=1, keepdims=True)

    module = ModuleType("sentence_transformers")
    module.SentenceTransformer = Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    rag = Rag(*longreach.load("nano"), ["bbb", "aaa", "cab"], RagConfig(top_k=2, retriever="letters"))
    assert [one.chunk.text for one in rag.retrieve("a", 3)] == ["aaa", "cab", "bbb"]
    with pytest.raises(ValueError, match=r"'other' could not be loaded \(other is not there\)"):
        retrievers.retriever("other")(["x"])
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="needs the package sentence-transformers, which is not installed; pip install sentence-transformers, or pass bm25"):
        retrievers.retriever("letters")
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ValueError, match=r"BM25 needs the package bm25s, which is not installed; pip install 'longreach\[rag\]'"):
        Rag(*longreach.load("nano"), "text")


# -- prompts ----------------------------------------------------------------------------------------------------------------------------

DOCUMENTS = chunks.documents_of({"one": "A b. C d. ", "two": "E f."})
PIECES = chunks.split(DOCUMENTS, 2)  # A b. | C d. | E f.


def state(*places: tuple[int, int], **more: Any) -> State:
    """(place, round), best first."""
    return State(tuple(Used(PIECES[place], 1.0, number) for place, number in places), **more)


@pytest.mark.parametrize(
    ("order", "shown"),
    [
        ("rank", "[one]\nC d.\n\n[two]\nE f.\n\n[one]\nA b.\n\nQ?"),  # of the first retrieval the best last, then the second
        ("position", "[one]\nA b. C d.\n\n[two]\nE f.\n\nQ?"),  # neighbours are one passage
    ],
)
def test_chunks_stand_as_the_papers_say(order, shown):
    written = Prompts(bytes_tokenizer(), DOCUMENTS, order, "", False)
    assert written.asked(state((2, 0), (1, 0), (0, 1)), "Q?") == shown


def test_demonstrations_stand_before_the_question_with_chunks_of_their_own():
    shown = ((state((0, 0)), Demonstration("D?", "yes", (Step("S?", "s"),), "It is")),)
    plain = Prompts(bytes_tokenizer(), DOCUMENTS, "rank", "Do.", False, shown)
    text = plain.tokenizer.decode(plain.ids(state((2, 0)), "Q?", "It is"))
    assert text == "<s>Do.\n\n[one]\nA b.\n\nD? It is yes\n\n[two]\nE f.\n\nQ? It is"
    iterative = replace(plain, iterative=True)
    now = state((2, 0), steps=(Step("T?", "t"),), open="U?")
    chain = f"{FOLLOW_UP} S?\n{INTERMEDIATE} s\n{FINAL} It is yes"
    assert iterative.tokenizer.decode(iterative.ids(now, "Q?", "It is")) == (
        f"<s>Do.\n\n[one]\nA b.\n\nD?\n{chain}\n\n[two]\nE f.\n\nQ?\n{FOLLOW_UP} T?\n{INTERMEDIATE} t\n{FOLLOW_UP} U?\n"
    )
    chat = replace(plain, tokenizer=bytes_tokenizer(chat=True))
    assert chat.tokenizer.decode(chat.ids(state((2, 0)), "Q?", "It is")) == (
        "[user]Do.\n\n[one]\nA b.\n\nD?[assistant]It is yes[user][two]\nE f.\n\nQ?[assistant]It is"
    )


# -- the machines -----------------------------------------------------------------------------------------------------------------------


class Scripted:
    """A reader that says what a script says, and counts a token for each piece of a state."""

    def __init__(self, script: Callable[[State, Sequence[str]], tuple[str, str]], cost: Callable[[State], int]) -> None:
        self.script, self.cost, self.asked = script, cost, []  # type: ignore[var-annotated]

    def count(self, now: State) -> int:
        return self.cost(now)

    def ask(self, now: State, begin: Sequence[str]) -> tuple[str, str]:
        word, text = self.script(now, begin) if len(begin) > 1 else (begin[0], self.script(now, begin)[1])
        self.asked.append((now, tuple(begin), word))
        return word, text


def follow_up(now: State, begin: Sequence[str]) -> tuple[str, str]:
    return begin[0], {FOLLOW_UP: f"q{len(now.steps) + 1}?", INTERMEDIATE: f"a{len(now.steps) + 1}", FINAL: "the answer"}[begin[0]]


def test_iterdrag_asks_retrieves_answers_and_is_made_to_end_after_five_rounds():
    searched = []

    def search(query: str, now: State) -> list[Used]:
        searched.append((query, len(now.used)))
        return [Used(PIECES[len(searched) % 3], 1.0, len(now.steps) + 1)]

    reader = Scripted(follow_up, lambda now: 1)
    found = iterdrag(reader, State(), search, Room(None, None), rounds=5, longest=10)
    assert searched == [(f"q{n}?", n - 1) for n in range(1, 6)]
    assert [begin for _, begin, _ in reader.asked] == [(FOLLOW_UP, FINAL), (INTERMEDIATE,)] * 5 + [(FINAL,)]
    assert [now.open for now, _, _ in reader.asked] == [None, "q1?", None, "q2?", None, "q3?", None, "q4?", None, "q5?", None]
    assert [len(now.used) for now, _, _ in reader.asked] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]  # what is retrieved is read with the sub-question
    assert found.state.steps == tuple(Step(f"q{n}?", f"a{n}") for n in range(1, 6))
    assert (found.answer, found.ended, found.calls) == ("the answer", "rounds", (1,) * 11)


def test_iterdrag_ends_by_itself_and_after_an_empty_sub_question():
    def second(now: State, begin: Sequence[str]) -> tuple[str, str]:
        return (FINAL, "early") if now.steps and FINAL in begin else follow_up(now, begin)

    found = iterdrag(Scripted(second, lambda now: 1), State(), lambda query, now: (), Room(None, None), 5, 10)
    assert (found.answer, found.ended, len(found.calls), len(found.state.steps)) == ("early", "by itself", 3, 1)

    def empty(now: State, begin: Sequence[str]) -> tuple[str, str]:
        return begin[0], "" if begin[0] == FOLLOW_UP else "forced"

    reader = Scripted(empty, lambda now: 1)
    found = iterdrag(reader, State(), lambda query, now: pytest.fail("nothing was asked"), Room(None, None), 5, 10)
    assert (found.answer, found.ended, [word for *_, word in reader.asked]) == ("forced", "no question", [FOLLOW_UP, FINAL])


def test_no_history_exceeds_its_budget_and_each_walks_the_states_of_self_ask():
    for seed in range(600):
        rng = Random(seed)
        size, words = rng.randrange(1, 30), rng.randrange(1, 40)
        costs: dict[State, int] = {}

        def cost(now: State, rng: Random = rng, costs: dict[State, int] = costs, size: int = size) -> int:  # not even monotone, as at the seams of tokens
            shown = 10 + size * len(now.used) + 5 * len(now.steps) + (3 if now.open is not None else 0)
            return costs.setdefault(now, shown + rng.randrange(-2, 3))

        def script(now: State, begin: Sequence[str], rng: Random = rng, words: int = words) -> tuple[str, str]:
            return rng.choice(begin), f"{rng.randrange(10**6)}" * rng.randrange(words)

        def search(query: str, now: State, rng: Random = rng) -> list[Used]:
            return [Used(PIECES[rng.randrange(3)], rng.random(), len(now.steps) + 1) for _ in range(rng.randrange(5))]

        reader = Scripted(script, cost)
        room = Room(rng.choice([None, 40, 90]), rng.choice([None, cost(State()), 40, 100, 400, 2000]))
        if not room.fits(cost(State())):
            continue
        rounds = rng.randrange(1, 6)
        found = iterdrag(reader, State(), search, room, rounds, 8)
        assert sum(found.calls) <= (room.total or math.inf) and max(found.calls) <= (room.prompt or math.inf)
        assert found.calls == tuple(cost(now) for now, _, _ in reader.asked) and len(found.state.steps) <= rounds
        walk = "".join({FOLLOW_UP: "f", INTERMEDIATE: "i", FINAL: "F"}[word] for *_, word in reader.asked)
        assert re.fullmatch("(fi)*f?F", walk), walk  # an f that is not answered: nothing was asked, or the budget was too small for its answer
        assert walk.endswith("fF") <= (found.ended in ("no question", "budget"))


def test_a_query_is_scored_once_however_many_chunks_are_tried(nano):
    asked_for = []

    def counting(texts: Sequence[str]) -> retrievers.Scores:
        scores = overlap(texts)
        return lambda query: asked_for.append(query) or scores(query)  # type: ignore[func-returns-value]

    Rag(*nano, haystack(8_000), RagConfig(chunk_words=40, max_new_tokens=4), retriever=counting).ask("Who is Ishmael?")
    assert asked_for == ["Who is Ishmael?"]


def test_most_is_the_largest_that_fits_and_tries_nothing_far_larger():
    for n in range(40):
        for limit in range(-1, 41):
            tried: list[int] = []
            assert most(n, lambda x, tried=tried, limit=limit: tried.append(x) or x <= limit) == (None if limit < 0 else min(n, limit))
            assert len(tried) == len(set(tried)) <= 2 * (limit + 2).bit_length() + 2 and max(tried) <= 2 * max(limit, 0) + 2


# -- constrained decoding -----------------------------------------------------------------------------------------------------------------


def test_an_answer_begins_with_one_of_the_words_and_with_the_likelier_tokens(nano):
    model, tokenizer = nano
    ids = encode(tokenizer, "What is the courier code of Oslo?\n")
    words = [encode(tokenizer, word, special=False) for word in (FOLLOW_UP, FINAL, "So be it")]
    found = generation.answer(model, tokenizer, ids, 20, beginnings=words)
    truth: list[int] = []
    while len(truth) < 20 and (not truth or truth[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            logits = model(torch.tensor([ids + truth]), use_cache=False).logits[0, -1]
        going = [word[len(truth)] for word in words if word[: len(truth)] == truth and len(word) > len(truth)]
        free = any(truth[: len(word)] == word for word in words)
        truth.append(int(logits.argmax()) if free else max(going, key=lambda token: float(logits[token])))
    assert found.ids == truth and any(found.ids[: len(word)] == word for word in words)


def test_each_row_of_a_batch_is_held_to_the_words():
    scores = torch.zeros(3, 6)
    kept = beginnings.begins_with(1, [[1, 2], [1, 3], [4]])[0](torch.tensor([[0, 1], [0, 4], [0, 1]]), scores)
    assert [row.isfinite().nonzero().flatten().tolist() for row in kept] == [[2, 3], [0, 1, 2, 3, 4, 5], [2, 3]]
    assert scores.isfinite().all() and beginnings.begins_with(1, []) == []
    with pytest.raises(ValueError, match="a beginning without tokens"):
        beginnings.begins_with(1, [[1], []])


# -- the whole --------------------------------------------------------------------------------------------------------------------------


def test_retrieval_lets_a_short_window_answer_what_the_cut_text_cannot(nano):
    text = haystack()
    rag = Rag(*nano, text, RagConfig(chunk_words=40, max_new_tokens=12, instruction=""), retriever=overlap)
    assert rag.limit == 512
    for city, code in CITIES.items():
        found = rag.ask(**asked(city))
        assert found.answer.startswith(code) and found.tokens <= 500 and found.ended == "one call"
        assert all(text[one.start : one.stop] == one.text for one in found.passages)
        assert found.passages[-1].score == max(one.score for one in found.passages) and code in "".join(one.text for one in found.passages)
        one_more = len(rag.prompts(found.top_k + 1).ids(rag.state(asked(city)["question"], found.top_k + 1), *asked(city).values()))
        assert found.top_k == len(found.passages) and one_more > 500  # as many as fit
    cut = Rag(*nano, text[:1200], RagConfig(chunk_words=None, max_new_tokens=12), retriever=overlap)
    assert not any(cut.ask(**asked(city)).answer.startswith(code) for city, code in CITIES.items())


def test_all_chunks_in_their_order_are_the_whole_text_and_a_long_prompt_is_read(nano):
    model, tokenizer = nano
    text = haystack(5_000)
    with longreach.extend(model, context=2048) as extension:
        every = Rag(model, tokenizer, text, RagConfig(chunk_words=30, order="position", max_new_tokens=12), extension=extension, retriever=overlap)
        found = every.ask(**asked("Oslo"))
        assert found.top_k == len(every.chunks) and "".join(one.text for one in found.passages) == text
        ids = encode(tokenizer, f"{text}\n\n{' '.join(asked('Oslo').values())}")
        assert found.tokens == len(ids) > 512
        assert found.answer == generation.answer(model, tokenizer, ids, 12, extension=extension, stop=("\n\n",)).text.strip()
        assert found.answer.startswith(CITIES["Oslo"])


@pytest.mark.parametrize("rounds", [0, 1])
def test_questions_together_are_those_alone(nano, rounds, monkeypatch):
    model, tokenizer = nano
    questions, leads = zip(*(asked(city).values() for city in CITIES))
    forwards: list[int] = []
    with longreach.extend(model, context=2048) as extension:
        config = RagConfig(3, chunk_words=40, rounds=rounds, max_new_tokens=12, instruction="")
        rag = Rag(model, tokenizer, haystack(8_000), config, extension=extension, retriever=overlap)
        extension.flat()  # checked once
        with model.register_forward_pre_hook(lambda *given: forwards.append(1)):
            alone = [rag.ask(question, lead=lead) for question, lead in zip(questions, leads)]
            each = len(forwards)
            together = rag.ask_all(questions, lead=leads)
        same = lambda found: (found.answer, found.passages, found.calls, found.new_tokens, found.top_k, found.ended, found.steps)  # noqa: E731
        assert [*map(same, together)] == [*map(same, alone)] and all(found.seconds > 0 for found in together)
        assert len(forwards) - each < each / 2 or rounds
        assert rounds or [found.answer.split(".")[0] for found in together] == [*CITIES.values()]
        with pytest.raises(ValueError, match="the question is empty" if rounds else "question 2: the question is empty"):
            rag.ask_all([questions[0], " "])
        with pytest.raises(ValueError, match="at_once must be at least 1"):
            rag.ask_all(questions, at_once=0)
        with pytest.raises(ValueError, match="3 questions and 2 leads"):
            rag.ask_all(questions[:3], lead=leads[:2])
        with pytest.raises(ValueError, match="pass a list of questions"):
            rag.ask_all(questions[0])


def test_demonstrations_are_read_once_for_all_questions(nano):
    model, tokenizer = nano
    examples = [Demonstration(asked("Cairo")["question"], CITIES["Cairo"], lead=asked("Cairo")["lead"])]
    questions, leads = zip(*(asked(city).values() for city in ("Lisbon", "Oslo")))
    read: list[int] = []
    with longreach.extend(model, context=2048) as extension:
        config = RagConfig(2, chunk_words=40, max_new_tokens=8, instruction="")
        rag = Rag(model, tokenizer, haystack(8_000), config, demonstrations=examples, extension=extension, retriever=overlap)
        alone = [rag.ask(question, lead=lead) for question, lead in zip(questions, leads)]
        extension.flat()
        with model.model.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True):
            together = rag.ask_all(iter(questions), lead=leads)
    assert [(found.answer, found.passages, found.calls) for found in together] == [(found.answer, found.passages, found.calls) for found in alone]
    opening = rag.prompts(2).opening
    assert opening > 50 and sum(read) == sum(sum(found.calls) + found.new_tokens - 1 for found in together) - opening


@pytest.mark.parametrize("ask", ["ask", "ask_all"])
def test_an_extension_that_is_not_in_force_on_the_model_is_refused(nano, ask):
    """The stock model would answer, in prompts that are longer than its window."""
    model, tokenizer = nano
    question = asked("Oslo")["question"]
    with longreach.extend(model, context=1024) as extension:
        rag = Rag(model, tokenizer, haystack(3_000), RagConfig(1, chunk_words=40, max_new_tokens=2), extension=extension, retriever=overlap)
        rag.ask(question)
        other = Rag(longreach.load("nano")[0], tokenizer, haystack(3_000), rag.config, extension=extension, retriever=overlap)
        with pytest.raises(ValueError, match="in force on another model"):
            getattr(other, ask)(question if ask == "ask" else [question])
    for _ in range(2):
        with pytest.raises(ValueError, match="was removed from its model"):
            getattr(rag, ask)(question if ask == "ask" else [question])


def test_what_flat_forwards_do_not_allow_is_answered_one_by_one(nano):
    model, tokenizer = nano
    with longreach.extend(model, SirLLM()) as extension:
        rag = Rag(model, tokenizer, haystack(3_000), RagConfig(1, chunk_words=40, max_new_tokens=2), extension=extension, retriever=overlap)
        with pytest.raises(ValueError, match=r"SirLLM.*or ask\(\) each question by itself"):
            rag.ask_all(["Who?"])
        assert rag.ask("Who?").new_tokens


def test_what_was_read_before_is_not_read_again_and_changes_nothing(nano):
    model, tokenizer = nano
    shown = [Demonstration(asked(city)["question"], CITIES[city], lead=asked(city)["lead"]) for city in ("Lisbon", "Cairo")]
    with longreach.extend(model, context=2048) as extension:
        how = dict(demonstrations=shown, extension=extension, retriever=overlap)
        for config in (RagConfig(2, 40, max_new_tokens=12), RagConfig(2, 40, rounds=2, max_new_tokens=12, instruction="")):
            rag = Rag(model, tokenizer, haystack(8_000), config, **how)
            questions = [asked("Oslo"), asked("Lisbon")]
            together = [rag.ask(**question) for question in questions]
            alone = [Rag(model, tokenizer, haystack(8_000), config, **how).ask(**question) for question in questions]
            assert [(one.answer, one.calls, one.steps) for one in together] == [(one.answer, one.calls, one.steps) for one in alone]
            assert together[1].reused_tokens > 100 and alone[1].reused_tokens < together[1].reused_tokens


class Script:
    """In the place of `generation.answer`: writes the next line of a script with the tokenizer, if it begins as it has to."""

    def __init__(self, *lines: str) -> None:
        self.lines, self.prompts = list(lines), []  # type: ignore[var-annotated]

    def __call__(self, model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int, *, beginnings: list[list[int]], **given: Any) -> generation.Answer:
        line = self.lines.pop(0)
        new = tokenizer(line, add_special_tokens=False)["input_ids"]
        assert any(new[: len(begin)] == begin for begin in beginnings) or not beginnings
        self.prompts.append((tokenizer.decode(ids), len(ids)))
        return generation.Answer(line, new, "stop", 0.0, 0.0, 0, type("Cache", (), {"get_seq_length": lambda self: 0})())


def test_a_scripted_model_walks_through_iterdrag_over_real_prompts(nano, monkeypatch):
    model, _ = nano
    script = Script(
        f"{FOLLOW_UP} Who lives in Oslo?\nmore", f"{INTERMEDIATE} Anna does.\n", f"{FOLLOW_UP} What is Anna's code?", f"{INTERMEDIATE} 77", f"{FINAL} It is 77."
    )
    monkeypatch.setattr(generation, "answer", script)
    facts = ["Anna lives in Oslo.", "The code of Anna is 77.", "Whales swim.", "Bells ring."]
    config = RagConfig(top_k=1, rounds=2, instruction="", chunk_words=None, budget=2000)
    rag = Rag(model, bytes_tokenizer(), facts, config, extension=None, retriever=overlap)
    monkeypatch.setattr(Rag, "limit", None)
    found = rag.ask("Do bells ring?", lead="It is")
    assert (found.answer, found.ended) == ("77.", "rounds")
    assert found.steps == (Step("Who lives in Oslo?", "Anna does."), Step("What is Anna's code?", "77"))
    assert [(one.text, one.round) for one in found.passages] == [(facts[3], 0), (facts[0], 1), (facts[1], 2)]
    assert found.calls == tuple(tokens for _, tokens in script.prompts) and found.tokens == sum(found.calls)
    one, two = f"{FOLLOW_UP} Who lives in Oslo?\n", f"{INTERMEDIATE} Anna does.\n"
    assert script.prompts[1][0] == f"<s>{facts[3]}\n\n{facts[0]}\n\nDo bells ring?\n{one}"
    assert script.prompts[2][0] == f"<s>{facts[3]}\n\n{facts[0]}\n\nDo bells ring?\n{one}{two}"
    end = f"{FOLLOW_UP} What is Anna's code?\n{INTERMEDIATE} 77\n"
    assert script.prompts[4][0] == f"<s>{facts[3]}\n\n{facts[0]}\n\n{facts[1]}\n\nDo bells ring?\n{one}{two}{end}"


def test_demonstrations_are_the_models_own_chains_that_end_right(nano):
    model, tokenizer = nano
    examples = [Demonstration(asked(city)["question"], code, lead=asked(city)["lead"]) for city, code in (("Lisbon", CITIES["Lisbon"]), ("Oslo", "99"))]
    with longreach.extend(model, context=1024) as extension:
        rag = Rag(model, tokenizer, haystack(8_000), RagConfig(1, 40, rounds=2, max_new_tokens=12, instruction=""), extension=extension, retriever=overlap)
        found = rag.demonstrate(examples)
        assert [one.question for one in found] == [examples[0].question]
        assert found[0].steps == rag.ask(**asked("Lisbon")).steps and found[0].answer == CITIES["Lisbon"]
        more = Rag(model, tokenizer, haystack(8_000), rag.config, demonstrations=found, extension=extension, retriever=overlap)
        assert more.ask(**asked("Oslo")).calls[0] > rag.ask(**asked("Oslo")).calls[0]


def test_a_right_answer_is_whole_words():
    assert contains("It is  New\nYork.", "new york") and contains("(77)", "77")
    assert not contains("896999", "99") and not contains("x", "") and not contains("", "x")


def test_every_call_stays_within_the_budget_of_the_real_tokenizer(nano):
    model, tokenizer = nano
    with longreach.extend(model, context=2048) as extension:
        for budget in (300, 700, 1500):
            for rounds in (0, 3):
                config = RagConfig(2, 40, rounds=rounds, budget=budget, max_new_tokens=12, instruction="")
                found = Rag(model, tokenizer, haystack(8_000), config, extension=extension, retriever=overlap).ask("Who is Ishmael?")
                assert found.tokens == sum(found.calls) <= budget and len(found.calls) <= 2 * rounds + 1


# -- what is refused --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"top_k": -1}, "top_k must be a whole number of chunks from 0"),
        ({"top_k": True}, "top_k must be"),
        ({"chunk_words": 0}, "chunk_words must be a whole number of words from 1"),
        ({"rounds": 101, "top_k": 1}, "rounds must be a whole number of sub-questions from 0 to 100"),
        ({"budget": 2**40}, "budget must be a whole number of tokens from 1 to"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"order": "best"}, "there is no order 'best'; pass rank"),
        ({"rounds": 1}, "with rounds, every sub-question needs room for chunks of its own; pass top_k"),
        ({"retriever": " "}, "the retriever has no name; pass bm25"),
        ({"documents": None}, "the documents must be a text, a list of texts, or texts by name, not NoneType"),
        ({"documents": []}, "there are no documents"),
        ({"documents": ["x", " \n"]}, "document 2 is empty"),
        ({"documents": {"a": "x", "b": ""}}, "document 'b' is empty"),
        ({"documents": ["x", 5]}, "document 2 is not text"),
        ({"documents": ["x", "\ud800"]}, "document 2 is not text"),
        ({"question": "\udc80?"}, "the question or its lead is not text"),
        ({"top_k": 4}, "top_k=4 is more than the 3 chunks of the documents; pass top_k=3"),
        ({"question": "  "}, "the question is empty"),
        ({"budget": 3}, r"the question and all .* have \d+ tokens without any chunk, more than the 3 that a prompt may have; pass budget=\d+ \(--budget\)"),
        ({"top_k": 0, "budget": 3}, r"have \d+ tokens without any chunk, more than the 3"),
        ({"budget": 12, "chunk_words": None}, "not one chunk of all the words fits into a prompt of 12 tokens beside the question"),
        ({"top_k": 3, "budget": 12}, r"with 3 chunks the prompt has \d+ tokens, more than the 12 that it may have; pass top_k=\d"),
        ({"max_new_tokens": 512}, "512 new tokens leave no room for a prompt in a context of 512"),
        ({"rounds": 1, "top_k": 1, "max_new_tokens": 505}, r"5\d\d new tokens leave no room for a prompt in a context of 512"),
    ],
)
def test_wrong_inputs_get_one_clear_sentence(nano, given, says):
    pytest.importorskip("bm25s")
    given = {"documents": "A whale swims far. A bell rings out. A sail is torn.", "question": "What swims?", "chunk_words": 4, **given}
    with pytest.raises(ValueError, match=says):
        question, documents = given.pop("question"), given.pop("documents")
        Rag(*nano, documents, RagConfig(**given)).ask(question)


def test_a_demonstration_that_is_no_text_is_named(nano):
    pytest.importorskip("bm25s")
    with pytest.raises(ValueError, match="demonstration 2 is not text"):
        Rag(*nano, "A whale swims far.", RagConfig(), demonstrations=[Demonstration("What?", "A whale"), Demonstration("What?", "\udc80")])


def test_a_budget_that_is_too_small_says_one_that_is_not(nano):
    text, question = haystack(8_000), asked("Oslo")["question"]
    with pytest.raises(ValueError) as refused:
        Rag(*nano, text, RagConfig(8, 60, budget=400), retriever=overlap).ask(question)
    k, budget, context = (int(number) for number in re.findall(r"top_k=(\d+) \(|budget=(\d+)|context=(\d+)", str(refused.value)) for number in number if number)
    assert Rag(*nano, text, RagConfig(k, 60, budget=400), retriever=overlap).ask(question).top_k == k
    with longreach.extend(nano[0], context=context) as extension:
        assert Rag(*nano, text, RagConfig(8, 60, budget=budget), extension=extension, retriever=overlap).ask(question).tokens == budget


def test_scores_that_are_none_and_too_many_chunks_are_refused(nano, monkeypatch):
    for scores in ([1.0], [math.nan, 1.0], "no"):
        with pytest.raises((ValueError, TypeError)):
            Rag(*nano, ["a", "b"], RagConfig(1), retriever=lambda texts, scores=scores: lambda query: scores).ask("x?")
    monkeypatch.setattr(chunks, "MOST_CHUNKS", 3)
    with pytest.raises(ValueError, match="more than 3 chunks of 1 words; pass a larger chunk_words"):
        Rag(*nano, "a b c d e", RagConfig(chunk_words=1), retriever=overlap)


def test_the_snippet_of_the_page_answers(capsys):
    pytest.importorskip("bm25s")
    [snippet] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/rag.md").read_text(encoding="utf-8"), re.S)
    exec(compile(snippet, "docs/rag.md", "exec"), {})
    answer, tokens, start, score = capsys.readouterr().out.split()
    assert answer.startswith("4817203") and 1800 < int(tokens) <= 2000 and int(start) > 59_000 and float(score) > 1


def test_the_names_are_reached_from_the_package():
    assert longreach.apps.Rag is Rag and longreach.apps.RagConfig is RagConfig and asking.Room and prompts.SELF_ASK
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = longreach.apps.Nothing
