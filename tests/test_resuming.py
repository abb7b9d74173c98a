"""A text that is kept while it is read: what a folder holds goes on to the same end; another text, model or method is refused, and what is damaged."""

from __future__ import annotations

import copy
import gzip
import os
import random
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import longreach
import methods_matrix
from commands import Run, refused
from families import build, tokens
from histories import constants
from longreach import InfiniteHiP, InfLLM, LMInfinite, LongHeads, Quest, SelfExtend, SirLLM, StreamingLLM, files
from longreach.cli import parameters, text
from longreach.hf import documents
from longreach.memory import sealed
from longreach.running import long_text, pieces, prompts, resuming
from longreach.running.conversation import Conversation
from scripts import scripts
from test_matrix import difference
from test_tiers import budgets
from tiny import tokenizer

CUT = InfLLM(9, 3, 4, 2, repr_topk=2, exc_block_size=8)
METHODS = [SelfExtend(8, 16), LMInfinite(32, 4), StreamingLLM(32, 4), Quest(12, 4, 1, "all"), Quest(12, 4, 1), CUT, LongHeads.small(8), InfiniteHiP.small(8)]


@pytest.fixture(autouse=True)
def every_chunk(monkeypatch: pytest.MonkeyPatch, small_blocks: None) -> None:
    """It is saved between any two chunks."""
    monkeypatch.setattr(resuming, "SHARE", 1e9)


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", eos_token_id=None)


def read(extension: Any, ids: Any, folder: Path | None, chunk_size: int = 16, most: int = 10**9) -> tuple[dict[int, torch.Tensor], Any]:
    """The losses of every chunk by its first token, of at most so many chunks, and the cache."""
    found, cache = {}, None
    for chunk in longreach.stream(extension, ids, chunk_size=chunk_size, resume=folder):
        found[chunk.start], cache = chunk.losses, chunk.cache
        if len(found) == most:
            break
    return found, cache


