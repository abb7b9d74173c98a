"""What fails, is interrupted or is refused leaves a cache as it was; copies of caches; inference mode; rollbacks that generate announces."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig, StoppingCriteriaList

import longreach
from families import build, tokens
from longreach import LMInfinite, SelfExtend, Stock, StreamingLLM
from longreach.hf.cache import store_of
from longreach.memory.buffer import Buffer
from longreach.memory.slots import Slots, runs

METHODS = [SelfExtend(4, 16), LMInfinite(9, 3), StreamingLLM(9, 3), Stock()]
NEVER = 10_000  # an end token that no model makes


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    assert not a.isnan().any() and not b.isnan().any()
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module")
def model():
    model = build("llama", eos_token_id=None, num_hidden_layers=3)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=NEVER)
    return model


class Stop(Exception):
    pass


def places(model):
    """Where a forward may break off: before, in and after the attention of every layer, and in the head."""
    for layer in model.model.layers:
        yield layer.self_attn.register_forward_pre_hook
        yield layer.self_attn.register_forward_hook
    yield model.model.norm.register_forward_hook
    yield model.lm_head.register_forward_hook


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("chunk", [1, 40, 150, 512])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@torch.no_grad()
def test_a_forward_that_breaks_off_leaves_the_state_before_it(model, method, chunk, error):
    ids = tokens(1, 410)
    with longreach.extend(model, method, trained_window=4096) as extension:
        want = model(ids).logits[:, 400:]
        cache = model(ids[:, :400], use_cache=True).past_key_values
        before = [(kept, each.places.firsts, each.ends) for kept, each in store_of(cache).placements.items()]

        def broken(*anything):
            raise error

        for place in places(model):
            hook = place(broken)
            with pytest.raises(error):
                model(tokens(1, chunk, seed=9), past_key_values=cache)
            hook.remove()
            assert cache.get_seq_length() == 400
            assert off(model(ids[:, 400:], past_key_values=extension.fork(cache)).logits, want) <= 1e-5
        assert [(kept, each.places.firsts, each.ends) for kept, each in store_of(cache).placements.items()] == before
        assert off(model(ids[:, 400:], past_key_values=cache).logits, want) <= 1e-5


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_an_interrupt_while_tokens_are_counted_is_made_good(model, method, monkeypatch):
    ids, real = tokens(1, 700), Buffer.settle
    with longreach.extend(model, method, trained_window=4096):
        want = model(ids).logits[:, 690:]
        for at in range(6):
            for half in (False, True):
                cache, calls = model(ids[:, :300], use_cache=True).past_key_values, []

                def settle(buffer, calls=calls, at=at, half=half):
                    calls.append(1)
                    if half or len(calls) != at + 1:
                        real(buffer)
                    if len(calls) == at + 1:
                        raise KeyboardInterrupt

                monkeypatch.setattr(Buffer, "settle", settle)
                with pytest.raises(KeyboardInterrupt):
                    model(ids[:, 300:690], past_key_values=cache)
                monkeypatch.setattr(Buffer, "settle", real)
                assert cache.get_seq_length() == 690  # what generate goes by
                assert off(model(ids[:, 690:], past_key_values=cache).logits, want) <= 1e-5


@pytest.mark.parametrize("method", [SelfExtend(2, 8), LMInfinite(9, 3)], ids=str)
@torch.no_grad()
def test_a_refused_crop_leaves_the_store_untouched(model, method, tmp_path):
    ids = tokens(2, 420)
    mask = torch.ones_like(ids)
    mask[0, :250] = 0  # the short row could be cropped further than the long one
    with longreach.extend(model, method, trained_window=4096) as extension:
        cache = model(ids[:, :400], attention_mask=mask[:, :400], use_cache=True).past_key_values
        want = model(ids[:, 400:], attention_mask=mask, past_key_values=extension.fork(cache)).logits
        with pytest.raises(ValueError, match=r"of its 400 tokens the last 1\d\d can be .* \(at least 128 behind the farthest .*; crop less or start a new"):
            cache.crop(-200)
        extension.save(cache, tmp_path / "a.safetensors")
        loaded = extension.load(tmp_path / "a.safetensors").cache
        for own in (cache, loaded):
            assert torch.equal(model(ids[:, 400:], attention_mask=mask, past_key_values=own).logits, want)


@torch.no_grad()
def test_the_first_of_two_crops_says_what_is_left(model):
    with longreach.extend(model, LMInfinite(9, 3)):
        cache = model(tokens(1, 400), use_cache=True).past_key_values
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cache.crop(-20)  # as assisted decoding does all the time
        with pytest.warns(UserWarning, match="100 tokens were forgotten; only 9 more can be, until new ones are read"):
            cache.crop(-100)
        with pytest.raises(ValueError, match="of its 280 tokens the last 9 can be forgotten"):
            cache.crop(-100)
        cache.crop(-8)
        model(tokens(1, 130), past_key_values=cache)
        cache.crop(-128)


@torch.no_grad()
def test_a_first_call_that_is_refused_settles_nothing(model):
    with longreach.extend(model, SelfExtend(4, 16)):
        cache = DynamicCache()
        with pytest.raises(ValueError, match="does not cover 3 rows"):
            model(tokens(3, 10), attention_mask=torch.ones(3, 9), past_key_values=cache)
        assert off(model(tokens(2, 10), past_key_values=cache).logits, model(tokens(2, 10)).logits) <= 1e-5


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_a_failure_leaves_hidden_tokens_of_a_row_that_shares_a_call_with_a_shorter_one(model, method):
    """Both rows go on at token 50, and only the second has tokens behind it, which the mask hides: they are not written over."""
    ids, mask = tokens(2, 80), torch.ones(2, 80).long()
    mask[0, :10] = 0
    with longreach.extend(model, method, trained_window=4096) as extension:
        cache = model(ids[:, :60], attention_mask=mask[:, :60], use_cache=True).past_key_values
        want = model(ids[:, 60:62], attention_mask=mask[:, :62], past_key_values=extension.fork(cache)).logits
        hiding = mask[:, :65].clone()
        hiding[1, 50:60] = 0

        def broken(*anything):
            raise Stop

        hook = model.lm_head.register_forward_hook(broken)
        with pytest.raises(Stop):
            model(tokens(2, 5, seed=7), attention_mask=hiding, past_key_values=cache)
        hook.remove()
        assert torch.equal(model(ids[:, 60:62], attention_mask=mask[:, :62], past_key_values=cache).logits, want)


class NoMemory(TorchDispatchMode):
    """No memory for the n-th operation."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.done = at, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.done += 1
        if self.done == self.at:
            raise torch.OutOfMemoryError
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("chunk", [1, 200])
@torch.no_grad()
def test_no_memory_for_any_operation(model, method, chunk):
    """Either the call raises and has changed nothing, or it has succeeded: what it lacks to count its tokens is asked for again at the next use."""
    ids, end = tokens(2, 301 + chunk), 300 + chunk
    with longreach.extend(model, method, trained_window=4096) as extension:
        before = model(ids[:, :300], use_cache=True).past_key_values
        want = model(ids).logits[:, -1]
        with NoMemory(0) as mode:
            model(ids[:, 300:end], past_key_values=extension.fork(before))
        failures = 0
        for at in [*range(1, mode.done - 60, 29), *range(max(1, mode.done - 60), mode.done + 1)]:  # the last ones count what was read
            cache = extension.fork(before)
            try:
                with NoMemory(at):
                    model(ids[:, 300:end], past_key_values=cache)
            except torch.OutOfMemoryError:
                failures += 1
                assert cache.get_seq_length() == 300
                model(ids[:, 300:end], past_key_values=cache)
            assert cache.get_seq_length() == end
            assert off(model(ids[:, end:], past_key_values=cache).logits[:, -1], want) <= 1e-5
        assert failures


