"""Text out of tokens as they come: the parts are the whole, no part has half a character, and nothing of a stop string is written."""

from __future__ import annotations

import random
from typing import Any

import pytest
import transformers as t
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

import longreach
from longreach.serving.texts import HALF, Writer, begun, decode, longest_token, speller
from tiny import tokenizer as bytes_tokenizer

TEXT = "Größe 你好, 世界! 👩‍🚀 e\u0301 fin"


def fallback() -> Any:
    """As SentencePiece's: words with a mark in front, and a byte of each kind for all that is no word."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{n:02X}>": 3 + n for n in range(256)}, "▁fin": 259, "▁Gr": 260, "e": 261, "▁": 262}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return t.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"bytes": bytes_tokenizer(), "fallback": fallback()}


def parts(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], int]:
    """-> (what was written after each token, the tokens that it took)."""
    writer, found = Writer(tokenizer, stop), []
    for count, token in enumerate(ids, 1):
        ended = writer.push(token)
        found.append(writer.take(ended or count == len(ids)))
        if ended:
            return found, count
    return found, len(ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_parts_are_the_whole_and_no_part_has_half_a_character(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    found, _ = parts(tokenizer, ids)
    assert "".join(found) == decode(tokenizer, ids) == TEXT
    assert not any(HALF in part for part in found) and sum(map(bool, found)) >= len(TEXT) - 1


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_any_tokens_become_what_they_are_decoded_to(kind: str, seed: int) -> None:
    """Special tokens, bytes that are no character, and characters that are cut anywhere."""
    tokenizer, draw = TOKENIZERS[kind], random.Random(seed)
    words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("a", " b", "ö", "你", "👩", " ")] + [[1], [2]]
    if kind == "bytes":  # with a byte too many, the other tokenizer takes back what it had written before
        words += [[240], [100]]
    ids = [token for _ in range(60) for token in draw.choice(words)]
    found, _ = parts(tokenizer, ids)
    whole = decode(tokenizer, ids).rstrip(HALF)
    assert "".join(found) == whole
    for end in ("a b", "ö", "你👩", "b ö", "zz"):
        stopped, count = parts(tokenizer, ids, (end, "nowhere"))
        assert "".join(stopped) == (whole[: whole.find(end)] if end in whole else whole)
        assert count == len(ids) or (end in decode(tokenizer, ids[:count]) and end not in decode(tokenizer, ids[: count - 1]))


def test_an_answer_that_is_cut_ends_before_half_a_character() -> None:
    for kind, tokenizer in TOKENIZERS.items():
        ids = tokenizer("so 👩", add_special_tokens=False)["input_ids"]
        for cut in (1, 2, 3):
            assert "".join(parts(tokenizer, ids[:-cut])[0]) == "so ", kind


def test_a_stop_string_is_held_back_until_it_is_certain() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer("one STO two STOP three", add_special_tokens=False)["input_ids"]
    found, count = parts(tokenizer, ids, ("STOP",))
    assert found == [*"one ", "", "", "", "STO ", *"two ", "", "", "", ""] and count == 16
    last = tokenizer("one STO", add_special_tokens=False)["input_ids"]
    assert parts(tokenizer, last, ("STOP",))[0] == [*"one ", "", "", "STO"]
    assert [begun("ab", "abc"), begun("xab", "bx"), begun("x", "abc"), begun("aa", "aaab")] == [2, 1, 0, 2]


def test_the_first_of_several_stop_strings_counts() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer("say END or STOP", add_special_tokens=False)["input_ids"]
    assert "".join(parts(tokenizer, ids, ("STOP", "ND or", "D"))[0]) == "say EN"


def test_a_token_costs_the_same_at_any_length() -> None:
    """Only the last tokens are decoded anew."""
    model_tokenizer = longreach.load("nano")[1]
    lengths = []

    class Counting:
        def decode(self, ids: list[int], **given: Any) -> str:
            lengths.append(len(ids))
            return str(model_tokenizer.decode(ids, **given))

    ids = model_tokenizer("Call me Ishmael. " * 100)["input_ids"]
    assert "".join(parts(Counting(), ids)[0]) == model_tokenizer.decode(ids, skip_special_tokens=True)
    assert len(ids) > 500 and max(lengths) <= 3


def test_bytes_that_are_no_character_do_not_take_back_what_was_written() -> None:
    tokenizer = TOKENIZERS["fallback"]
    ids = [*tokenizer("你", add_special_tokens=False)["input_ids"], 240, *tokenizer("a", add_special_tokens=False)["input_ids"]]
    assert "".join(parts(tokenizer, ids)[0]).startswith("你") and not decode(tokenizer, ids[:-2]).startswith("你")


def test_the_bytes_of_half_a_character_are_known() -> None:
    for tokenizer in TOKENIZERS.values():
        spell = speller(tokenizer)
        ids = tokenizer("ö", add_special_tokens=False)["input_ids"][-2:]
        assert b"".join(bytes(spell(token)[1] or []) for token in ids) == "ö".encode()
    assert speller(TOKENIZERS["bytes"])(2) == ("</s>", list(b"</s>"))


def test_what_a_token_stands_for_at_most() -> None:
    assert longest_token(bytes_tokenizer()) == 5  # <pad>
    nano = longreach.load("nano")[1]
    assert longest_token(nano) == max(map(len, nano.get_vocab()))
    assert longest_token(fallback()) is None

    def changed(what: str, value: Any) -> int | None:
        tokenizer = bytes_tokenizer()
        setattr(tokenizer.backend_tokenizer, what, value)
        return longest_token(tokenizer)

    assert changed("normalizer", normalizers.NFC()) == 4 * 5
    for normalizer in (normalizers.Strip(), normalizers.NFKC(), normalizers.Replace("  ", " ")):
        assert changed("normalizer", normalizer) is None
    removed = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])
    for cutter in (pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(), removed):
        assert changed("pre_tokenizer", cutter) is None
    tokenizer = bytes_tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    assert longest_token(tokenizer) is None
    (tokenizer := bytes_tokenizer()).backend_tokenizer.enable_truncation(5)
    assert longest_token(tokenizer) is None
