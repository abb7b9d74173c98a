"""What has been read is used again as far as it agrees, and answers are those of reading everything anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as t

import longreach
from longreach import LMInfinite, SelfExtend
from longreach.running import generation
from longreach.running.prefix import Prefix, common
from tiny import SMALL, llama, tokenizer

READ = [10 + n % 240 for n in range(600)]


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(params=[SelfExtend(8, 16), LMInfinite(48, 4)], ids=["selfextend", "lm-infinite"])
def extension(model: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    with longreach.extend(model, request.param) as found:
        yield found


@torch.no_grad()
def logits(model: Any, ids: list[int], cache: Any = None, known: int = 0) -> torch.Tensor:
    return torch.as_tensor(model(torch.tensor([ids[known:]]), past_key_values=cache, use_cache=True).logits[0, -1])


def test_the_longest_common_beginning() -> None:
    assert common([1, 2, 3], [1, 2, 4, 5]) == 2 and common([1, 2], [1, 2, 3]) == 2 and common([], [1]) == 0 and common([2], [1]) == 0


@pytest.mark.parametrize("back", [0, 1, 100, 400, 600])
def test_it_goes_back_to_where_two_texts_differ_or_begins_anew(extension: Any, back: int) -> None:
    prefix, model = Prefix(), extension.model
    assert prefix.read(extension, READ, chunk_size=64) == 0 and prefix.ids == READ
    other = READ[: len(READ) - back] + [5, 6, 7]
    cache, known = prefix.resume(other[:-1])
    assert known == cache.get_seq_length() == (0 if back > 128 else len(READ) - back)  # both keep some keys of the last tokens only, and 128 more
    torch.testing.assert_close(logits(model, other, cache, known), logits(model, other), rtol=0, atol=2e-5)
    prefix.keep(cache, other)
    assert prefix.ids == other


def test_reading_on_costs_the_new_tokens_only_and_says_how_far_it_is(extension: Any) -> None:
    prefix, told = Prefix(), []
    fed: list[int] = []
    hook = extension.model.model.register_forward_pre_hook(lambda m, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    assert prefix.read(extension, READ[:100], chunk_size=60, progress=told.append) == 0
    assert prefix.read(extension, READ[:130], chunk_size=60, progress=told.append) == 100
    assert prefix.read(extension, READ[:130]) == 130 and prefix.read(extension, READ[:90]) == 90 and prefix.ids == READ[:90]
    hook.remove()
    assert fed == [60, 40, 30] and told == [60, 100, 130]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_work_that_does_not_end_leaves_nothing_that_could_be_wrong(extension: Any, failure: type[BaseException]) -> None:
    prefix = Prefix()
    prefix.read(extension, READ[:80])

    def fail(done: int) -> None:
        raise failure

    with pytest.raises(failure):
        prefix.read(extension, READ, chunk_size=40, progress=fail)
    assert prefix.ids == [] and prefix.read(extension, READ) == 0
    torch.testing.assert_close(logits(extension.model, [*READ, 5], prefix.cache, len(READ)), logits(extension.model, [*READ, 5]), rtol=0, atol=2e-5)


def test_what_was_not_read_yet_is_not_held(extension: Any) -> None:
    """The last new token of an answer stands in its ids, and not in its cache."""
    prefix = Prefix()
    found = generation.answer(extension.model, tokenizer(), READ[:30], 6, extension=extension, cache=prefix.resume(READ[:29])[0])
    prefix.keep(found.cache, READ[:30] + found.ids)
    assert prefix.ids == READ[:30] + found.ids[:-1] and prefix.cache.get_seq_length() == len(prefix.ids)


def test_a_stock_cache_that_cannot_go_back_is_read_again() -> None:
    """Layers that slide forget what left their window."""
    torch.manual_seed(0)
    model = t.MistralForCausalLM(t.MistralConfig(**SMALL, sliding_window=16, head_dim=8)).eval()
    prefix = Prefix()
    cache = t.DynamicCache(config=model.config)
    logits(model, READ[:50], cache)
    prefix.keep(cache, READ[:50])
    other = [*READ[:40], 5, 6]
    cache, known = prefix.resume(other[:-1])
    assert known == 0
    torch.testing.assert_close(logits(model, other, cache), logits(model, other), rtol=0, atol=1e-5)