@torch.no_grad()
def test_a_cache_is_not_written_to_by_two_forwards_at_once(model):
    with longreach.extend(model, SelfExtend(4, 16)) as extension:
        ids = tokens(1, 30)
        want = model(ids).logits
        cache = model(ids[:, :20], use_cache=True).past_key_values
        found = []

        def nested(*anything):
            if not found:
                found.append(None)
                with pytest.raises(ValueError, match=r"pass another: extension\.fork"):
                    model(ids[:, 20:22], past_key_values=cache)
                found[0] = model(ids[:, 20:], past_key_values=extension.fork(cache)).logits

        for module in (model.model.layers[1], model.lm_head):
            hook = module.register_forward_hook(nested)
            outer = model(ids[:, 20:], past_key_values=cache).logits
            hook.remove()
            assert off(outer, want[:, 20:]) <= 1e-5 and off(found.pop(), want[:, 20:]) <= 1e-5
            cache.crop(-10)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("chunk", [1, 10, 200])
@pytest.mark.parametrize("fork", [lambda extension, cache: extension.fork(cache), lambda extension, cache: copy.deepcopy(cache)], ids=["fork", "deepcopy"])
@torch.no_grad()
def test_a_cache_is_forked_inside_the_forward_that_writes_to_it(model, method, chunk, fork):
    ids, end = tokens(2, 310 + chunk), 300 + chunk
    with longreach.extend(model, method, trained_window=4096) as extension:
        want = model(ids).logits
        for module in (model.model.layers[0], model.model.layers[2], model.lm_head):
            cache, forks = model(ids[:, :300], use_cache=True).past_key_values, []
            hook = module.register_forward_hook(lambda *anything, cache=cache, forks=forks: forks.append(fork(extension, cache)))
            model(ids[:, 300:end], past_key_values=cache)
            hook.remove()
            assert off(model(ids[:, end:], past_key_values=cache).logits, want[:, end:]) <= 1e-5
            assert off(model(ids[:, 300:], past_key_values=forks[0]).logits, want[:, 300:]) <= 1e-5


