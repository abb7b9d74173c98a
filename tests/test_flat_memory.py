"""What the memory of flat requests will take, said before it is there; and requests that are saved and loaded among others."""

from __future__ import annotations

import random

import pytest
import torch

import longreach
from families import build, tokens
from longreach import InfLLM, LMInfinite, SelfExtend, Stock
from longreach.memory.budgets import Tiered
from methods_matrix import METHODS, context, refusal

METHODS = [method for method in METHODS if method.eviction is None]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("method", [Stock(), SelfExtend(3, 8), LMInfinite(9, 3), InfLLM.small(8)], ids=str)
def test_requests_never_hold_more_than_was_said(method, seed):
    """Requests of random lengths join, fork, are read in random chunks, and leave. Whenever one is to come, what all will take is said, and holds from then
    on until the next one comes."""
    draw = random.Random(seed)
    with longreach.extend(build("llama"), method) as extension:
        flat, totals, kept, most = extension.flat(), {}, [], 0
        for _ in range(40):
            todo = [request for request in totals if flat.length(request) < totals[request]]
            if (len(totals) < 6 and draw.random() < 0.4) or not todo:
                total, source, begin = draw.randint(1, 1500), None, 0
                if totals and draw.random() < 0.3:
                    taken = draw.choice([*totals])
                    most = flat.need(totals, taken=[taken]).nbytes + flat.beside(kept)
                    if flat.length(taken):
                        kept.append(flat.take(taken))
                        assert flat.held(kept) <= flat.need(totals).nbytes + flat.beside(kept) <= most
                if kept and draw.random() < 0.6:
                    source = draw.choice(kept)
                    begin = draw.randint(max(1, source.reaches), source.length)
                    total += begin
                most = flat.need(totals, [(total, source, begin)]).nbytes + flat.beside(kept)
                request = flat.join() if source is None else flat.begin(source, begin)
                totals[request] = total
                assert flat.need(totals).nbytes + flat.beside(kept) <= most
            else:
                some = draw.sample(todo, draw.randint(1, len(todo)))
                flat.read({request: [7] * min(totals[request] - flat.length(request), draw.choice((1, 1, 60, 400))) for request in some}, logits="none")
            if draw.random() < 0.1 and totals:
                flat.leave(gone := draw.choice([*totals]))
                del totals[gone]
            if draw.random() < 0.1 and kept:
                kept.pop(draw.randrange(len(kept)))
            assert flat.held(kept) <= most
        for request in [*totals]:
            flat.leave(request)
        assert flat.held([]) == 0


@pytest.mark.parametrize(
    ("method", "seed"),
    [(Stock(), 2), (SelfExtend(3, 8), 5), (LMInfinite(200, 10), 1), (InfLLM(64, 8, 32, 3, exc_block_size=32), 0)],
    ids=str,
)
def test_what_was_said_holds_in_whatever_order_they_come_and_are_taken(method, seed):
    """Several come and are taken, of which was said together, and all are read in between and leave."""
    draw = random.Random(seed)
    with longreach.extend(build("llama"), method) as extension:
        flat, totals, kept = extension.flat(), {}, []
        for _ in range(10):
            coming = []
            for _ in range(draw.randint(1, 3)):
                total, source, begin = draw.randint(1, 1500), None, 0
                if kept and draw.random() < 0.6:
                    source = draw.choice(kept)
                    begin = draw.randint(max(1, source.reaches), source.length)
                    total = begin + draw.choice([0, 1, 3, draw.randint(0, 1500)])
                coming.append((total, source, begin))
            taken = [request for request in totals if flat.length(request) and draw.random() < 0.3]
            most = flat.need(totals, coming, taken).nbytes + flat.beside(kept)

            def read():
                todo = [request for request in totals if flat.length(request) < totals[request]]
                if todo:
                    some = draw.sample(todo, draw.randint(1, len(todo)))
                    flat.read({each: [7] * min(totals[each] - flat.length(each), draw.choice((1, 1, 60, 400, 513))) for each in some}, logits="none")
                    assert flat.held(kept) <= most  # noqa: B023

            for act in draw.sample([*coming, *taken], len(coming) + len(taken)):
                while draw.random() < 0.5:
                    read()
                if isinstance(act, int):
                    kept.append(flat.take(act))
                else:
                    total, source, begin = act
                    totals[flat.join() if source is None else flat.begin(source, begin)] = total
                assert flat.held(kept) <= most
            while draw.random() < 0.9:
                read()
            while len(totals) > 5 or (totals and draw.random() < 0.3):
                flat.leave(gone := draw.choice([*totals]))
                del totals[gone]
                assert flat.held(kept) <= most
            if len(kept) > 3 or (kept and draw.random() < 0.3):
                kept.pop(draw.randrange(len(kept)))


