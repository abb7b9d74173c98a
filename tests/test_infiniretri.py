"""InfiniRetri: sentences are the text, scores are those of the definition, the memory is capped, and what a text says far from its question is found."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import longreach
from families import build as build_model
from longreach import LMInfinite, SelfExtend, Stock
from longreach.apps import InfiniRetri
from longreach.apps.infiniretri import paid, reading, scores
from longreach.apps.infiniretri.prompt import Frame, build
from longreach.apps.infiniretri.reading import Retrieved
from longreach.apps.infiniretri.sentences import LONGEST, Sentence, chunks, measured, sentences
from longreach.hf.checks import find_base
from longreach.running import generation
from tiny import tokenizer as byte_tokenizer

HOSTILE = {
    "no end": "word" * 30_000,
    "no end, spaces": "word " * 25_000,
    "white space": "a" + " \n\t" * 3000 + "b",
    "full stops": "." * 5000 + " " + "?!" * 1000,
    "quotes": 'He said: "No." ("Yes!") ' * 100,
    "lines": "\n\n\n".join("a line without an end" for _ in range(300)),
    "full width": "\u6211\u5011\u770b\u898b\u4e86\u5927\u6d77\u3002\u5b83\u662f\u85cd\u8272\u7684\uff01" * 200,
    "families": "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466" * 2000,
    "ligature": "\ufdfa\ufb03\u0308" * 1000,
    "controls": "\x00\x01\u2028\u2029\ufeff\u202e" * 500,
    "one": "x",
}


def cut(text: str, rng: Random) -> Iterator[str]:
    """In pieces of any lengths, none of them too."""
    at = 0
    while at < len(text):
        size = rng.choice([0, 1, 2, 7, 100, 5000])
        yield text[at : at + size]
        at += size


@pytest.fixture(scope="module")
def nano() -> Any:
    return longreach.load("nano")


@pytest.fixture(scope="module")
def book() -> str:
    return longreach.shipped_book()


def hidden(book: str, rng: Random, size: int) -> tuple[str, str]:
    """A passage with a key somewhere in it."""
    key, at = str(rng.randrange(10_000, 100_000)), rng.randrange(1000, 400_000)
    passage = book[at : at + size]
    where = passage.find(". ", rng.randrange(size // 2)) + 2
    return f"{passage[:where]}The pass key is {key}. Remember it. {key} is the pass key. {passage[where:]}", key


PAGE = Path(__file__).resolve().parent.parent / "docs/infiniretri.md"
QUESTION = "What is the pass key? The pass key is"


# -- texts ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*HOSTILE, "book"])
def test_sentences_are_the_text_however_it_comes(name, book):
    text = HOSTILE.get(name, book[:60_000])
    found = list(sentences([text]))
    assert "".join(sentence.text for sentence in found) == text and all(0 < len(sentence.text) <= LONGEST for sentence in found)
    assert all(text[sentence.start : sentence.stop] == sentence.text for sentence in found)
    for seed in range(3):
        assert list(sentences(cut(text, Random(seed)))) == found
        after = Random(seed).randrange(len(found))
        assert list(sentences(cut(text, Random(seed)), found[after].start)) == found[after:]


def test_where_sentences_end():
    western = 'Call me Ishmael. Mr. B. said so.\nHe said: "No way!" She went (at 3.14 p.m.) away.\n\nChapter two \n \n It is a long way\nhome '
    text = western + "\u5927\u6d77" + "\u5927" * 9 + "\u3002\u5b83"
    assert [sentence.text for sentence in sentences([text])] == [
        "Call me Ishmael. ",
        "Mr. B. said so.\n",
        'He said: "No way!" ',
        "She went (at 3.14 p.m.) away.\n\n",
        "Chapter two \n \n ",
        "It is a long way\nhome \u5927\u6d77" + "\u5927" * 9 + "\u3002",
        "\u5b83",
    ]


@pytest.mark.parametrize("name", HOSTILE)
def test_tokens_of_sentences_are_those_of_the_text(name, nano):
    """Byte by byte too, where a character is several tokens; what is too long is cut."""
    text = HOSTILE[name][:20_000]
    for tokenizer in (nano[1], byte_tokenizer()):
        found = list(measured(tokenizer, sentences([text]), 20))
        assert "".join(sentence.text for sentence, _ in found) == text and all(text[s.start : s.stop] == s.text for s, _ in found)
        assert all(count <= 20 or len(sentence.text) == 1 for sentence, count in found)
        whole = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert whole <= sum(count for _, count in found) <= whole + 2 * (len(text) // 2**13 + 1)
        packed = list(chunks(tokenizer, [text], 64, 20))
        assert [sentence for chunk, _ in packed for sentence in chunk] == [sentence for sentence, _ in found]
        assert all(size <= 64 or len(chunk) == 1 for chunk, size in packed)


def test_half_a_character_is_refused():
    with pytest.raises(ValueError, match="character 9005 of the text is half a surrogate pair"):
        list(sentences(["a" * 9000, "bcdef\ud800"]))


# -- prompts --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_every_token_of_a_prompt_is_known_by_its_place(chat):
    tokenizer = byte_tokenizer(chat)
    frame = Frame.of(tokenizer, "  Who is it?\n", lead=" It is")
    given = [Sentence("\n One is here. ", 0), Sentence("Two\u00e9.", 40), Sentence("Three.", 45), Sentence(" Four. \n", 60)]
    prompt = build(tokenizer, frame, given)
    text = tokenizer.decode(prompt.ids, skip_special_tokens=True)
    middle = "One is here. Two\u00e9.Three.  Four."
    assert text == (f"[user]{middle}\n\nWho is it?[assistant] It is" if chat else f"{middle}\n\nWho is it? It is")
    assert tokenizer.decode(prompt.ids[prompt.question]) == "Who is it?" and tokenizer.decode(prompt.ids[prompt.context]) == middle
    own = [[prompt.ids[prompt.context][n] for n, owner in enumerate(prompt.owners) if owner == number] for number in range(4)]
    assert [tokenizer.decode(ids) for ids in own] == ["One is here. ", "Two\u00e9.", "Three. ", " Four."]


def test_a_prompt_without_sentences_and_one_of_white_space(nano):
    tokenizer = nano[1]
    frame = Frame.of(tokenizer, QUESTION)
    for given in ([], [Sentence(" \n", 0)]):
        prompt = build(tokenizer, frame, given)
        assert prompt.owners == [] and tokenizer.decode(prompt.ids[prompt.question]).strip() == QUESTION


def test_a_template_that_changes_the_question_still_has_rows():
    frame = Frame.around("<u>", "\n\nWHO IS IT?</u>", "Who is it?", False)
    prompt = build(byte_tokenizer(), frame, [Sentence("A text.", 0)])
    assert byte_tokenizer().decode(prompt.ids[prompt.question]) == "WHO IS IT?</u>"


# -- scores ---------------------------------------------------------------------------------------------------------------------------


def by_definition(a: torch.Tensor, question: range, context: range, phrase: int) -> list[float]:
    """As the paper's code has it: rows weighted twice by what they pay to the question, each convolved with ones, columns added up."""
    rows = []
    for row in a.tolist():
        weight = sum(row[q] for q in question)
        values = [weight * weight * row[j] for j in context]
        first = (phrase - 1) // 2
        rows.append([sum(values[max(0, j - first) : j - first + phrase]) for j in range(len(values))])
    return [sum(row[n] for row in rows) for n in range(len(context))]