# -- copies ---------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_deep_copy_of_a_cache_is_a_fork(model):
    """The recipe of Transformers' documentation for one prefix and many questions."""
    with longreach.extend(model, SelfExtend(4, 16)):
        ids = tokens(1, 60)
        prefix = model(ids[:, :40], use_cache=True).past_key_values
        for seed in range(3):
            question = tokens(1, 20, seed=seed)
            own = copy.deepcopy(prefix)
            assert store_of(own) is not store_of(prefix) and {layer.store for layer in own.layers} == {store_of(own)}
            got = model.generate(torch.cat([ids[:, :40], question], 1), past_key_values=own, max_new_tokens=5, do_sample=False)
            assert torch.equal(got, model.generate(torch.cat([ids[:, :40], question], 1), max_new_tokens=5, do_sample=False))
        assert prefix.get_seq_length() == 40
        both = copy.deepcopy([prefix, prefix])
        assert both[0] is both[1]


@torch.no_grad()
def test_what_a_cache_cannot_do_names_the_fix(model):
    with longreach.extend(model, SelfExtend(4, 16)):
        cache = model(tokens(1, 20), use_cache=True).past_key_values
        for write in (pickle.dumps, lambda x: torch.save(x, io.BytesIO())):
            with pytest.raises(ValueError, match=r"extension\.save\(cache, file, ids\)"):
                write(cache)
        for read in (lambda: list(cache), lambda: cache.layers[0].keys, lambda: cache.layers[1].values):
            with pytest.raises(ValueError, match=r"extension\.fork\(cache\)"):
                read()
        with pytest.raises(ValueError, match="pass indices from 0 to 0"):
            cache.batch_select_indices(torch.tensor([0, 1]))
        cache.batch_select_indices(torch.tensor([-1, 0]))
        assert store_of(cache).rows == 2


# -- inference mode --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("order", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode), (torch.inference_mode, torch.enable_grad)])
def test_caches_go_in_and_out_of_inference_mode(model, method, order):
    ids = tokens(2, 400)
    with longreach.extend(model, method, trained_window=4096) as extension:
        with torch.no_grad():
            want = model(ids, use_cache=False).logits
        cache, got = DynamicCache(), []
        for number, (a, b) in enumerate([(0, 20), (20, 21), (21, 300), (300, 301), (301, 399), (399, 400)]):
            with order[number % 2]():
                got.append(model(ids[:, a:b], past_key_values=cache).logits.detach().clone())
                if number == 2:
                    cache.reorder_cache(torch.tensor([0, 1]))
                if number == 3:
                    cache = extension.fork(cache)
        assert off(torch.cat(got, 1), want) <= 1e-5


# -- rollbacks that are announced -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("count", [3, 100, 200, 500])
def test_prompt_lookup_of_any_length(model, method, count):
    ids = tokens(1, 40).repeat(1, 16)
    with longreach.extend(model, method, trained_window=4096), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were forgotten.*")
        plain = model.generate(ids, max_new_tokens=25, do_sample=False)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=count, max_new_tokens=25, do_sample=False), plain)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("count", [20, 200])
