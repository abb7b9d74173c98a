"""SirLLM: the keep rule and its oracle, turns against a stock model whose cache is evicted and turned by hand, and what caches do after an eviction."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import longreach
from families import build, tokens
from longreach import Combined, LMInfinite, SelfExtend, SirLLM, Stock, StreamingLLM, YaRN
from longreach.core.eviction import ALONE
from longreach.evals.samples.fitting import FILLER
from longreach.evals.samples.haystack import PASS_KEY
from longreach.hf.cache import store_of
from longreach.running.conversation import Conversation
from longreach.running.prefix import Prefix
from test_conversation import QUESTIONS, talking
from test_matrix import difference
from test_memory_of_ones_own import Ledger
from tiny import llama

METHOD = SirLLM(18, 2, 4, decay=0.7)  # a cache of 24
TURNS = (10, 9, 7, 12, 3, 1, 6, 16, 2, 5)


def kept(scores: list[float], tokens: int, method: SirLLM) -> list[int]:
    """The rule of the paper, token by token."""
    held, size = len(scores), method.cache
    if held + tokens <= size:
        return list(range(held))
    best = sorted(range(held), key=lambda j: (-scores[j], j))[: max(0, method.entropy_size - tokens)]
    stay = {*best, *range(method.start)}
    for j in range(held - 1, 0, -1):
        if len(stay) < size - tokens:
            stay.add(j)
    return sorted(stay)


class Truth:
    """A stock model in fp64. Before a turn, tokens are taken out of its cache, and the keys of the others turned to their new places."""

    def __init__(self, model: Any, method: SirLLM) -> None:
        self.model, self.method, self.cache = copy.deepcopy(model).double(), method, DynamicCache()
        self.scores: list[float] = []

    @torch.no_grad()
    def turn(self, ids: torch.Tensor, tokens: int | None = None) -> torch.Tensor:
        """ids [m] -> logits [m, V]. `tokens`: of the turn, where it has more; then the next call goes on with it."""
        stay = kept(self.scores, tokens or len(ids), self.method)
        self.scores = [self.scores[j] * self.method.decay for j in stay]
        if self.cache.get_seq_length():
            inverse = self.model.model.rotary_emb.inv_freq.double()
            angle = (torch.arange(len(stay)) - torch.tensor(stay))[:, None] * inverse
            for layer in self.cache.layers:
                k = layer.keys[:, :, stay]
                a, b = k.chunk(2, -1)
                layer.keys = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
                layer.values = layer.values[:, :, stay]
        self.first = len(stay)
        return self.go_on(ids)

    @torch.no_grad()
    def go_on(self, ids: torch.Tensor) -> torch.Tensor:
        at = len(self.scores)
        logits = self.model(ids[None], past_key_values=self.cache, position_ids=torch.arange(at, at + len(ids))[None], use_cache=True).logits[0]
        known = -logits[:-1].log_softmax(-1)
        known = known[torch.arange(len(ids) - 1), ids[:-1] if self.method.alignment == "official" else ids[1:]].tolist()
        if at == 0:
            own = 0.0
        else:
            own = -self.last.log_softmax(-1)[self.before if self.method.alignment == "official" else ids[0]].item()
        self.scores += [own, *known]
        if others := self.scores[self.first + 1 :]:
            self.scores[self.first] = max(others)
        self.last, self.before = logits[-1], ids[-1]
        return logits


def alone(truth: Truth) -> int:
    """Tokens of a turn that comes one by one: as many as there is room for, or a few."""
    return min(ALONE, truth.method.eviction.turn, truth.method.cache - len(truth.scores) or ALONE)


def scores(cache: Any, row: int = 0) -> torch.Tensor:
    return store_of(cache).scores[row].values


# -- the rule -------------------------------------------------------------------------------------------------------------------------


def test_oracle_of_the_specification():
    given = torch.tensor([9, 0.1, 5, 0.2, 3, 0.3, 4, 0.1, 0.2, 2])
    keep, left = SirLLM(8, 2, 0, decay=0.5).eviction.before(3, given)
    assert keep.tolist() == [0, 1, 2, 4, 6, 8, 9]
    assert torch.equal(left, given[keep] / 2)


def test_the_rule_keeps_what_the_paper_says():
    random.seed(1)
    evicted = 0
    for _ in range(400):
        method = SirLLM(random.randint(1, 12), random.randint(0, 4), random.randint(0, 5), decay=random.choice([1.0, 0.6]))
        held, size = random.randint(0, method.cache), random.randint(1, method.cache - method.start)
        given = torch.tensor([random.randint(0, 9) / 2 for _ in range(held)])  # many are equal
        keep, left = method.eviction.before(size, given)
        assert keep.tolist() == kept(given.tolist(), size, method)
        assert len(keep) == min(held, method.cache - size)
        assert torch.equal(left, given[keep] * method.decay)
        evicted += len(keep) < held
    assert evicted > 100


def test_a_turn_too_long_is_refused_with_its_fix():
    rule = SirLLM(8, 2, 1).eviction
    assert len(rule.before(11, torch.zeros(0))[0]) == 0  # an empty cache takes as many as it holds
    with pytest.raises(ValueError, match=r"in several turns of at most 2 tokens, as longreach\.stream"):
        rule.before(10, torch.zeros(5))
    with pytest.raises(ValueError, match="turn of 12 tokens does not fit into a cache of 11"):
        rule.before(12, torch.zeros(0))


@pytest.mark.parametrize(("wrong", "sentence"), [
    ({"entropy_size": 0}, "entropy_size must be an integer of at least 1"), ({"start": -1}, "start must be"), ({"recent": 0.5}, "recent must be"),
    ({"decay": 0}, "decay must be above 0"), ({"decay": 1.1}, "at most 1"), ({"decay": True}, "pass 1 for none"), ({"alignment": "x"}, "'token' or 'official'"),
])  # fmt: skip
def test_parameters_are_checked(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        SirLLM(**wrong)


def test_capacity_is_unlimited_where_the_window_holds_the_cache():
    assert SirLLM(508).capacity(512) is None and SirLLM(509).capacity(512) == 512
    assert SirLLM.recommended(512, 10**6) == SirLLM(508) and SirLLM.recommended(8192, 10**6) == SirLLM()
    assert SirLLM(508).largest_distance(10**6) == 511 and SirLLM(508).largest_distance(100) == 99


# -- exactness ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [METHOD, SirLLM(20, 0, 4, decay=0.9, alignment="official"), SirLLM(3, 0, 21)], ids=str)
@torch.no_grad()
def test_turns_equal_a_stock_model_that_is_evicted_by_hand(method):
    """Logits of every token, and every score, over turns and decoded tokens."""
    model, ids = build("llama"), tokens(1, 160)[0]
    truth, at = Truth(model, method), 0
    with longreach.extend(model, method):
        cache = DynamicCache()
        for size in TURNS:
            wanted = truth.turn(ids[at : at + size], alone(truth) if size == 1 else size)
            found = model(ids[None, at : at + size], past_key_values=cache).logits[0]
            at += size
            assert difference(found, wanted) <= 1e-5
            torch.testing.assert_close(scores(cache), torch.tensor(truth.scores), rtol=1e-4, atol=1e-5)
            assert store_of(cache).lengths == [len(truth.scores)] and cache.get_seq_length() == at
        left = 0
        for _ in range(20):
            size = left or alone(truth)
            wanted = truth.go_on(ids[at : at + 1]) if left else truth.turn(ids[at : at + 1], size)
            left = size - 1
            assert difference(model(ids[None, at : at + 1], past_key_values=cache).logits[0], wanted) <= 1e-5
            at += 1


@pytest.mark.parametrize("family", ["llama-yarn", "phi", "cohere", "gptj", "bloom"])
@torch.no_grad()
def test_other_encodings_equal_the_dense_reference(family):
    """A scaled rotary, a partial one, an interleaved one, attention outside the interface, and biases: the truth is dense, over those that are left."""
    model, ids, found = build(family), tokens(1, 120), []
    for backend in ("auto", "reference"):
        with longreach.extend(model, METHOD, backend=backend):
            cache, parts = DynamicCache(), []
            for size in (*TURNS, *[1] * 9):
                at = cache.get_seq_length()
                parts.append(model(ids[:, at : at + size], past_key_values=cache).logits)
            assert len(scores(cache)) < cache.get_seq_length()
            found.append(torch.cat(parts, 1))
    assert difference(*found) <= 1e-5


@torch.no_grad()
def test_keys_are_not_rounded_at_every_turn():
    """In bf16, after many turns, the keys that are read are the raw ones turned once to their places."""
    model, ids = build("llama").bfloat16(), tokens(1, 600)
    with longreach.extend(model, METHOD) as extension:
        cache = DynamicCache()
        while (at := cache.get_seq_length()) < 590:
            model(ids[:, at : at + 8], past_key_values=cache)
        store = store_of(cache)
        for layer, memory in zip(extension.layers, store.layers, strict=True):
            raw, turned = (next(iter(memory.view(form, slice(0, 1), 0, store.lengths[0], False))).k for form in reversed(layer.forms))
            assert torch.equal(turned, layer.rotary.table(torch.arange(store.lengths[0])).rotate(raw)) and not torch.equal(raw, turned)


@torch.no_grad()
def test_a_turn_may_be_read_in_any_forwards():
    model, ids, found = build("llama"), tokens(1, 60), []
    with longreach.extend(model, METHOD) as extension:
        for sizes in ([[20], [15], [9, 1, 1]], [[3, 17], [1, 1, 9, 4], [1, 5, 5]]):
            cache, parts = DynamicCache(), []
            extension.turn(cache, 20, 15, 11)
            for turn in sizes:
                for size in turn:
                    at = cache.get_seq_length()
                    parts.append(model(ids[:, at : at + size], past_key_values=cache).logits)
            found.append((torch.cat(parts, 1), scores(cache)))
    assert difference(found[0][0], found[1][0]) <= 1e-5
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [3, 4, 512])
@torch.no_grad()
def test_a_stream_does_not_depend_on_its_chunks(size):
    model, ids = build("llama"), tokens(1, 200)[0]
    with longreach.extend(model, METHOD) as extension:
        losses = [torch.cat([chunk.losses for chunk in longreach.stream(extension, ids, chunk_size=n)]) for n in (size, 6)]
    assert losses[0][0].isnan() and difference(losses[0][1:], losses[1][1:]) <= 1e-5


@torch.no_grad()
def test_rows_with_pads_equal_each_alone():
    model, ids = build("llama"), tokens(2, 90)
    sizes = [(10, 6), (9, 12), (3, 8), (12, 11), (7, 2)]
    with longreach.extend(model, METHOD):
        alone = []
        for row in range(2):
            cache, at, parts = DynamicCache(), 0, []
            for size in (*(pair[row] for pair in sizes), *[1] * 8):
                parts.append(model(ids[row : row + 1, at : at + size], past_key_values=cache).logits[0])
                at += size
            alone.append((torch.cat(parts), scores(cache)))
        cache, at, mask, logits = DynamicCache(), [0, 0], torch.zeros(2, 0, dtype=torch.long), [[], []]
        for pair in (*sizes, *[(1, 1)] * 8):
            width = max(pair)
            new = torch.zeros(2, width, dtype=torch.long)
            for row, size in enumerate(pair):
                new[row, width - size :] = ids[row, at[row] : at[row] + size]
            mask = torch.cat([mask, torch.stack([torch.arange(width) >= width - size for size in pair]).long()], 1)
            found = model(new, attention_mask=mask, past_key_values=cache).logits
            for row, size in enumerate(pair):
                logits[row].append(found[row, width - size :])
                at[row] += size
        assert store_of(cache).slots.evicted[0] > 10 < store_of(cache).slots.evicted[1]
        for row in range(2):
            assert difference(torch.cat(logits[row]), alone[row][0]) <= 1e-5
            torch.testing.assert_close(scores(cache, row), alone[row][1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_generate_goes_on_beyond_the_cache_as_one_token_after_the_other():
    model, ids = build("llama"), tokens(1, 20)
    with longreach.extend(model, METHOD):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 20:]
        cache, new = DynamicCache(), []
        logits = model(ids, past_key_values=cache).logits
        while len(new) < 40:
            new.append(int(logits[0, -1].argmax()))
            logits = model(torch.tensor([new[-1:]]), past_key_values=cache).logits
        assert found.tolist() == new and store_of(cache).slots.evicted[0] > 30


@torch.no_grad()
def test_drafts_that_are_cropped_leave_no_trace_in_the_scores():
    """Within a turn, for drafts are forwards of several tokens."""
    model, ids, found = build("llama"), torch.cat([tokens(1, 10)] * 2, 1), []
    with longreach.extend(model, SirLLM(60)) as extension:
        for drafts in (None, 3):
            cache = DynamicCache()
            extension.turn(cache, 45)
            settings = {"max_new_tokens": 18, "do_sample": False, "eos_token_id": 10_000, "pad_token_id": 0, "prompt_lookup_num_tokens": drafts}
            out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)
            found.append((out, scores(cache)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_generate_goes_on_in_a_padded_batch_as_in_each_row():
    model, ids = build("llama"), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with longreach.extend(model, METHOD):
        settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        both = model.generate(ids, attention_mask=mask, **settings)[:, 20:]
        for row, first in enumerate((0, 7)):
            own = ids[row : row + 1, first:]
            assert torch.equal(model.generate(own, attention_mask=torch.ones_like(own), **settings)[0, own.shape[1] :], both[row])


def test_the_caller_gets_the_logits_that_it_wants():
    model, ids = build("llama"), tokens(1, 12)
    with torch.no_grad(), longreach.extend(model, METHOD):
        every = model(ids).logits
        assert torch.equal(model(ids, logits_to_keep=1).logits, every[:, -1:])
        assert torch.equal(model(ids, logits_to_keep=torch.tensor([2, 5]), use_cache=False).logits, every[:, [2, 5]])


# -- what a cache does after an eviction ------------------------------------------------------------------------------------------------


def filled(model: Any, ids: torch.Tensor, sizes: tuple[int, ...] = TURNS) -> DynamicCache:
    cache = DynamicCache()
    for size in sizes:
        at = cache.get_seq_length()
        model(ids[:, at : at + size], past_key_values=cache)
    return cache


def more(model: Any, cache: Any, ids: torch.Tensor, sizes: tuple[int, ...] = (4, 1, 1, 9)) -> torch.Tensor:
    at, parts = cache.get_seq_length(), []
    for size in sizes:
        parts.append(model(ids[:, at : at + size], past_key_values=cache).logits)
        at += size
    return torch.cat(parts, 1)


@torch.no_grad()
def test_forks_go_on_by_themselves_and_beams_share_what_was_read():
    model, ids = build("llama"), tokens(1, 120)
    with longreach.extend(model, METHOD) as extension:
        cache = filled(model, ids)
        wanted = more(model, filled(model, ids), ids)
        twin, beams = extension.fork(cache), extension.fork(cache)
        more(model, cache, ids.flip(1))
        assert difference(more(model, twin, ids), wanted) <= 1e-5
        beams.reorder_cache(torch.tensor([0, 0, 0]))
        assert difference(more(model, beams, ids.expand(3, -1)), wanted.expand(3, -1, -1)) <= 1e-5


@torch.no_grad()
def test_a_crop_reaches_the_last_eviction_and_no_further():
    model, ids = build("llama"), tokens(1, 120)
    with longreach.extend(model, METHOD):
        cache, other = filled(model, ids, (10, 9)), filled(model, ids, (10, 9))
        for size in (7, 4):
            at = cache.get_seq_length()
            model(ids[:, at : at + size], past_key_values=cache)
        before = store_of(cache).lengths[0]
        model(ids[:, 60:66], past_key_values=cache)
        once = scores(cache).clone()
        floor = store_of(cache).scores[0].floor
        assert floor < before
        with pytest.raises(ValueError, match="cannot go back to token"):
            cache.crop(-(store_of(cache).lengths[0] - floor + 1))
        cache.crop(-4)
        found = model(ids[:, 62:66], past_key_values=cache).logits
        torch.testing.assert_close(scores(cache)[:-4], METHOD.decay * once[:-4], rtol=1e-4, atol=1e-5)  # for the rest is a turn of its own
        assert scores(cache)[-4] == scores(cache)[-3:].max()
        for size in (7, 4):
            at = other.get_seq_length()
            model(ids[:, at : at + size], past_key_values=other)
        assert difference(found, model(ids[:, 60:66], past_key_values=other).logits[:, 2:]) <= 1e-5


@torch.no_grad()
def test_a_forward_that_fails_can_be_read_again():
    model, ids = build("llama"), tokens(1, 120)
    with longreach.extend(model, METHOD):
        cache, wanted = filled(model, ids), more(model, filled(model, ids), ids)

        def fail(*args: Any) -> None:
            raise RuntimeError("for a test")

        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="for a test"):
            more(model, cache, ids)
        hook.remove()
        kept_scores = scores(cache).clone()
        assert difference(more(model, cache, ids), wanted) <= 1e-5
        assert len(kept_scores) <= METHOD.cache - 4


@torch.no_grad()
def test_another_memory_evicts_too():
    model, ids, found = build("llama"), tokens(2, 120), []
    for memory in ({}, {"memory": Ledger}):
        with longreach.extend(model, METHOD, **memory):
            found.append(more(model, filled(model, ids), ids))
    assert difference(*found) <= 1e-5


@torch.no_grad()
def test_bytes_do_not_grow():
    model, ids = build("llama"), tokens(1, 2000)
    with longreach.extend(model, METHOD) as extension:
        chunks = [(chunk.store_bytes, chunk.cache) for chunk in longreach.stream(extension, ids[0], losses=False)]
        sizes, store = [size for size, _ in chunks], store_of(chunks[-1][1])
    assert max(sizes) == sizes[10] == sizes[-1] and store.lengths[0] <= METHOD.cache and store.slots.evicted[0] >= 1970
    assert len(store.scores[0].values) == store.lengths[0] and store.slots.pads == [[]]


@torch.no_grad()
def test_what_cannot_be_is_refused_with_the_fix(tmp_path):
    model, ids = build("llama"), tokens(1, 120)
    with longreach.extend(model, METHOD) as extension:
        cache = filled(model, ids)
        with pytest.raises(ValueError, match=r"what sirllm keeps .* cannot be saved as a document; keep the text"):
            extension.save(cache, tmp_path / "d")
        with pytest.raises(ValueError, match="a flat forward has none; read requests one by one"):
            extension.flat()
        with pytest.raises(ValueError, match="call the model with its head"):
            model.model(ids[:, :4], past_key_values=cache)
        with pytest.raises(ValueError, match="pass input_ids, not inputs_embeds"):
            model(inputs_embeds=model.get_input_embeddings()(ids[:, :4]), past_key_values=cache)
        mask = torch.ones(1, cache.get_seq_length() + 2, dtype=torch.long)
        mask[0, 5] = 0
        with pytest.raises(ValueError, match="hides a token in a row from which tokens were evicted"):
            model(ids[:, :2], attention_mask=mask, past_key_values=cache)
        for cached in (True, False):
            with pytest.raises(ValueError, match=r"read it in several turns of at most 6 tokens, as longreach\.stream"):
                model(ids[:, :25], use_cache=cached)
        with pytest.raises(ValueError, match="turns of at least one token"):
            extension.turn(cache, 0)
    with longreach.extend(model, SelfExtend(3, 8)) as extension, pytest.raises(ValueError, match="to a method that evicts, such as SirLLM, not"):
        extension.turn(DynamicCache(), 3)
    with pytest.raises(ValueError, match=r"1 of the 2 layers .* use StreamingLLM or LMInfinite"):
        longreach.extend(build("gemma2"), METHOD)


@torch.no_grad()
def test_logits_that_are_not_finite_are_refused_and_nothing_was_read():
    model, ids = build("llama"), tokens(1, 120)
    with longreach.extend(model, METHOD):
        cache = filled(model, ids, (10,))
        hook = model.lm_head.register_forward_hook(lambda module, args, output: output * float("nan"))
        with pytest.raises(ValueError, match="the model gives NaN for a token"):
            model(ids[:, 10:14], past_key_values=cache)
        hook.remove()
        assert cache.get_seq_length() == 10 and store_of(cache).lengths == [10]


@torch.no_grad()
def test_it_stands_under_other_frequencies():
    model, ids, found = build("llama"), tokens(1, 120), []
    for backend in ("auto", "reference"):
        with longreach.extend(model, Combined(YaRN(2.0), METHOD), backend=backend):
            found.append(more(model, filled(model, ids), ids))
    assert difference(*found) <= 1e-5


@torch.no_grad()
def test_without_an_eviction_it_is_plain_attention():
    model, ids = build("llama"), tokens(1, 60)
    with longreach.extend(model, Stock()):
        wanted = more(model, filled(model, ids, (10, 9, 7)), ids)
    with longreach.extend(model, SirLLM(60)):
        assert difference(more(model, filled(model, ids, (10, 9, 7)), ids), wanted) <= 1e-6


# -- conversations --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["none", "plain", "rewriting"])
def test_a_conversation_goes_on_in_a_full_cache(template, monkeypatch):
    """A question costs its own tokens. Where a template writes an answer in another way than the model did, the answer is cropped: nothing has left since."""
    real, found = Prefix.resume, []

    def resume(prefix: Prefix, ids: list[int]) -> Any:
        held = len(prefix.ids)
        cache, same = real(prefix, ids)
        found.append((held, same))
        return cache, same

    monkeypatch.setattr(Prefix, "resume", resume)
    with talking(llama(), SirLLM(60), template) as talk:
        for question in QUESTIONS * 2:
            assert talk.ask(question, 12).ids
            store = store_of(talk.prefix.cache)
            assert store.lengths[0] <= 64 and store.seen == talk.known
    assert store.slots.evicted[0] > 100
    assert len(found) == 6 and all(held - same <= (0 if template == "none" else 12) for held, same in found)
    assert any(held > same for held, same in found) == (template != "none")


def test_nano_answers_from_the_first_turn_what_other_bounded_caches_have_lost():
    """A pass key, a dozen turns of filler, the question: the same 256 places in each cache."""
    model, tokenizer = longreach.load("nano")
    found = {}
    for method in (SirLLM(252), StreamingLLM(252), LMInfinite(252, 4)):
        with longreach.extend(model, method) as extension:
            talk = Conversation(model, tokenizer, extension=extension)
            talk.ask(PASS_KEY.statement.format(key="91644"), 1)
            for _ in range(12):
                talk.ask(" ".join([FILLER] * 3), 1)
            found[method.name] = "91644" in talk.ask(f"{PASS_KEY.question} {PASS_KEY.lead}", 8).text
            assert talk.known > 4 * 256
    assert found == {"sirllm": True, "streaming-llm": False, "lm-infinite": False}


@torch.no_grad()
def test_a_cache_smaller_than_the_probe_of_extend():
    model, ids = build("llama"), tokens(1, 4)
    want = model(ids).logits
    with longreach.extend(model, SirLLM(3, 2)):
        assert difference(model(ids).logits, want) <= 1e-4
        with pytest.raises(ValueError, match="a turn of 6 tokens does not fit into a cache of 5"):
            model(tokens(1, 6))
