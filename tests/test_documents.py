"""A read document saved, loaded, forked: going on is bit-equal to never having stopped, and what does not belong is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors import safe_open
from safetensors.torch import save_file

import longreach
from blocks import content
from commands import Run, refused
from families import build, tokens
from longreach import LMInfinite, SelfExtend, StreamingLLM
from longreach.hf import documents
from longreach.hf.cache import store_of
from longreach.memory import sealed
from longreach.running.conversation import Conversation
from methods_matrix import METHODS, context, refusal
from tiny import tokenizer as byte_tokenizer

pytestmark = pytest.mark.usefixtures("small_blocks")
READ, LENGTH = 230, 248  # more than a bounded buffer of these methods holds: its tail has moved


SAVED = [m for m in METHODS if m.eviction is None]  # the others are refused
KINDS = [type(m) for m in SAVED]
# One setting of every method in the quick suite; the others differ in parameters only, but for those of LM-Infinite that keep other forms.
ONE_OF_EACH = [
    m if n == KINDS.index(type(m)) or getattr(m, "top_k", 0) else pytest.param(m, marks=pytest.mark.slow) for n, m in enumerate(SAVED)
]


@torch.no_grad()
def go_on(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor, start: int = READ) -> torch.Tensor:
    """Chunks and single tokens after the document -> logits."""
    parts = []
    for size in (1, 9, *[1] * (LENGTH - start - 10)):
        stop = start + size
        parts.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits)
        start = stop
    return torch.cat(parts, 1)


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    cache = t.DynamicCache()
    for a, b in ((0, 200), (200, 201), (201, READ)):
        model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache)
    return cache


@pytest.mark.parametrize("padded", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["padded", "rows"])
@pytest.mark.parametrize("method", ONE_OF_EACH, ids=str)
def test_loaded_and_forked_go_on_bit_for_bit(method, padded, tmp_path):
    model = build("llama-head8" if refusal("llama", method) else "llama")
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :37] = 0
    with longreach.extend(model, method, context=context(method, LENGTH)) as extension:
        cache = read(model, ids, mask)
        extension.save(cache, tmp_path / "document", ids[:, :READ])
        fork = extension.fork(cache)
        expected = go_on(model, cache, ids, mask)
        assert torch.equal(go_on(model, fork, ids, mask), expected)
        found = extension.load(tmp_path / "document")
        assert torch.equal(found.ids, ids[:, :READ]) and (torch.equal(found.mask, mask[:, :READ]) if padded else found.mask is None)
        assert torch.equal(go_on(model, found.cache, ids, mask), expected)


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss", "phi", "cohere"])
def test_other_families_go_on_bit_for_bit(family, tmp_path):
    """Sliding layers beside the method's own, sinks, partial and interleaved rotary."""
    model, ids = build(family), tokens(1, LENGTH)
    mask = torch.ones_like(ids)
    with longreach.extend(model, SelfExtend(3, 8)) as extension:
        cache = read(model, ids, mask)
        extension.save(cache, tmp_path / "d", ids[0, :READ].tolist())
        found = extension.load(tmp_path / "d").cache
        assert torch.equal(go_on(model, found, ids, mask), go_on(model, cache, ids, mask))


def test_another_process_of_the_same_model_goes_on(tmp_path):
    """A second extension on a second copy of the model: what a new process has."""
    ids = tokens(1, LENGTH)
    mask = torch.ones_like(ids)
    with longreach.extend(build("llama", torch.bfloat16), SelfExtend(6, 8), context=LENGTH) as extension:
        cache = read(extension.model, ids, mask)
        extension.save(cache, tmp_path / "d", ids[:, :READ])
        expected = go_on(extension.model, cache, ids, mask)
    with longreach.extend(build("llama", torch.bfloat16), SelfExtend(6, 8), context=LENGTH) as extension:
        assert torch.equal(go_on(extension.model, extension.load(tmp_path / "d").cache, ids, mask), expected)


def place(cache: Any) -> int:
    """Where the keys that grow with the text lie."""
    (buffer,) = (b for positions, b in store_of(cache).layers[0].keys.items() if b.placement.tail is None)
    (body,) = buffer.bodies.values()
    return body.data_ptr()