def test_an_extended_assistant_may_draft_any_number(model, method, count):
    """Drafts are decoded one by one and cropped together; how many there may be is said in the generation settings of the assistant."""
    assistant = build("llama", eos_token_id=None, num_hidden_layers=1)
    assistant.generation_config = GenerationConfig(
        pad_token_id=0, eos_token_id=NEVER, num_assistant_tokens=count, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    ids = tokens(1, 300)

    def three(ids: torch.Tensor, scores: object, **more: object) -> torch.Tensor:  # later rounds show nothing new
        return torch.full((ids.shape[0],), ids.shape[1] >= 303, device=ids.device)

    with longreach.extend(model, method, trained_window=4096), longreach.extend(assistant, method, trained_window=4096):
        plain = model.generate(ids, max_new_tokens=8, do_sample=False)
        drafted = model.generate(
            ids, assistant_model=assistant, max_new_tokens=count + 20, do_sample=False, stopping_criteria=StoppingCriteriaList([three])
        )
        assert 303 <= drafted.shape[1] <= 308 and torch.equal(drafted, plain[:, : drafted.shape[1]])


@torch.no_grad()
def test_a_long_draft_may_be_undone_and_memory_shrinks_again(model):
    ids = tokens(1, 900)
    with longreach.extend(model, LMInfinite(9, 3), trained_window=4096):
        cache = model(ids[:, :300], use_cache=True).past_key_values
        model(ids[:, 300:340], past_key_values=cache)
        bounded = store_of(cache).nbytes
        for _ in range(3):
            model(tokens(1, 400, seed=5), past_key_values=cache, logits_to_keep=400)
            cache.crop(-399)
        cache.crop(-3)  # three tokens of the drafts were kept
        assert off(model(ids[:, 340:], past_key_values=cache).logits, model(ids, use_cache=False).logits[:, 340:]) <= 1e-5
        for place in range(0, 300, 50):
            model(tokens(1, 50, seed=place), past_key_values=cache)
        assert store_of(cache).nbytes == bounded


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_a_long_draft_of_rows_of_unequal_length(model, method):
    """One row moves its tail and the memory shrinks for it, the other has written in place beyond that."""
    ids, mask = tokens(2, 420), torch.ones(2, 420).long()
    mask[1, :80] = 0
    with longreach.extend(model, method, trained_window=4096):
        cache = model(ids[:, :100], attention_mask=mask[:, :100], use_cache=True).past_key_values
        model(ids[:, 100:401], attention_mask=mask[:, :401], past_key_values=cache, logits_to_keep=301)
        logits = model(ids[:, 401:], attention_mask=mask, past_key_values=cache).logits
        for row in range(2):
            assert off(logits[row], model(ids[row : row + 1, mask[row].bool()]).logits[0, -19:]) <= 1e-5


@torch.no_grad()
def test_a_cache_that_records_its_past_can_forget_a_whole_forward(model):
    """What Transformers announces to a cache by `activate_past_recording`."""
    ids = tokens(1, 700)
    with longreach.extend(model, LMInfinite(9, 3), trained_window=4096):
        cache = model(ids[:, :300], use_cache=True).past_key_values
        for layer in cache.layers:
            layer.activate_past_recording()
        model(tokens(1, 300, seed=3), past_key_values=cache)
        model(tokens(1, 90, seed=3), past_key_values=cache)
        cache.crop(-390)
        for layer in cache.layers:
            layer.record_past = False
        assert off(model(ids[:, 300:], past_key_values=cache).logits, model(ids, use_cache=False).logits[:, 300:]) <= 1e-5


@pytest.mark.parametrize("family", ["phi3-longrope", "phimoe"])
def test_no_family_drops_the_cache_in_generate(family):
    """Phi-3 reads everything again where its own frequencies switch; ours are fixed, and the cache that was passed goes on."""
    model = build(family, eos_token_id=None)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=NEVER)
    with longreach.extend(model, SelfExtend(3, 8), trained_window=64), torch.no_grad():
        cache = model(tokens(1, 20), use_cache=True).past_key_values
        ids = torch.cat([tokens(1, 20), tokens(1, 15, seed=4)], 1)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False)
        assert cache.get_seq_length() == out.shape[1] - 1
        assert torch.equal(out, model.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False))
    assert "prepare_inputs_for_generation" not in vars(model)


# -- slots ----------------------------------------------------------------------------------------------------------------------------


