"""A request draws its own random numbers: the same seed gives the same answer, whatever else happens, and the process goes on with its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from longreach import SelfExtend, extend
from longreach.evals import tasks
from longreach.evals.harness import runner
from longreach.evals.harness.model_engine import ModelEngine
from longreach.evals.harness.together import Several
from longreach.evals.samples import budget
from longreach.evals.samples.base import Settings
from longreach.running import generation
from longreach.running.conversation import Conversation
from longreach.running.generation import Sampling
from longreach.running.sampling import OTHERS, Sampler
from tiny import llama, tokenizer

HOT = Sampling(temperature=5.0, seed=3)
PROMPT = list(range(20, 40))


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def sampled(model: Any, sampling: Sampling = HOT, **more: Any) -> list[int]:
    return generation.answer(model, tokenizer(), PROMPT, 12, sampling=sampling, **more).ids


def test_the_same_seed_gives_the_same_answer(model: Any) -> None:
    torch.manual_seed(1)
    one = sampled(model)
    torch.rand(7)
    assert sampled(model) == one != sampled(model, Sampling(5.0, seed=4)) and len(one) > 4
    torch.manual_seed(HOT.seed)  # as the whole process would be seeded
    logits = model(torch.tensor([PROMPT])).logits[0, -1].float() / 5.0
    assert one[0] == int(torch.multinomial(logits.softmax(-1), 1))


@pytest.mark.parametrize("sampling", [HOT, generation.GREEDY, Sampling(1.0, seed=-(2**63))])
def test_the_random_state_of_the_caller_is_left_alone(model: Any, sampling: Sampling) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    sampled(model, sampling)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_also_where_an_answer_is_broken_off(model: Any, failure: type[BaseException]) -> None:
    written: list[str] = []

    def fail(text: str) -> None:
        written.append(text)
        if len("".join(written)) > 2:
            raise failure

    before = torch.get_rng_state()
    with pytest.raises(failure):
        sampled(model, write=fail)
    assert torch.equal(torch.get_rng_state(), before) and written


def test_a_request_within_a_request_changes_neither(model: Any) -> None:
    one, inner = sampled(model), []
    outer = sampled(model, write=lambda text: inner.append(sampled(model)) if len(inner) < 2 else None)
    assert outer == one and inner == [one, one]


OURS = {"do_sample", "temperature", "top_p", "max_new_tokens", "max_length", "num_return_sequences"}  # each request says it
HONOURED = {"eos_token_id", "repetition_penalty", "top_k", "min_p"}
IDLE = {
    *("bos_token_id", "pad_token_id", "decoder_start_token_id"),  # prompts are whole
    *("num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping", "low_memory"),  # of several beams
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config", "disable_compile"),  # how it is computed
    *("continuous_batching_config", "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "use_mtp"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type"),  # sooner, no others
    *("remove_invalid_values", "renormalize_logits"),  # NaN raises; a softmax follows
    *("output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate"),
    *("transformers_version", "_from_model_config", "_commit_hash"),
}


def test_every_setting_that_transformers_knows_is_honoured_or_refused_or_changes_no_token() -> None:
    """A new one has to be looked at: if it changes a token, it goes to OTHERS."""
    config = GenerationConfig()
    assert not [name for name in vars(config) if name not in {*OTHERS, *OURS, *HONOURED, *IDLE}]
    assert not OTHERS.keys() & (OURS | HONOURED | IDLE)
    Sampler(config, HOT)


@pytest.mark.parametrize("name", [name for name in OTHERS if name in vars(GenerationConfig())])
def test_settings_that_would_change_a_token_are_refused(name: str) -> None:
    config = GenerationConfig()
    for idle in OTHERS[name]:
        setattr(config, name, idle)
        Sampler(config, HOT)
    setattr(config, name, 4)
    with pytest.raises(ValueError, match=rf"have {name}=4, which is not honoured here; set model\.generation_config\.{name} = None"):
        Sampler(config, HOT)


def test_among_them_those_that_need_no_processor_of_logits() -> None:
    for name, value in {"num_beams": 4, "stop_strings": ["a"], "top_h": 0.4, "penalty_alpha": 0.6, "dola_layers": "high", "max_time": 0.1}.items():
        config = GenerationConfig()
        setattr(config, name, value)
        with pytest.raises(ValueError, match=f"{name}=.*not honoured here"):
            Sampler(config, generation.GREEDY)


# -- logits that are none ---------------------------------------------------------------------------------------------------------------

UNSOUND = "gives NaN or infinity for the next token; load it in another dtype .*another method or other parameters"


@contextmanager
def unsound(model: Any, value: float, calls: int = 0) -> Iterator[None]:
    """After so many forwards the model gives one logit of this value, or all of them if it is the least."""

    def spoil(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal calls
        calls -= 1
        if calls < 0:
            output.logits[..., slice(None) if value == -math.inf else 7] = value

    handle = model.register_forward_hook(spoil, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [HOT, generation.GREEDY])
@pytest.mark.parametrize("more", [{}, {"beginnings": [[30, 31, 32, 33]]}])
def test_no_token_is_made_of_logits_that_are_none(model: Any, value: float, sampling: Sampling, more: dict[str, Any]) -> None:
    written: list[str] = []
    whole = tokenizer().decode(sampled(model, sampling, **more))
    with unsound(model, value, calls=3), pytest.raises(ValueError, match=UNSOUND):
        sampled(model, sampling, write=written.append, **more)
    assert "".join(written) in whole and "".join(written) != whole  # nothing of the token that is none
    logits = torch.zeros(9)
    logits[slice(None) if value == -math.inf else 7] = value
    with pytest.raises(ValueError, match=UNSOUND):
        Sampler(model.generation_config, sampling).token([1], logits)


def test_a_conversation_goes_on_after_it(model: Any) -> None:
    with extend(model, SelfExtend(4, 16)) as extension:
        talk, other = (Conversation(model, tokenizer(), "a" * 40, None, None, extension) for _ in range(2))
        talk.ask("one?", 4)
        other.ask("one?", 4)
        with unsound(model, math.nan, calls=2), pytest.raises(ValueError, match=UNSOUND):
            talk.ask("two?", 4)
        assert len(talk.turns) == 1 and talk.ask("three?", 4).ids == other.ask("three?", 4).ids


@pytest.mark.parametrize("size", [1, 2])
def test_an_evaluation_says_it_of_every_sample(model: Any, size: int) -> None:
    items = runner.plan({tasks.task("passkeys"): Settings(lengths=(700,), depths=(0.1, 0.9), samples=1)}, tokenizer())
    prompts = [budget.encode(tokenizer(), item.sample) for item in items]
    with extend(model, SelfExtend(32, 16), context=800) as extension:
        extension.flat()  # it is exact on this model, which is found out once
        with unsound(model, math.nan):
            found = dict(ModelEngine(model, tokenizer(), extension, several=Several(size, "as asked")).answers(prompts))
    assert len(found) == 2 and all(isinstance(reply, ValueError) and "NaN or infinity" in str(reply) for reply in found.values())