def owners_of_best(score: list[float], owners: list[int], top_k: int) -> set[int]:
    return {owners[n] for n in sorted(range(len(score)), key=lambda n: -score[n])[:top_k]}


@pytest.mark.parametrize("phrase", [1, 2, 3, 8, 100])
def test_scores_are_those_of_the_definition(phrase):
    a = torch.rand(9, 60, generator=torch.Generator().manual_seed(phrase), dtype=torch.float64)
    found, want = scores.token_scores(a, slice(50, 55), slice(4, 45), phrase), by_definition(a, range(50, 55), range(4, 45), phrase)
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64))
    for top_k in (1, 5, 12, 100):
        for owners in (list(range(41)), [n // 5 for n in range(41)]):
            assert set(scores.best(found, owners, top_k)) == owners_of_best(found.tolist(), owners, top_k)


def test_the_best_come_first_and_of_equals_the_earlier():
    assert scores.best(torch.tensor([1.0, 3.0, 3.0, 0.0, 5.0]), [0, 1, 2, 2, 3], 4) == [3, 1, 2, 0]
    with pytest.raises(ValueError, match="NaN or infinity"):
        scores.token_scores(torch.full((2, 4), float("nan")), slice(3, 4), slice(0, 3), 2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
@torch.no_grad()
def test_what_is_remembered_is_what_eager_attention_says(family):
    """Chunk by chunk, from Transformers' attentions of the whole prompt."""
    model, tokenizer = build_model(family, vocab_size=259, attn_implementation="eager", max_position_embeddings=512), byte_tokenizer()
    asking = InfiniRetri(model, tokenizer, chunk_tokens=160, memory_tokens=200, top_k=12, layer=1)
    text = " ".join(f"Number {n} is {n * n}." for n in range(60))
    frame = Frame.of(tokenizer, "What is 7?")
    memory: list[Sentence] = []
    for chunk, _ in chunks(tokenizer, [text], 160, 50):
        placed = [*sorted(memory, key=lambda sentence: sentence.start), *chunk]
        prompt = build(tokenizer, frame, placed)
        eager = model(torch.tensor([prompt.ids]), output_attentions=True, use_cache=False).attentions[1][0, :, :, : len(prompt.ids)].sum(0)
        columns = range(prompt.context.start, prompt.context.stop)
        rows = eager[prompt.question.start :]
        kept = owners_of_best(by_definition(rows, range(prompt.question.start, prompt.question.stop), columns, 8), prompt.owners, 12)
        memory = [placed[number] for number in kept]
        assert sum(prompt.owners.count(number) for number in kept) <= 200, "the cap does not bind here"
    with asking.attached() as extension:
        found = asking.read(extension, text, [frame], asking.sizes(extension, [frame], 4))
    assert set(found.memories[0]) == set(memory) and found.chunks > 5


# -- reading --------------------------------------------------------------------------------------------------------------------------


def test_a_key_far_from_its_question_is_found_with_its_place(nano, book):
    model, tokenizer = nano
    before = model(torch.arange(5)[None]).logits
    for seed in range(3):
        text, key = hidden(book, Random(seed), 8000)
        found = InfiniRetri(model, tokenizer).ask(text, QUESTION, max_new_tokens=10)
        assert isinstance(found, Retrieved) and key in found.answer
        assert any(key in sentence.text for sentence in found.sentences)
        assert all(text[sentence.start : sentence.stop] == sentence.text for sentence in found.sentences)
        assert found.chunks > 5 and found.tokens == pytest.approx(len(tokenizer(text)["input_ids"]), abs=4) and found.seconds > 0
    assert torch.equal(model(torch.arange(5)[None]).logits, before), "the model is as it was"


def test_the_best_sentence_stands_next_to_the_question_unless_the_order_of_the_text_is_asked_for(nano, monkeypatch):
    model, tokenizer = nano
    memory = [Sentence("The best one. ", 500), Sentence("The second. ", 20), Sentence("The third. ", 900)]
    asked: list[list[int]] = []
    real = generation.answer
    monkeypatch.setattr(generation, "answer", lambda model, tokenizer, ids, *rest, **how: (asked.append(ids), real(model, tokenizer, ids, *rest, **how))[1])
    for order, stands in (("rank", "The third. The second. The best one."), ("text", "The second. The best one. The third.")):
        asking = InfiniRetri(model, tokenizer, order=order)
        with asking.attached() as extension:
            frame = Frame.of(tokenizer, "Why?")
            _, kept = asking.answer(extension, frame, memory, asking.sizes(extension, [frame], 4), 4)
        assert stands in tokenizer.decode(asked.pop()) and [sentence.start for sentence in kept] == [20, 500, 900]
    with pytest.raises(ValueError, match='order must be "rank" or "text"'):
        InfiniRetri(model, tokenizer, order="best")


def test_questions_together_are_those_alone_and_pieces_the_whole(nano, book):
    model, tokenizer = nano
    text, key = hidden(book, Random(5), 2500)
    questions = [QUESTION, "What is the name of the ship, and who is its captain? The name", "Who?"]
    seen: list[int] = []
    with longreach.extend(model, Stock()) as extension:
        asking = InfiniRetri(extension, tokenizer, chunk_tokens=200, memory_tokens=100)
        together = asking.ask_all(text, questions, 6, progress=seen.append)
        alone = [asking.ask(io.StringIO(text), question, max_new_tokens=6) for question in questions]
    assert [(f.answer, f.sentences, f.chunks) for f in together] == [(f.answer, f.sentences, f.chunks) for f in alone]
    assert len({found.sentences for found in together}) == 3 and key in together[0].answer
    assert seen == sorted(seen) and seen[-1] == len(text) and len(seen) == together[0].chunks


def test_without_sizes_the_longest_question_decides_them_for_all(nano, book):
    model, tokenizer = nano
    questions = ["Who?", "Is it true that Queequeg sleeps with his boots on, and what does the landlord say about it, when the harpooneer comes home?"]
    with longreach.extend(model, Stock()) as extension:
        asking = InfiniRetri(extension, tokenizer, layer=1)
        together = asking.ask_all(book[:3000], (question for question in questions), 4)
        longest = asking.ask(book[:3000], questions[1], max_new_tokens=4)
        given = InfiniRetri(extension, tokenizer, longest.sizes.chunk, longest.sizes.memory, layer=1)
        alone = [given.ask(book[:3000], question, max_new_tokens=4) for question in questions]
        own = asking.ask(book[:3000], questions[0], max_new_tokens=4)
    assert [(f.answer, f.sentences, f.sizes) for f in together] == [(f.answer, f.sentences, f.sizes) for f in alone]
    assert own.sizes.chunk > together[0].sizes.chunk


def test_a_reading_goes_on_where_it_stood(book):
    model, tokenizer, text = build_model("llama", vocab_size=259, max_position_embeddings=512), byte_tokenizer(), book[:6000]
    asking = InfiniRetri(model, tokenizer, chunk_tokens=300, memory_tokens=60)
    with asking.attached() as extension:
        frames = [Frame.of(tokenizer, question) for question in ("Why?", "Who is it?")]
        sizes = asking.sizes(extension, frames, 2)
        whole = list(asking.steps(extension, text, frames, sizes))
        assert len(whole) > 20 and [read.chunks for read in whole] == list(range(1, len(whole) + 1))
        assert list(asking.steps(extension, cut(text, Random(1)), frames, sizes, whole[-6])) == whole[-5:]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_read_and_the_memory_keeps_its_size(name, chat, monkeypatch):
    """The prompts are what is promised: no longer than the window, and at most so much of them is remembered."""
    model, tokenizer, text = build_model("llama", vocab_size=259, max_position_embeddings=512), byte_tokenizer(chat), HOSTILE[name][:6000]
    asked: list[Any] = []
    real = reading.paid_by
    monkeypatch.setattr(reading, "paid_by", lambda extension, layers, some, pad: (asked.extend(some), real(extension, layers, some, pad))[1])
    found = InfiniRetri(model, tokenizer, chunk_tokens=300, memory_tokens=60).ask(text, "Why?", max_new_tokens=2)
    assert all(len(prompt.ids) <= 512 for prompt in asked) and len(asked) == found.chunks
    stops = [0, *(prompt.sentences[-1].stop for prompt in asked)]
    assert stops[-1] == len(text)
    for prompt, stop in zip(asked, stops):
        memory = [n for n, sentence in enumerate(prompt.sentences) if sentence.start < stop]
        assert sum(prompt.owners.count(n) for n in memory) <= 60
        assert all(text[sentence.start : sentence.stop] == sentence.text for sentence in prompt.sentences)
    assert all(text[sentence.start : sentence.stop] == sentence.text for sentence in found.sentences)


@pytest.mark.parametrize("method", [SelfExtend(4, 64), LMInfinite(200, 4)], ids=str)
def test_under_a_method_prompts_are_as_long_as_it_sees(method, nano, book):
    model, tokenizer = nano
    text, key = hidden(book, Random(3), 6000)
    with longreach.extend(model, method, context=1500 if isinstance(method, SelfExtend) else None) as extension:
        found = InfiniRetri(extension, tokenizer).ask(text, QUESTION, max_new_tokens=10)
        assert extension.attached
    assert found.sizes.limit == (1500 if isinstance(method, SelfExtend) else 200) and key in found.answer
    assert found.sizes.chunk > 512 if isinstance(method, SelfExtend) else found.sizes.chunk < 200


def test_many_questions_do_not_make_one_forward(nano, book, monkeypatch):
    model, tokenizer = nano
    monkeypatch.setattr(paid, "TOKENS_AT_ONCE", 1000)
    read: list[torch.Tensor] = []
    hook = find_base(model).register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    with hook:
        found = InfiniRetri(model, tokenizer).ask_all(book[:2000], [f"What is {n}?" for n in range(5)], 1)
    assert len(found) == 5 and max(ids.numel() for ids in read) <= 1000 and 1 < max(map(len, read)) < 5


def test_the_last_layer_that_sees_the_whole_is_looked_at(nano):
    tokenizer = byte_tokenizer()
    for family, want in (("llama", 1), ("mistral-sliding", 1)):
        model = build_model(family, vocab_size=259, max_position_embeddings=512)
        asking = InfiniRetri(model, tokenizer, layer="last")
        with asking.attached() as extension:
            assert asking.tapped(extension) == want
    model = build_model("gemma3", vocab_size=259, max_position_embeddings=512, layer_types=["full_attention", "sliding_attention"])
    asking = InfiniRetri(model, tokenizer)
    with asking.attached() as extension:
        assert asking.tapped(extension) == 0 and asking.sizes(extension, [Frame.of(tokenizer, "Why?")], 8).limit == 512
    with pytest.raises(ValueError, match="a prompt may have 24 tokens here"):  # the window of the layer that is looked at
        InfiniRetri(model, tokenizer, layer=1).ask("A text. " * 50, "Why?")


def test_a_calibration_names_the_layer_that_knows(nano):
    asking = InfiniRetri(*nano)
    found = asking.calibrate(samples=3)
    assert list(found.needed) == [0, 1, 2, 3] and found.needed[found.layer] <= 1.25 * min(found.needed.values())
    assert all(needed > 1.25 * min(found.needed.values()) for layer, needed in found.needed.items() if layer < found.layer)
    assert found.needed[found.layer] < 60 < found.needed[0] < asking_chunk(asking), "the first layer does not know"
    assert asking.calibrate(samples=3) == found and asking.calibrate(samples=3, seed=1) != found
    with pytest.raises(ValueError, match="at least one sample"):
        asking.calibrate(samples=0)


def asking_chunk(asking: InfiniRetri) -> int:
    with asking.attached() as extension:
        return asking.sizes(extension, [Frame.of(asking.tokenizer, "Why?")], 16).chunk


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(text="", question="Why?"), "the text is empty"),
        (dict(text=" \n" * 500, question="Why?"), "the text is empty"),
        (dict(text=[], question="Why?"), "the text is empty"),
        (dict(text=[b"A text."], question="Why?"), "the text must be a string, or come in strings, not in bytes"),
        (dict(text=7, question="Why?"), "the text must be a string"),
        (dict(text="A text.", question=" "), "the question is empty"),
        (dict(text="A text.", question="Why\ud800?"), "character 3 of the question is half a surrogate pair"),
        (dict(text="A text.", question=None), "the question must be a string"),
        (dict(text="A text.", question="Why? " * 500), "a prompt may have 512 tokens here"),
        (dict(text="A text.", question="Why?", max_new_tokens=600), "an answer of 600"),
        (dict(text="A text.", question="Why?", max_new_tokens=0), "max_new_tokens must be a whole number of at least 1, not 0"),
        (dict(text="A text.", question="Why?", max_new_tokens="8"), "max_new_tokens must be a whole number of at least 1, not '8'"),
        (dict(text="A text.", question="Why?", chunk_tokens=4096), "no room for chunks of 4096"),
        (dict(text="A text.", question="Why?", memory_tokens=500), "500 that are remembered"),
        (dict(text="A text.", question="Why?", chunk_tokens=3), "chunk_tokens must be a whole number of at least 32"),
        (dict(text="A text.", question="Why?", top_k=0), "top_k must be"),
        (dict(text="A text.", question="Why?", phrase=True), "phrase must be"),
        (dict(text="A text.", question="Why?", layer=9), "layer must be one of the 4"),
        (dict(text="A text.", question="Why?", layer="first"), 'at least 0, "last" or "auto", not \'first\''),
        (dict(text="A text.", question="Why?", system="Be kind."), "no chat template"),
    ],
)
def test_what_cannot_be_is_one_sentence(given, says, nano):
    text, question = given.pop("text"), given.pop("question")
    how = {"max_new_tokens": given.pop("max_new_tokens", 8)}
    with pytest.raises(ValueError, match=says):
        InfiniRetri(*nano, **given).ask(text, question, **how)