@pytest.mark.parametrize("tiers", [False, True], ids=["", "tiers"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.brief())
@torch.no_grad()
def test_it_goes_on_to_the_same_end(model, method, tiers, tmp_path):
    """Broken off after 1, 2, ... chunks and read on in a new extension each time: the losses and the logits of what follows are the same, without
    tiers to the bit. Over tiers blocks come back in other places, so parts may be others."""
    ids = tokens(1, 203)[0]
    memory = {"memory": budgets(tmp_path, 4 if method.choice is None else 160, 4, 200, block=8)} if tiers else {}
    with longreach.extend(model, method, trained_window=512, **memory) as extension:
        want, cache = read(extension, ids[:-1], None)
        end = model(ids[None, -1:], past_key_values=cache).logits
    found: dict[int, torch.Tensor] = {}
    for most in (1, 2, 1, 4, 3, 100):
        with longreach.extend(model, method, trained_window=512, **memory) as extension:
            begins = resuming.held(tmp_path / "kept")
            some, cache = read(extension, iter(ids[:-1].tolist()), tmp_path / "kept", most=most)
            assert min(some) == begins and begins % (method.cut or 1) == 0
            found |= some
            if most == 100:
                again = model(ids[None, -1:], past_key_values=cache).logits
                assert torch.equal(again, end) or (tiers and difference(again, end) <= 1e-5)
    assert found.keys() == want.keys()
    losses, again = (torch.cat([each[start] for start in sorted(each)]) for each in (want, found))
    assert losses[0].isnan() and (torch.equal(losses[1:], again[1:]) or (tiers and (losses - again)[1:].abs().max() <= 1e-5))
    assert resuming.held(tmp_path / "kept") > 150


def test_a_text_that_was_read_has_its_last_chunk_left(model, tmp_path):
    ids = tokens(1, 100)[0]
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        first, _ = read(extension, ids, tmp_path / "kept", 30)
        again, cache = read(extension, ids, tmp_path / "kept", 30)
        assert list(first) == [0, 30, 60, 90] and list(again) == [90] and torch.equal(again[90], first[90]) and cache.get_seq_length() == 100
        longer, _ = read(extension, torch.cat([ids, ids]), tmp_path / "kept", 30)
        assert list(longer) == [90, 120, 150, 180], "a text that has grown"


def test_a_shorter_text_that_ends_where_the_folder_does_has_no_chunk_left(model, tmp_path):
    ids = tokens(1, 100)[0]
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        read(extension, ids, tmp_path / "kept", 30)
        assert read(extension, ids[:90], tmp_path / "kept", 30) == ({}, None)


def test_saving_takes_its_share_of_the_time(model, tmp_path, monkeypatch):
    """0 s between chunks and 20 s for a save: none follows the first until 400 s have passed; but one comes before the last chunk."""
    now, saved = [0.0], []
    monkeypatch.setattr(resuming, "SHARE", 0.05)
    monkeypatch.setattr(resuming.time, "perf_counter", lambda: now[0])
    with longreach.extend(model, SelfExtend(8, 16)) as extension:

        def save(*args: Any, **more: Any) -> None:
            saved.append(args[1].get_seq_length())
            now[0] += 20

        monkeypatch.setattr(resuming.documents, "save", save)
        for chunk in longreach.stream(extension, tokens(1, 100)[0], chunk_size=10, resume=tmp_path / "kept"):
            now[0] += 150 if chunk.start >= 40 else 0
    assert saved == [10, 70, 90]


# -- what is refused ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [tokens(1, 100, seed=8)[0], tokens(1, 20)[0], [], torch.cat([tokens(1, 31)[0], tokens(1, 80, seed=9)[0]])], ids=len)
def test_another_text_is_refused(model, ids, tmp_path):
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        read(extension, tokens(1, 100)[0], tmp_path / "kept", 16, most=4)
        before = sealed.read(tmp_path / "kept")
        for each in (ids, iter(list(map(int, ids)))):
            with pytest.raises(ValueError, match=r"the 48 tokens that .*kept' holds are not the beginning of this text; .* or name another folder"):
                read(extension, each, tmp_path / "kept")
        assert sealed.read(tmp_path / "kept") == before


def test_another_model_method_or_context_is_refused(model, tmp_path):
    ids = tokens(1, 100)[0]
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        read(extension, ids, tmp_path / "kept", most=3)
    with longreach.extend(model, SelfExtend(8, 17)) as extension, pytest.raises(ValueError, match=r"was read with SelfExtend\(group_size=8, window=16"):
        read(extension, ids, tmp_path / "kept")
    with longreach.extend(model, SelfExtend(8, 16), context=200) as extension, pytest.raises(ValueError, match="read for a context of None"):
        read(extension, ids, tmp_path / "kept")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with longreach.extend(other, SelfExtend(8, 16)) as extension, pytest.raises(ValueError, match="other weights"):
        read(extension, ids, tmp_path / "kept")


def test_a_method_that_cannot_go_on_is_refused(model, tmp_path):
    with longreach.extend(model, SirLLM(18, 2, 4)) as extension, pytest.raises(ValueError, match=r"turns that came\); leave out resume"):
        read(extension, tokens(1, 100)[0], tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_other_folders_and_arguments_are_refused(model, tmp_path):
    ids = tokens(1, 100)[0]
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        _, cache = read(extension, ids, None)
        extension.save(cache, tmp_path / "document", ids)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("x")
        (tmp_path / "file").write_text("x")
        for name, says in (("document", "holds a document"), ("mine", "holds other things"), ("file", "is a file"), ("no/such", "create it first")):
            with pytest.raises(ValueError, match=says):
                read(extension, ids, tmp_path / name)
        with pytest.raises(ValueError, match="leave out cache"):
            next(longreach.stream(extension, ids, cache=cache, resume=tmp_path / "kept"))
    with pytest.raises(ValueError, match="what extend"):
        next(longreach.stream(model, ids, resume=tmp_path / "kept"))


@pytest.mark.parametrize("begun", [False, True])
def test_two_readings_of_one_folder_do_not_write_over_each_other(model, begun, tmp_path):
    """Of other texts or the same: the second to save is refused, the first goes on."""
    ids, others = tokens(1, 200)[0], tokens(1, 200, seed=3)[0]
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        if begun:
            read(extension, ids, tmp_path / "kept", most=3)
            others = ids
        one, two = (longreach.stream(extension, each, chunk_size=16, resume=tmp_path / "kept") for each in (ids, others))
        next(one), next(two), next(one)
        with pytest.raises(ValueError, match="another one keeps a text in it too; nothing was written over"):
            next(two)
        list(one)
        assert list(read(extension, ids, tmp_path / "kept")[0]) == [192]


def test_a_save_that_another_one_overtakes_is_refused(model, monkeypatch, tmp_path):
    """Two begin to save at the same instant: what the folder holds is looked at when nobody else can write to it any more."""
    ids, others, real = tokens(1, 200)[0], tokens(1, 200, seed=3)[0], documents._folder
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        one, two = (longreach.stream(extension, each, chunk_size=16, resume=tmp_path / "kept") for each in (ids, others))
        next(one), next(two)

        @contextmanager
        def overtaken(file: Path) -> Iterator[Path]:
            monkeypatch.setattr(documents, "_folder", real)
            next(one)
            with real(file) as folder:
                yield folder

        monkeypatch.setattr(documents, "_folder", overtaken)
        with pytest.raises(ValueError, match="another one keeps a text in it too; nothing was written over"):
            next(two)
        assert extension.load(tmp_path / "kept").cache.get_seq_length() == 16 and sum(1 for _ in one) > 5


def test_what_is_damaged_is_refused_and_what_was_not_finished_is_cut_off(model, tmp_path):
    ids, folder = tokens(1, 300)[0], tmp_path / "kept"
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        read(extension, ids, folder, most=15)
        want = resuming.held(folder)
        manifest = sealed.read(folder)
        blocks = folder / sealed.blocks_name(manifest.blocks[-1].number)
        with open(blocks, "ab") as file:
            file.write(b"half a record")
        (folder / f".tail-{99:08d}.{'0' * 16}.partial").write_bytes(b"torn")
        assert min(read(extension, ids, folder, most=2)[0]) == want
        assert not list(folder.glob(".*")) and blocks.stat().st_size == sealed.read(folder).blocks[-1].bytes
        for path in (sealed.tail_path(folder, sealed.read(folder).tail.number), blocks, folder / sealed.MANIFEST):
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
            with pytest.raises(ValueError, match=r"damaged or forged.*remove the folder or name another"):
                read(extension, ids, folder)
            path.write_bytes(whole)
        read(extension, ids, folder)


def test_logits_of_another_size_are_refused(model, tmp_path):
    ids = tokens(1, 100)[0]
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        kept = resuming.Kept(extension, tmp_path / "kept")
        model(kept.rest(ids)[None, :40], past_key_values=kept.cache)
        kept._count(ids[:40].tolist())
        kept.save(40, torch.zeros(5))
        with pytest.raises(ValueError, match="damaged or forged; remove the folder"):
            read(extension, ids, tmp_path / "kept")


@pytest.mark.parametrize("note", ['{"tokens": 7, "sha256": "x"}', "[]", '{"tokens": true}', "{"])
def test_forged_notes_are_refused(model, note, tmp_path):
    ids = tokens(1, 100)[0]
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        _, cache = read(extension, ids, None)
        extension.save(cache, tmp_path / "kept", notes={resuming.NOTE: note, resuming.LOGITS: "AAAA"})
        with pytest.raises(ValueError, match="damaged or forged; remove the folder"):
            read(extension, ids, tmp_path / "kept")


# -- crashes --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_kill_9_at_random_moments(model, kills, tmp_path):
    """Of a child that is forked from here, over tiers, in forwards and in saves; see the script."""
    kill = scripts("benchmarks", "kill").kill
    ids = tokens(1, 60 * kills)[0]
    with constants(16, 8):

        def extend() -> Any:
            return longreach.extend(model, CUT, trained_window=512, memory=budgets(tmp_path, 60 + 20 * kills, 4, 4000, block=8))

        found = kill.compare(extend, ids, 8, kills, kills, tmp_path, lambda text: None)
    assert max(found["largest_difference_of_losses"], found["difference_of_last_logits"]) <= 1e-5
    assert found["held"] == sorted(found["held"]) and found["held"][-1] > 0


# -- texts in pieces ------------------------------------------------------------------------------------------------------------------

ALPHABET = ["the ", "whale ", "\n", "\r\n", "  ", "    ", "\t", "12345", "3.14", "é", "日本", "🙂", "'s", "ing", "ABC", "...", "--", " ", "x", "<bos>"]


@pytest.fixture(scope="module")
def nano() -> Any:
    return longreach.load("nano")[1]


def test_ids_of_pieces_are_those_of_the_whole(nano, monkeypatch):
    """Random texts with long runs, cut anywhere, in windows as small as words allow."""
    monkeypatch.setattr(pieces, "WINDOW", 500)
    monkeypatch.setattr(pieces, "SHARED", 200)
    monkeypatch.setattr(pieces, "ALIKE", 8)
    rng = random.Random(0)
    for _ in range(60):
        text = "".join(rng.choice(ALPHABET) * rng.choice([1, 1, 1, 2, 5, 40]) for _ in range(rng.randint(0, 1500)))
        parts, at = [], 0
        while at < len(text):
            size = rng.choice([1, 10, 300, 2000])
            parts, at = [*parts, text[at : at + size]], at + size
        for special in (True, False):
            assert list(pieces.token_ids(nano, parts, special)) == prompts.encode(nano, text, special)


@pytest.mark.parametrize("text", ["", "x", "a" * 5000, " " * 5000 + "b", "ab" * 3000, "\n" * 4000, "0" * 4000, "é" * 3001, "\u00a0 " * 3000], ids=range(9))
def test_runs_longer_than_a_window(nano, text, monkeypatch):
    monkeypatch.setattr(pieces, "WINDOW", 500)
    monkeypatch.setattr(pieces, "SHARED", 200)
    for parts in ([text], list(text)):
        assert list(pieces.token_ids(nano, parts)) == prompts.encode(nano, text)


def test_a_book_is_read_from_a_file(nano, tmp_path):
    text = longreach.shipped_book()[:700_000]
    files.write(tmp_path / "book.txt", text)
    with open(tmp_path / "book.txt", encoding="utf-8", newline="") as lines:
        assert list(longreach.token_ids(nano, lines)) == prompts.encode(nano, text)


def test_a_tokenizer_whose_tokens_change_wherever_a_text_is_cut_is_refused(monkeypatch):
    monkeypatch.setattr(pieces, "WINDOW", 50)
    monkeypatch.setattr(pieces, "SHARED", 20)
    monkeypatch.setattr(pieces, "LARGEST", 300)
    made = tokenizer()

    class Odd:
        """Of every token, how far it is from the end of the text that is tokenised: nothing of it is local."""

        is_fast, eos_token_id, sep_token_id, bos_token_id = True, None, None, None

        def __call__(self, text: str, **options: Any) -> dict[str, Any]:
            return {"input_ids": [len(text) - n for n in range(len(text))], "offset_mapping": [(n, n + 1) for n in range(len(text))]}

    with pytest.raises(ValueError, match="wherever it is cut"):
        list(pieces.token_ids(Odd(), ["abc"] * 1000))
    assert list(pieces.token_ids(made, ["abc"] * 1000)) == prompts.encode(made, "abc" * 1000)


# -- the command line -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_name", ["llama", "chat"])
def test_the_command_goes_on_where_it_was_broken_off(run: Run, folders, tmp_path, model_name, monkeypatch):
    """Interrupted in the middle; the answer is that of the whole text read at once, and of tokens those of one text."""
    (tmp_path / "book.txt").write_text("\n  " + "".join(f"{i:04d}, " for i in range(90)) + "\n")
    options = ["run", "--model", folders[model_name], "--file", tmp_path / "book.txt", "--prompt", "and?", "--max-new-tokens", 5, "--chunk-size", 64]
    options += ["--method", "selfextend", "--group-size", 32, "--window", 32, "--json"]
    want = run(*options).json
    real, calls = resuming.Kept.before, []

    def before(self: Any, *args: Any) -> None:
        calls.append(args[1])
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(resuming.Kept, "before", before)
    first = run(*options, "--resume", tmp_path / "kept")
    assert first.code == 130 and "the same command goes on from there" in first.err
    found = run(*options, "--resume", tmp_path / "kept")
    assert calls[:5] == [0, 64, 128, 192, 128] and f"128 tokens of {want['prompt_tokens']} were read before; going on from" in found.err
    assert {**found.json, "prompt_tokens": want["prompt_tokens"]}["answer"] == want["answer"] and found.json["prompt_tokens"] == want["prompt_tokens"]
    again = run(*[*options[:6], "another?", *options[7:]], "--resume", tmp_path / "kept")
    assert "tokens of" in again.err and again.code == 0, "another question about the same text"
    (tmp_path / "book.txt").write_text("other text " * 60)
    refused(run, *options[:-1], "--resume", tmp_path / "kept", says="are not the beginning of this text")


SELFEXTEND = ["--method", "selfextend", "--group-size", 32, "--window", 32]
CHOOSES = ["--method", "lm-infinite", "--n-local", 64, "--n-global", 4, "--top-k", 5, "--top-k-from-layer", 1]


def asks(folders: Any, file: Path, question: str, folder: Path, *more: Any, model: str = "llama") -> list[Any]:
    own = ["--chunk-size", 64, "--resume", folder, *more]
    return ["run", "--model", folders[model], "--file", file, "--prompt", question, "--max-new-tokens", 3, *own]


@pytest.mark.parametrize("model", ["llama", "chat"])
@pytest.mark.parametrize("method", [SELFEXTEND, ["--method", "infllm", "--n-local", 32, "--n-init", 8, "--block-size", 8, "--exc-block-size", 32]], ids=str)
@pytest.mark.parametrize("size", [180, 185, 190, 193])
def test_no_part_of_a_question_is_kept(run: Run, folders, tmp_path, size, method, model):
    """A chunk ends within the first question: another one, longer or of a letter, goes on nevertheless, to the answer that it has without the folder."""
    (tmp_path / "book.txt").write_text("".join(f"{i:04d}, " for i in range(90))[:size])
    first = run(*asks(folders, tmp_path / "book.txt", "and what is 0012, or 0013?" * 4, tmp_path / "kept", *method, model=model))
    held = resuming.held(tmp_path / "kept")
    assert first.code == 0 and 64 <= held <= size + 40 and held % 32 == 0
    for question in ("?", "so?", "Who is the captain of the ship, and where does he come from?" * 3):
        found = run(*asks(folders, tmp_path / "book.txt", question, tmp_path / "kept", *method, "--json", model=model))
        assert found.code == 0 and f"{held} tokens of" in found.err
        whole = run(*asks(folders, tmp_path / "book.txt", question, tmp_path / f"new{len(question)}", *method, "--json", model=model))
        assert found.json["answer"] == whole.json["answer"]


@pytest.mark.parametrize("words", ["The ship sails. " * 4, "Hi."], ids=len)
def test_a_text_that_is_shorter_than_a_cut_is_looked_at_too(run: Run, folders, tmp_path, words):
    method = ["--method", "infllm", "--n-local", 64, "--n-init", 8, "--block-size", 16, "--exc-block-size", 64]
    (tmp_path / "book.txt").write_text("".join(f"{i:04d}, " for i in range(90)))
    assert run(*asks(folders, tmp_path / "book.txt", "and?", tmp_path / "kept", *method)).code == 0
    (tmp_path / "book.txt").write_text(words)
    again = asks(folders, tmp_path / "book.txt", "and?", tmp_path / "kept", *method)
    refused(run, *again, says="are not the beginning of this text")
    assert "were read before" not in run(*again).err


def test_a_prompt_that_cannot_go_on_from_what_is_held_is_refused(run: Run, folders, tmp_path):
    """Its last forward would be shorter than the method's cut."""
    method = ["--method", "infllm", "--n-local", 64, "--n-init", 8, "--block-size", 16, "--exc-block-size", 64]
    words = "".join(f"{i:04d}, " for i in range(90))
    (tmp_path / "book.txt").write_text(words)
    assert run(*asks(folders, tmp_path / "book.txt", "and?", tmp_path / "kept", *method)).code == 0
    held = resuming.held(tmp_path / "kept")
    (tmp_path / "book.txt").write_text(words[:held])
    refused(run, *asks(folders, tmp_path / "book.txt", "?", tmp_path / "kept", *method), says="pass a longer text or question, or name another folder")


def test_a_method_that_reads_in_one_forward_is_refused(run: Run, folders, book, tmp_path):
    refused(run, *asks(folders, book, "and?", tmp_path / "kept", *CHOOSES), says="reads a prompt in one forward); leave out resume (--resume)")


def test_options_that_the_folder_was_not_read_with_are_named(run: Run, folders, book, tmp_path):
    other = ["--method", "selfextend", "--group-size", 16, "--window", 32]
    assert run(*asks(folders, book, "and?", tmp_path / "a", *SELFEXTEND)).code == 0
    assert run(*asks(folders, book, "and?", tmp_path / "b", *SELFEXTEND, "--context", 300)).code == 0
    for folder, options, says in (
        ("a", [*SELFEXTEND, "--context", 300], "and no declared context; leave out --context, or name another folder"),
        ("a", other, "; pass --method selfextend --group-size 32 --window 32, or name another folder"),
        ("b", [*SELFEXTEND, "--context", 301], "and a context of 300 tokens; pass --context 300, or name another folder"),
        ("b", other, "; pass --method selfextend --group-size 32 --window 32 and pass --context 300, or name another folder"),
    ):
        refused(run, *asks(folders, book, "and?", tmp_path / folder, *options), says=says)


@pytest.mark.parametrize("method", methods_matrix.METHODS, ids=lambda m: m.brief())
def test_the_options_of_a_method_make_it_again(method):
    name, *arguments = shlex.split(parameters.words(method))
    assert parameters.build(name, arguments) == method


@pytest.mark.parametrize("calls", [1, 3])
def test_an_interrupt_says_whether_anything_is_kept(run: Run, folders, tmp_path, calls, monkeypatch):
    (tmp_path / "book.txt").write_text("".join(f"{i:04d}, " for i in range(90)))
    real, left = resuming.Kept.before, [calls]

    def before(self: Any, *args: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(resuming.Kept, "before", before)
    found = run(*asks(folders, tmp_path / "book.txt", "and?", tmp_path / "kept", *SELFEXTEND))
    assert found.code == 130 and (tmp_path / "kept").exists() == (calls == 3)
    assert ("nothing was kept" in found.err) == (calls == 1) and ("what was read so far is in" in found.err) == (calls == 3)


@pytest.mark.parametrize("trims", [False, True])
def test_ids_of_a_prompt_in_pieces_are_those_of_a_conversation(trims):
    chat, plain = tokenizer(chat=True), tokenizer()
    if trims:
        chat.chat_template = chat.chat_template.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
    text = " \n" * 30 + "A text. " * 20 + "\n"
    for made, system in ((chat, None), (chat, "Be brief."), (plain, None)):
        talk = Conversation(None, made, system=system)
        for parts in ([text], list(text)):
            assert long_text.prompt_ids(made, parts, "and?", system).tolist() == talk.sequence(prompts.about(text, "and?"))


def test_a_template_that_writes_a_text_twice_is_refused():
    made = tokenizer(chat=True)
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{{ m['content'] | length }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="does not write a message once"):
        long_text.prompt_ids(made, ["x"], "and?", None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--file", "BOOK", "--prompt", "x", "--truncate", "middle"], "leave out --truncate"),
        (["--file", "BOOK", "--prompt", "x", "--hide", "y"], "leave out --hide"),
        (["--file", "-", "--prompt", "x"], "pass --file FILE"),
        (["--file", "BOOK"], "needs a question about the text; pass --prompt"),
        (["--file", "BOOK", "--prompt", "x", "--context", 100], "and with 3 new ones needs 207, more than the declared context of 100; pass --context 207"),
        (["--file", "BOOK", "--prompt", "x"], "pass --context N"),
        (["--file", "/no/such", "--prompt", "x", "--context", 900], "there is no file"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(run: Run, folders, book, tmp_path, options, says):
    options = [book if each == "BOOK" else each for each in options]
    refused(run, "run", "--model", folders["llama"], "--max-new-tokens", 3, "--resume", tmp_path / "kept", *options, says=says)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_files_are_read_in_pieces_of_bytes(tmp_path, encoding, monkeypatch):
    monkeypatch.setattr(text, "PIECE", 7)
    words = "Ein Äpfelchen fiel.\r\n" * 9
    (tmp_path / "a").write_bytes(words.encode(encoding))
    given = encoding if encoding == "latin-1" else None
    assert "".join(text.pieces(str(tmp_path / "a"), None, lambda note: None, given)) == words == text.read(str(tmp_path / "a"), 10**6, lambda note: None, given)


@pytest.mark.parametrize(
    ("data", "encoding", "says"),
    [
        (b"", None, "is empty"),
        (b" \n" * 9, None, "is empty"),
        (b"abcdefgh\xff", None, r"is not UTF-8 text \(byte 0xff at offset 8\)"),
        (b"\xef\xbb\xbfabcdefgh\xff", None, r"\(byte 0xff at offset 11\)"),
        (b"\xef\xbb\xbfab\xff", None, r"\(byte 0xff at offset 5\)"),
        (b"abcdef\xe6\x97zz", None, r"\(byte 0xe6 at offset 6\)"),
        (b"abcdefghi\xe6\x97", None, r"\(byte 0xe6 at offset 9\)"),
        (b"abcdefghijklmnop\0qrstuvw", None, r"is binary \(byte 0 at offset 16\)"),
        ("abcdefghijklmnop\0".encode("utf-16"), None, r"is binary \(byte 0\)"),
        (b"abcdefghij\x81", "cp1252", r"is not CP1252 text \(byte 0x81 at offset 10\)"),
    ],
    ids=str,
)
def test_what_is_no_text_is_refused_with_the_place_in_the_file(tmp_path, data, encoding, says, monkeypatch):
    monkeypatch.setattr(text, "PIECE", 7)
    (tmp_path / "a").write_bytes(data)
    for read in (text.pieces, text.read):
        with pytest.raises(ValueError, match=says):
            list(read(str(tmp_path / "a"), 10**6, lambda note: None, encoding))


def test_a_limit_that_is_given_is_kept_to(run: Run, folders, book, tmp_path, monkeypatch):
    """Of the text, not of the file that is packed; without one it may have any length."""
    monkeypatch.setattr(text, "LARGEST_FILE", 100)
    monkeypatch.setattr(text, "PIECE", 70)
    (tmp_path / "book.gz").write_bytes(gzip.compress(book.read_bytes()))
    for file in (book, tmp_path / "book.gz"):
        asked = asks(folders, file, "and?", tmp_path / "kept", *SELFEXTEND)
        refused(run, *asked, "--max-bytes", 199, says="is longer than 199 bytes; pass a larger --max-bytes")
        assert run(*asked, "--max-bytes", 200).code == 0 and run(*asked).code == 0