@pytest.mark.parametrize("method", [Stock(), LMInfinite(200, 10)], ids=str)
def test_what_goes_back_brings_its_room_along(method):
    """It is copied as a whole before it goes back."""
    with longreach.extend(build("llama"), method) as extension:
        flat = extension.flat()
        flat.read({(own := flat.join()): [7] * 300}, logits="none")
        kept = flat.take(own)
        flat.leave(own)
        said = flat.need({}, [(210, kept, 205)]).nbytes + flat.beside([kept])
        flat.begin(kept, 205)
        assert flat.held([kept]) <= said


def test_what_goes_on_from_a_snapshot_holds_no_first_tokens_twice():
    """A shorter tail of the values is copied from all of them, but their first tokens are theirs alone."""
    with longreach.extend(build("llama"), InfLLM(64, 8, 32, 3, exc_block_size=32)) as extension:
        flat = extension.flat()
        flat.read({(own := flat.join()): [7] * 633}, logits="none")
        kept = flat.take(own)
        flat.read({own: [7] * 229}, logits="none")
        said = flat.need({own: 862}, [(569, kept, 566)]).nbytes + flat.beside([kept])
        flat.begin(kept, 566)
        buffers = [buffer for layer in flat._store.layers for buffer in layer.buffers]
        assert any(buffer.first for buffer in buffers) and all((buffer.head is None) == (not buffer.first) for buffer in buffers)
        assert flat.held([kept]) <= said


@pytest.mark.parametrize("method", [Stock(), SelfExtend(3, 8)], ids=str)
def test_what_was_said_is_not_much_more(method):
    with longreach.extend(build("llama"), method) as extension:
        flat = extension.flat()
        said = flat.need({}, [(1000, None, 0)] * 4).nbytes
        for request in [flat.join() for _ in range(4)]:
            flat.read({request: [5] * 1000}, logits="none")
        assert said * 0.8 < flat.nbytes <= said
        kept = flat.take(1)
        forked = flat.need(dict.fromkeys(flat.requests, 1000), [(1010, kept, 1000)]).nbytes + flat.beside([kept])
        anew = flat.need(dict.fromkeys(flat.requests, 1000), [(1010, None, 0)]).nbytes
        assert forked < said + (0.4 if method == Stock() else 0.7) * (anew - said)  # what is long is held once, what is near twice