@pytest.mark.parametrize("given", [dict(chunk_tokens=450), dict(chunk_tokens=300, memory_tokens=180), dict(memory_tokens=32)], ids=str)
def test_sizes_that_fit_the_question_fit_whatever_the_layers_are_compared_with(given, nano, book):
    """The comparison has a longer question and a longer answer of its own."""
    found = InfiniRetri(*nano, **given).ask(book[:2000], "Why?", max_new_tokens=4)
    assert {"chunk_tokens": found.sizes.chunk, "memory_tokens": found.sizes.memory}.items() >= given.items()


def test_a_window_without_room_for_the_comparison_says_so(nano, book):
    model, tokenizer = nano
    with longreach.extend(model, Stock(), context=130) as extension:
        assert InfiniRetri(extension, tokenizer, 32, 32, layer=1).ask(book[:500], "?", max_new_tokens=1).chunks
        with pytest.raises(ValueError, match=r"the layers cannot be compared here: a prompt may have 130.*--layer last"):
            InfiniRetri(extension, tokenizer, 32, 32).ask(book[:500], "?", max_new_tokens=1)


@pytest.mark.parametrize("snippet", [part.split("```")[0] for part in PAGE.read_text(encoding="utf-8").split("```python\n")[1:]])
def test_the_snippets_of_the_page_run(snippet, capsys):
    exec(compile(snippet, PAGE.name, "exec"), {"__name__": "snippet"})
    assert "48213" in (said := capsys.readouterr().out) or "{0: " in said