def test_slots_are_those_of_a_plain_mask():
    """Against one flag per slot, through random operations."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: int(torch.randint(0, n, (1,), generator=generator))  # noqa: E731
    for _ in range(100):
        rows = 1 + draw(3)
        slots, real = Slots.empty(rows), torch.ones(rows, 0, dtype=torch.bool)
        for _ in range(12):
            if (kind := draw(4)) == 0:
                columns = 1 + draw(6)
                new = None if draw(3) == 0 else torch.rand(rows, columns, generator=generator) < 0.6
                slots.append(new, columns)
                real = torch.cat([real, torch.ones(rows, columns, dtype=torch.bool) if new is None else new], 1)
            elif kind == 1:
                gone = draw(slots.seen + 1)
                slots, real = slots.without(gone), real[:, : slots.seen - gone]
            elif kind == 2:
                row = draw(rows)
                kept = draw(int(real[row].sum()) + 1)
                slots.keeping(row, kept)
                real = real.clone()
                real[row, real[row].cumsum(0) > kept] = False
            else:
                index = [draw(rows) for _ in range(rows)]
                slots.select(index)
                real = real[index]
            assert slots.seen == real.shape[1]
            assert torch.equal(real, torch.ones_like(real) if slots.real is None else slots.real)
            assert [slots.tokens(r) for r in range(rows)] == real.sum(1).tolist()
            assert all(a < b < c < d for row in slots.pads for (a, b), (c, d) in itertools.pairwise(row))


def test_runs():
    assert runs(torch.tensor([True, False, True, True])) == [(0, 1), (2, 4)]
    assert runs(torch.zeros(0, dtype=torch.bool)) == [] and runs(torch.ones(3, dtype=torch.bool)) == [(0, 3)]


# -- a cache that changes while it is written to ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["crop", "reorder", "reset", "read"])
@torch.no_grad()
def test_a_cache_is_not_changed_inside_a_forward(model, change):
    """Nothing of it would fit together afterwards."""
    ids = tokens(2, 40)
    with longreach.extend(model, SelfExtend(4, 16)):
        cache = model(ids[:, :30], use_cache=True).past_key_values

        def interfere(*anything):
            hook.remove()
            if change == "crop":
                cache.crop(-5)
            elif change == "reorder":
                cache.reorder_cache(torch.tensor([1, 0]))
            elif change == "reset":
                cache.reset()
            else:
                store_of(cache).open(2)

        hook = model.model.layers[1].register_forward_hook(interfere)
        with pytest.raises(ValueError, match=r"while a forward was writing to it; .* extension\.fork"):
            model(ids[:, 30:], past_key_values=cache)
        if change == "reset":
            assert off(model(ids, past_key_values=cache).logits, model(ids).logits) <= 1e-5
            return
        left, rows = (25, [0, 1]) if change == "crop" else (30, [1, 0] if change == "reorder" else [0, 1])
        assert store_of(cache).lengths == [left, left]
        assert off(model(ids[rows, left:], past_key_values=cache).logits, model(ids[rows]).logits[:, left:]) <= 1e-5


@torch.no_grad()
def test_a_cast_model_and_its_old_cache_do_not_meet():
    model, ids = build("llama"), tokens(1, 30)
    with longreach.extend(model, SelfExtend(4, 16)):
        cache = model(ids[:, :20], use_cache=True).past_key_values
        model.half()
        with pytest.raises(ValueError, match=r"read in torch.float32 and the model now computes in torch.float16; pass a new DynamicCache"):
            model(ids[:, 20:], past_key_values=cache)
        model.float()
        model(ids[:, 20:], past_key_values=cache)


@torch.no_grad()
def test_a_gap_in_position_ids_is_refused(model):
    """Stock puts it between the tokens. A method says how far tokens are apart."""
    ids = tokens(2, 40)
    places = torch.arange(40).expand(2, -1)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with longreach.extend(model, SelfExtend(4, 16)) as extension:
        want = model(ids, attention_mask=mask, use_cache=False).logits
        for given in (places, mask.cumsum(1) - 1, places + torch.tensor([[40], [90]])):  # slots, tokens, any place to begin at
            cache = model(ids[:, :20], attention_mask=mask[:, :20], position_ids=given[:, :20], use_cache=True).past_key_values
            cache = copy.deepcopy(cache)
            cache.reorder_cache(torch.tensor([0, 1]))
            parts = [model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=given[:, a:b], past_key_values=cache).logits for a, b in ((20, 21), (21, 40))]
            assert off(torch.cat(parts, 1), want[:, 20:]) <= 1e-5
        for b in (21, 40):
            with pytest.raises(ValueError, match="position_ids begin at 45 for row 0, whose next token has index 20: a gap"):
                cache = model(ids[:, :20], attention_mask=mask[:, :20], use_cache=True).past_key_values
                model(ids[:, 20:b], attention_mask=mask[:, :b], position_ids=places[:, 20:b] + 25, past_key_values=extension.fork(cache))
        with pytest.raises(ValueError, match="do not count 40 tokens of 2 rows"):
            model(ids, position_ids=torch.arange(40).expand(3, -1))