@torch.no_grad()
def test_forks_share_until_they_write_and_never_see_each_other():
    model, ids = build("llama"), tokens(1, LENGTH)
    mask = torch.ones_like(ids)
    with longreach.extend(model, SelfExtend(3, 8)) as extension:
        cache = read(model, ids, mask)
        forks = [extension.fork(cache) for _ in range(3)]
        assert len({place(c) for c in (cache, *forks)}) == 1
        texts = [tokens(1, LENGTH, seed=20 + n) for n in range(3)]
        expected = go_on(model, read(model, ids, mask), ids, mask)
        steps = [[] for _ in forks]
        for start in range(READ, READ + 6):  # in turns
            for fork, text, found in zip(forks, texts, steps):
                found.append(model(text[:, start : start + 1], past_key_values=fork).logits)
        assert len({place(c) for c in (cache, *forks)}) == 4
        for text, found in zip(texts, steps):
            fresh = read(model, ids, mask)
            want = [model(text[:, s : s + 1], past_key_values=fresh).logits for s in range(READ, READ + 6)]
            assert torch.equal(torch.cat(found, 1), torch.cat(want, 1))
        assert torch.equal(go_on(model, cache, ids, mask), expected)
        last = extension.fork(cache)
        pointer = place(last)
        del cache  # the last holder writes in place
        last.crop(-(LENGTH - READ))
        model(ids[:, READ : READ + 1], past_key_values=last)
        assert place(last) == pointer


@torch.no_grad()
def test_a_loaded_document_can_be_cropped_reordered_and_generated_from(tmp_path):
    model = build("llama", eos_token_id=None)
    model.generation_config = t.GenerationConfig(pad_token_id=0, eos_token_id=10_000)
    ids = tokens(1, LENGTH)
    with longreach.extend(model, LMInfinite(9, 3)) as extension:
        cache = read(model, ids, torch.ones_like(ids))
        extension.save(cache, tmp_path / "d", ids[:, :READ])
        text = torch.cat([ids[:, :READ], tokens(1, 8, seed=9)], 1)
        want = model.generate(text, past_key_values=extension.fork(cache), max_new_tokens=12, do_sample=False)
        document = extension.load(tmp_path / "d")
        assert torch.equal(model.generate(text, past_key_values=extension.fork(document.cache), max_new_tokens=12, do_sample=False), want)
        for c in (cache, document.cache):
            c.batch_repeat_interleave(2)
            c.batch_select_indices(torch.tensor([1]))
            c.crop(-100)
        assert torch.equal(model(ids[:, 130:], past_key_values=document.cache).logits, model(ids[:, 130:], past_key_values=cache).logits)


@torch.no_grad()
def test_nothing_but_the_document_is_in_the_file(tmp_path):
    """Tokens that were cropped away, a forward that failed and memory that was never written leave no trace."""
    model, ids = build("llama"), tokens(2, LENGTH)
    with longreach.extend(model, SelfExtend(3, 8)) as extension:
        clean = read(model, ids, torch.ones_like(ids))
        extension.save(clean, tmp_path / "clean", ids[:, :READ])
        dirty = read(model, ids, torch.ones_like(ids))
        model(tokens(2, 30, seed=1), past_key_values=dirty)
        dirty.crop(-30)
        hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
        with pytest.raises(RuntimeError, match="stop"):
            model(tokens(2, 20, seed=2), past_key_values=dirty)
        hook.remove()
        extension.save(dirty, tmp_path / "dirty", ids[:, :READ])
        with safe_open(tail_of(tmp_path / "clean"), "pt") as a, safe_open(tail_of(tmp_path / "dirty"), "pt") as b:
            assert set(a.keys()) == set(b.keys())
            for name in a.keys():  # noqa: SIM118
                one, other = a.get_tensor(name), b.get_tensor(name)
                length = min(one.shape[2], other.shape[2]) if one.dim() == 4 else 0  # a bounded tail may have moved at another token
                assert not other.isnan().any()
                assert torch.equal(one[:, :, one.shape[2] - length :], other[:, :, other.shape[2] - length :]) if length else torch.equal(one, other)
        a, b = ([*each.iterdir()] for each in (tmp_path / "clean", tmp_path / "dirty"))
        blocks = [sorted(file.read_bytes() for file in each if file.name.startswith("blocks-")) for each in (a, b)]
        assert blocks[0] == blocks[1] != []


def tail_of(document: Path) -> Path:
    (found,) = document.glob("tail-*")
    return found


