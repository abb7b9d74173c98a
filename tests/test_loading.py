"""Loading: what comes from a folder, and one clear sentence for what cannot."""

from __future__ import annotations

import pytest
import torch

import longreach
from families import build
from longreach.loading import parse_dtype, shipped_book


def test_a_missing_folder_a_corrupt_file_and_a_missing_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        longreach.load(str(tmp_path / "nothing"))
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="could not load"):
        longreach.load(str(tmp_path))


def test_corrupt_weights(tmp_path):
    model, tokenizer = longreach.load("nano")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = longreach.load(str(tmp_path), dtype="bf16")
    assert again.dtype == torch.bfloat16 and not again.training
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="could not load"):
        longreach.load(str(tmp_path))


def test_pickled_weights_are_never_read(tmp_path):
    model, tokenizer = longreach.load("nano")
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="could not load"):
        longreach.load(str(tmp_path))


def test_dtypes_and_devices():
    assert parse_dtype("fp16") == torch.float16 and parse_dtype(None) is None
    with pytest.raises(ValueError, match="choose one of"):
        parse_dtype("int8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cpu'"):
            longreach.load("nano", device="cuda")


def test_the_shipped_book_is_text():
    book = shipped_book()
    assert book.startswith("CHAPTER 1. Loomings.") and len(book) > 300_000