@pytest.mark.parametrize("tiered", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_request_goes_on_where_it_was_saved(method, tiered, tmp_path):
    """Saved among others and loaded among others, twice; all go on as if nothing had been."""
    model = build("llama-head8" if refusal("llama", method) else "llama")
    memory = Tiered(device="8MiB", host="8MiB", block=16) if tiered else None
    with longreach.extend(model, method, context=context(method, 1000), memory=memory) as extension:
        ids = tokens(1, 700, seed=1)[0].tolist()
        flat, cut = extension.flat(), method.cut
        length = 600 if cut == 1 else 600 // (cut or 300) * (cut or 300)
        other, own = flat.join(), flat.join()
        flat.read({other: ids[:90], own: ids[:length]})
        flat.save(flat.take(own), tmp_path / "own", ids[:length], {"said": "x"})
        if cut == 1:
            flat.read({own: ids[length : length + 3]})
        kept, its, notes = flat.load(tmp_path / "own")
        assert (its, notes, kept.length) == (ids[:length], {"said": "x"}, length)
        loaded = flat.begin(kept, length)
        flat.leave(other)
        if cut == 1:
            flat.read({loaded: ids[length : length + 3]})
        flat.save(flat.take(loaded), tmp_path / "loaded", ids[: flat.length(loaded)])
        third = flat.begin(flat.load(tmp_path / "loaded")[0], flat.length(loaded))
        start = flat.length(own)
        rest = ids[start:] if cut == 1 else ids[start : start + (cut or 60)]
        steps = [rest, [9], [4]] if cut is not None else [[9], [4]]
        for chunk in steps:
            found = flat.read({each: chunk for each in (own, loaded, third)})
            scale = found[own].abs().max()
            assert (found[loaded] - found[own]).abs().max() <= 1e-5 * scale and (found[third] - found[own]).abs().max() <= 1e-5 * scale
        assert kept.length == length
        for request in flat.requests:
            flat.leave(request)
        assert flat.nbytes == 0


@pytest.mark.parametrize("method", [Stock(), SelfExtend(3, 8), LMInfinite(9, 3)], ids=str)
def test_many_go_on_from_what_was_taken(method):
    """Turn by turn, each taken from the last, in more parts than are read one after the other; and back to where a turn began, where that can be."""
    with longreach.extend(build("llama"), method) as extension:
        ids, flat = tokens(1, 5000, seed=2)[0].tolist(), extension.flat()
        own, alone, kept = flat.join(), flat.join(), []
        for start in range(0, 4200, 600):
            found = flat.read({own: ids[start : start + 600], alone: ids[start : start + 600]})
            assert (found[own] - found[alone]).abs().max() <= 1e-5 * found[alone].abs().max()
            kept.append(flat.take(own))
            flat.leave(own)
            own = flat.begin(kept[-1], start + 600)
        if not flat.forgets:
            back = flat.begin(kept[-1], 1000)
            found = flat.read({back: ids[1000:1300], (new := flat.join()): ids[:1300]})
            assert (found[back] - found[new]).abs().max() <= 1e-5 * found[new].abs().max()
        else:
            with pytest.raises(ValueError, match="cannot go back to token 1000"):
                flat.begin(kept[-1], 1000)
            found = flat.read({flat.begin(kept[-1], 4100): ids[4100:4150], (new := flat.begin(kept[-1], 4200)): ids[4200:4201]})
            assert len(found) == 2


def test_a_loaded_document_is_held_once(tmp_path):
    with longreach.extend(build("llama"), Stock()) as extension:
        flat = extension.flat()
        flat.read({(own := flat.join()): [3] * 4000})
        flat.save(flat.take(own), tmp_path / "own", [3] * 4000)
        flat.leave(own)
        kept = flat.load(tmp_path / "own")[0]
        before = flat.held([kept])
        flat.read({flat.begin(kept, 4000): [5, 6] for _ in range(8)})
        assert flat.held([kept]) < before * 1.2


def test_what_is_no_request_is_refused(tmp_path):
    with longreach.extend(build("llama"), Stock()) as extension:
        from transformers import DynamicCache

        for name, rows, mask in (("rows", 2, None), ("pads", 1, torch.tensor([[0, 1, 1]])), ("ids", 1, None)):
            cache = DynamicCache()
            extension.model(input_ids=tokens(rows, 3), attention_mask=mask, past_key_values=cache)
            extension.save(cache, tmp_path / name, None if name == "ids" else tokens(rows, 3))
            with pytest.raises(ValueError, match="no document of one row with its tokens; save it with"):
                extension.flat().load(tmp_path / name)


def test_tiers_say_whether_there_is_room():
    with longreach.extend(build("llama"), Stock(), memory=Tiered(device="1MiB", block=16)) as extension:
        flat = extension.flat()
        longest = max(n for n in range(200, 8000, 50) if flat.has_room(flat.need({}, [(n, None, 0)])))
        assert 500 < longest < 7950
        flat.read({(own := flat.join()): [3] * longest})
        flat.leave(own)
        with pytest.raises(ValueError, match="the tiers have no room left"):
            flat.read({flat.join(): [3] * (longest + 200)})


@pytest.mark.parametrize("memory", [None, Tiered(device="1MiB", host="1MiB", block=16)], ids=["contiguous", "tiers"])
def test_what_lay_side_by_side_is_taken_one_by_one_and_comes_back_together(memory):
    """Rows that are read together have their blocks in one base. Each is kept by itself, some of them shorter, and all go on among each other again."""
    with longreach.extend(build("llama"), Stock(), memory=memory) as extension:
        flat, texts = extension.flat(), [tokens(1, 400, seed=n)[0].tolist() for n in range(4)]
        requests = [flat.join() for _ in texts]
        flat.read(dict(zip(requests, texts)))
        kept = [flat.take(request) for request in requests]
        for request in requests:
            flat.leave(request)
        lengths = [399, 250, 399, 100]
        again = [flat.begin(snapshot, length) for snapshot, length in zip(kept, lengths)]
        second = [flat.begin(snapshot, 399) for snapshot in kept]
        found = flat.read({name: [text[length]] for name, text, length in zip([*again, *second], texts * 2, [*lengths, *[399] * 4])})
        for name, text, length in zip([*again, *second], texts * 2, [*lengths, *[399] * 4]):
            with torch.no_grad():
                want = extension.model(input_ids=torch.tensor([text[: length + 1]])).logits[0, -1]
            assert torch.allclose(found[name], want, atol=1e-4)