# -- what is refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SelfExtend(4, 16), LMInfinite(9, 3)], ids=str)
@torch.no_grad()
def test_a_row_that_was_cut_by_a_mask_and_read_nothing_is_saved(method, tmp_path):
    model, ids, mask = build("llama"), tokens(2, 68), torch.ones(2, 68).long()
    mask[0, 50:65] = 0  # ten tokens that are in the cache, and five pads
    with longreach.extend(model, method) as extension:
        cache = model(ids[:, :60], use_cache=True).past_key_values
        model(ids[:, 60:65], attention_mask=mask[:, :65], past_key_values=cache)
        extension.save(cache, tmp_path / "document")
        loaded = extension.load(tmp_path / "document").cache
        went_on = [model(ids[:, 65:], attention_mask=mask, past_key_values=own).logits for own in (cache, loaded)]
        assert torch.equal(*went_on)
        for row in range(2):
            alone = model(ids[row : row + 1, mask[row].bool()]).logits[0, -3:]
            assert (went_on[0][row] - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.fixture(scope="module")
def saved(small_blocks: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("saved") / "document"
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with longreach.extend(build("llama"), SelfExtend(10, 8), context=400) as extension:
        extension.save(read(extension.model, ids, mask), file, ids[:, :READ])
    return file


@pytest.mark.parametrize(
    ("family", "method", "settings", "says"),
    [
        ("llama-mha", SelfExtend(10, 8), {}, "another model"),
        ("mistral", SelfExtend(10, 8), {}, "another model .*LlamaForCausalLM of 2 layers"),
        ("llama", SelfExtend(10, 9), {}, r"was read with SelfExtend\(group_size=10, window=8.*longreach.extend\(model, longreach.from_json"),
        ("llama", StreamingLLM(9, 3), {}, "was read with SelfExtend"),
        ("llama", SelfExtend(10, 8), {"context": 500}, "context of 400 tokens, not of 500"),
        ("llama", SelfExtend(10, 8), {"backend": "reference"}, "other forms"),
    ],
)
def test_what_does_not_belong_is_refused(saved, family, method, settings, says):
    with longreach.extend(build(family), method, **{"context": 400, **settings}) as extension, pytest.raises(ValueError, match=says):
        extension.load(saved)


def test_another_dtype_other_weights_and_other_frequencies_are_refused(saved):
    with longreach.extend(build("llama", torch.bfloat16), SelfExtend(10, 8), context=400) as extension, pytest.raises(ValueError, match="computes in"):
        extension.load(saved)
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.add_(1e-3)
    with longreach.extend(model, SelfExtend(10, 8), context=400) as extension, pytest.raises(ValueError, match="other weights"):
        extension.load(saved)
    with (
        longreach.extend(build("llama", rope_parameters={"rope_type": "default", "rope_theta": 5000.0}), SelfExtend(10, 8), context=400) as extension,
        pytest.raises(ValueError, match="other frequencies"),
    ):
        extension.load(saved)


def forge(saved: Path, target: Path, change: Any) -> Path:
    """The document again, with `change(facts, tensors)` applied and every checksum right."""
    shutil.copytree(saved, target)
    found, tail = sealed.read(target), tail_of(target)
    with safe_open(tail, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(found.facts, tensors)
    made = sealed.tail(target, lambda part: save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, {"longreach": "tail"}))
    sealed.commit(target, sealed.Manifest(found.blocks, made, found.facts))
    return target


def first_body(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if name.endswith(".body"))


FORGERIES: dict[str, tuple[Any, str]] = {
    "sealed": (lambda f, t: f["places"][1].update(sealed=[10**15 * 16, 0]), "contradicts itself"),
    "sealed less": (lambda f, t: f["places"][1].update(sealed=[0, 0]), "contradicts itself"),
    "sealed a bounded form": (lambda f, t: f["places"][0].update(sealed=[16, 16]), "contradicts itself"),
    "sealed all": (lambda f, t: f["places"][1].update(sealed=f["places"][1]["ends"]), "contradicts itself"),
    "block": (lambda f, t: f.update(block=1), "contradicts itself"),
    "no block": (lambda f, t: f.update(block=0), "contradicts itself"),
    "method": (lambda f, t: f.update(method={"method": "telepathy"}), "does not say what it was read with"),
    "parameters": (lambda f, t: f["method"].update(group_size="nine"), "does not say what it was read with"),
    "model": (lambda f, t: f.update(model=None), "does not say what it was read with"),
    "rotaries": (lambda f, t: f.update(rotaries=[[1]]), "other frequencies"),
    "rows": (lambda f, t: f.update(rows=10**12), "contradicts itself"),
    "seen": (lambda f, t: f.update(seen=-1), "contradicts itself"),
    "endless": (lambda f, t: (f.update(seen=2**60), t.pop("mask"), t.pop("ids")), "contradicts itself"),
    "seen too": (lambda f, t: f.update(seen="all"), "contradicts itself"),
    "places": (lambda f, t: f["places"][0].update(firsts=[10**9, 0]), "contradicts itself"),
    "no places": (lambda f, t: f["places"].pop(), "contradicts itself"),
    "missing": (lambda f, t: t.pop(first_body(t)), "contradicts itself"),
    "extra": (lambda f, t: t.update(more=torch.zeros(3)), "contradicts itself"),
    "shape": (lambda f, t: t.update({first_body(t): t[first_body(t)][:, :, :-1]}), "contradicts itself"),
    "width": (lambda f, t: t.update({first_body(t): t[first_body(t)][..., :-1]}), "contradicts itself"),
    "tensor dtype": (lambda f, t: t.update({first_body(t): t[first_body(t)].half()}), "contradicts itself"),
    "mask": (lambda f, t: t.update(mask=torch.ones_like(t["mask"])), "contradicts itself"),
    "ids": (lambda f, t: t.update(ids=t["ids"] + 1000), "contradicts itself"),
}


@pytest.fixture(scope="module")
def extension_of_saved() -> Any:
    return longreach.extend(build("llama"), SelfExtend(10, 8), context=400)


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_files_are_refused(saved, extension_of_saved, name, tmp_path):
    change, says = FORGERIES[name]
    with pytest.raises(ValueError, match=says):
        extension_of_saved.load(forge(saved, tmp_path / "forged", change))


def test_what_is_no_document_and_limits(saved, extension_of_saved, tmp_path):
    broken = tmp_path / "broken"
    for data in (b"", b"\xff" * 64):
        broken.write_bytes(data)
        with pytest.raises(ValueError, match="is a file and no document of Longreach, which is a folder"):
            extension_of_saved.load(broken)
    for version in (1, 2):
        save_file({"x": torch.zeros(2)}, broken, {"longreach": json.dumps({"format": version}), "note.document": "text"})
        with pytest.raises(ValueError, match=rf"format {version}, a single file, .* read its text again and save it: longreach run --file .*'note.document'"):
            extension_of_saved.load(broken)
        with pytest.raises(ValueError, match="is a file, and a document is a folder; name another one, or remove the file first"):
            extension_of_saved.save(fresh_cache(extension_of_saved, 4), broken)
    with pytest.raises(ValueError, match="there is no document"):
        extension_of_saved.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a folder, but no document"):
        extension_of_saved.load(tmp_path)
    size = documents.size(saved)
    assert size == sum(file.stat().st_size for file in saved.iterdir()) - (saved / sealed.MANIFEST).stat().st_size
    with pytest.raises(ValueError, match=f"pass max_bytes={size}"):
        extension_of_saved.load(saved, max_bytes=1000)
    assert extension_of_saved.load(saved, max_bytes=size).ids.shape == (2, READ)


@torch.no_grad()
def test_what_cannot_be_saved_is_refused_and_an_old_file_survives(extension_of_saved, saved, tmp_path, monkeypatch):
    extension, ids = extension_of_saved, tokens(1, 20)
    model = extension.model
    cache = model(ids, use_cache=True).past_key_values
    for wrong, says in ((t.DynamicCache(), "not filled by an extended model"), (None, "not filled by an extended model")):
        with pytest.raises(ValueError, match=says):
            extension.save(wrong, tmp_path / "x")
        with pytest.raises(ValueError, match=says):
            extension.fork(wrong)
    with pytest.raises(ValueError, match="is empty"):
        extension.save(extension.load(saved).cache.reset() or fresh_cache(extension), tmp_path / "x")
    with pytest.raises(ValueError, match=r"pass ids\[:, :cache.get_seq_length\(\)\]"):
        extension.save(cache, tmp_path / "x", ids[:, :-1])
    with pytest.raises(ValueError, match="create it first"):
        extension.save(cache, tmp_path / "no" / "x")
    target = tmp_path / "kept"
    shutil.copytree(saved, target)
    with pytest.raises(ValueError, match="is a folder that holds other things, such as 'kept'"):
        extension.save(cache, tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ValueError, match=r"kept/tail-\d+' cannot be written \(disk full\)"):
        extension.save(cache, target, ids)
    assert content(target) == content(saved) and [p.name for p in tmp_path.iterdir()] == ["kept"]
    with pytest.raises(ValueError, match="disk full"):
        extension.save(cache, tmp_path / "new", ids)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def fresh_cache(extension: Any, tokens_left: int = 0) -> Any:
    cache = extension.model(tokens(1, 4), use_cache=True).past_key_values
    cache.crop(-(4 - tokens_left))
    return cache


@torch.no_grad()
def test_a_model_that_was_cast_while_extended_cannot_save(tmp_path):
    model, ids = build("llama"), tokens(1, 20)
    with longreach.extend(model, SelfExtend(10, 8)) as extension:
        model.bfloat16()
        with pytest.raises(ValueError, match=r"cast to torch.bfloat16 after extend\(\)"):
            extension.save(model(ids, use_cache=True).past_key_values, tmp_path / "x", ids)


# -- conversations and the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "template"])
def test_a_conversation_goes_on_from_its_document(chat, tmp_path, folders):
    model, made = longreach.load(folders["llama"])[0], byte_tokenizer(chat)
    text = "It was a dark night. Nobody was on the road, and the lamp in the inn had gone out long ago."
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        talk = Conversation(model, made, text, extension=extension, chunk_size=32)
        with pytest.raises(ValueError, match="call read"):
            talk.save(tmp_path / "d")
        talk.read()
        talk.save(tmp_path / "d")
        again = Conversation.open(model, made, extension, tmp_path / "d")
        assert again.document == text
        for question in ("Who was there?", "Why?"):
            assert again.ask(question, 12).ids == talk.ask(question, 12).ids
        with pytest.raises(ValueError, match="load the tokenizer"):
            Conversation.open(model, byte_tokenizer(not chat), extension, tmp_path / "d")


def test_run_reads_once_and_asks_many_times(run: Run, folders, tmp_path):
    (tmp_path / "book.txt").write_text("It was a dark night. " * 20)
    file, model = tmp_path / "book", ["run", "--model", folders["chat"], "--max-new-tokens", 8]
    first = run(*model, "--file", tmp_path / "book.txt", "--context", 600, "--save-document", file, "--prompt", "Why?", "--json")
    assert first.code == 0, first.err
    only = run(*model, "--file", tmp_path / "book.txt", "--context", 600, "--save-document", file, "--json").json
    assert only["document_tokens"] == first.json["document_tokens"] > 400 and only["file_bytes"] == documents.size(file)
    again = run(*model, "--document", file, "--prompt", "Why?", "--json")
    assert again.code == 0 and again.json["answer"] == first.json["answer"]
    assert again.json["method"] == first.json["method"] and again.json["context"] == 600
    other = run(*model, "--document", file, "--prompt", "Who was it?")
    assert other.code == 0 and other.out.strip()
    refused(run, *model, "--document", file, says="pass --prompt TEXT")
    refused(run, *model, "--document", file, "--prompt", "x", "--file", tmp_path / "book.txt", says="--file cannot change it")
    refused(run, *model, "--document", file, "--prompt", "x", "--context", 700, says="context of 600 tokens; leave out --context")
    refused(run, *model, "--document", file, "--prompt", "x", "--method", "stock", says="leave out --method")
    refused(run, *model, "--document", file, "--prompt", "x", "--dtype", "bf16", says="computes in")
    refused(run, *model, "--document", tmp_path / "none", "--prompt", "x", says="there is no document")
    refused(run, *model, "--file", tmp_path / "book.txt", "--save-document", file, says="pass --context N")
    refused(run, *model, "--prompt", "x", "--save-document", file, "--context", 600, says="pass --file FILE")


@torch.no_grad()
def test_what_is_saved_after_a_forward_that_broke_off_is_whole(tmp_path):
    """Its new tokens had no place, so the last ones of a bounded form had moved already, in some layers."""
    model, ids = build("llama"), tokens(1, LENGTH)
    with longreach.extend(model, LMInfinite(9, 3)) as extension:
        cache = model(ids[:, :201], use_cache=True).past_key_values
        want = go_on(model, extension.fork(cache), ids, torch.ones_like(ids), 201)

        def broken(*anything: Any) -> None:
            raise KeyboardInterrupt

        for layer in model.model.layers:
            hook = layer.self_attn.register_forward_hook(broken)
            with pytest.raises(KeyboardInterrupt):
                model(tokens(1, 40, seed=8), past_key_values=cache)
            hook.remove()
            extension.save(cache, tmp_path / "document", ids[:, :201])
            found = extension.load(tmp_path / "document")
            assert torch.equal(go_on(model, found.cache, ids, torch.ones_like(ids), 201), want)