def test_a_removed_extension_and_a_list_of_nothing_are_refused(nano):
    model, tokenizer = nano
    with longreach.extend(model, Stock()) as extension:
        pass
    with pytest.raises(ValueError, match="was removed"):
        InfiniRetri(extension, tokenizer).ask("A text.", "Why?")
    for wrong in ([], "Why?"):
        with pytest.raises(ValueError, match="at least one question"):
            InfiniRetri(model, tokenizer).ask_all("A text.", wrong)


def test_a_question_longer_than_the_chunk(nano, book):
    question = f"{book[1000:1500].strip()} {QUESTION}"
    found = InfiniRetri(*nano, chunk_tokens=64, memory_tokens=100).ask(book[:1500], question, max_new_tokens=4)
    assert (found.sizes.chunk, found.sizes.memory) == (64, 100) < (len(nano[1](question)["input_ids"]),) and found.chunks > 5 and found.sentences


def test_memory_does_not_grow_with_the_text(nano, book):
    """What is held while a text is read: pieces come when they are asked for, and only sentences that are remembered stay."""
    model, lines, taken, ahead = build_model("llama", vocab_size=259, max_position_embeddings=512), book[:60_000].splitlines(keepends=True), 0, []

    def pieces() -> Iterator[str]:
        nonlocal taken
        for line in lines:
            taken += len(line)
            yield line

    found = InfiniRetri(model, byte_tokenizer()).ask(pieces(), "Why?", max_new_tokens=1, progress=lambda done: ahead.append(taken - done))
    assert taken == 60_000 and len(ahead) == found.chunks > 100 and max(ahead) < 2 * (2**13 + LONGEST)
