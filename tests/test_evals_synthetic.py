"""The synthetic tasks: prompts fit and are full, samples depend on seed, length and index alone, and what is asked can be found in the document.

Answers are found again by readers written here, from the text of the prompt alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from random import Random
from typing import Any

import pytest

import longreach
from longreach.evals import tasks as registry
from longreach.evals.samples import budget, fitting, words
from longreach.evals.samples.base import Parts, Sample, Settings
from longreach.evals.tasks import ancestral_trace, needle_threading, ruler_words
from longreach.evals.tasks.ruler import string_match_all

SYNTHETIC = {
    "ancestral-trace", "infinitebench-kv-retrieval", "infinitebench-number-string", "needle-threading-branched", "needle-threading-conditional",
    "needle-threading-multi-thread", "needle-threading-multiple", "needle-threading-single", "needle-threading-thread", "needlebench-multi-reasoning",
    "needlebench-multi-retrieval", "needlebench-single-retrieval", "ruler-cwe", "ruler-fwe", "ruler-niah-multikey-1", "ruler-niah-multikey-2",
    "ruler-niah-multikey-3", "ruler-niah-multiquery", "ruler-niah-multivalue", "ruler-niah-single-1", "ruler-niah-single-2", "ruler-niah-single-3", "ruler-vt",
}  # fmt: skip
TASKS = sorted(SYNTHETIC)
LENGTH = 1536
SETTINGS = Settings(lengths=(LENGTH,), depths=(0.0, 0.6), samples=2)
TOO_SHORT = {
    "needle-threading-branched", "needle-threading-conditional", "needle-threading-multi-thread", "needle-threading-multiple", "needle-threading-thread",
    "needlebench-multi-retrieval", "ruler-cwe",
}  # fmt: skip  # at 512 tokens of nano, with their published numbers of needles or words
CHINESE = "我想在海上航行,看看世界的水域。"
EDGE = ["", "\n\n", "?!.,;:", "\ud83d\ud83d", "\x00\x07", "\\boxed{" * 9, "}" * 9, "{[(<", "7" * 1_000_000, "a b-c " * 170_000, "\\boxed{" * 140_000]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return longreach.load("nano")[1]


@pytest.fixture(scope="module")
def samples(tokenizer: Any) -> dict[str, list[Sample]]:
    return {name: list(registry.task(name).samples(tokenizer, SETTINGS)) for name in TASKS}


def needs(tokenizer: Any, sample: Sample) -> int:
    return len(tokenizer(sample.parts.text)["input_ids"]) + sample.max_new_tokens


def oracle(sample: Sample) -> str:
    """The references as the prompt asks for them: in brackets, in a box (which the reference brings along), or as they are."""
    listed = ", ".join(sample.references)
    return f" [{listed}]" if sample.parts.query.endswith("in brackets and in order, are:") else f" {listed}"


def facts_of(sample: Sample) -> dict[str, str]:
    return json.loads(sample.parts.document)


def test_all_of_them_are_found():
    assert set(registry.tasks()) >= SYNTHETIC
    assert not any(registry.task(name).needs_data for name in TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_prompts_fit_and_are_full(name, samples, tokenizer):
    assert len({sample.id for sample in samples[name]}) == len(samples[name]) >= 2
    for sample in samples[name]:
        unit = 90 if "pairs" in sample.meta or name == "ruler-niah-multikey-3" else 60  # tokens of a pair, a needle, a fact, a line of noise
        unit = 12 if sample.meta.get("filler") == "essay" or name in ("needlebench-single-retrieval", "ruler-fwe") else unit  # of a word
        assert LENGTH - unit < needs(tokenizer, sample) <= LENGTH
        assert sample.meta["length_target"] == LENGTH and sample.meta["seed"] == 0
        assert fitting.needs(tokenizer, sample) == needs(tokenizer, sample)
        assert not sample.parts.text.endswith(" "), "a blank at the end would be a token of its own"
        for depth in (sample.meta.get("depth", 0.5), sample.meta.get("depth_actual", 0.5), *sample.meta.get("depths_actual", ())):
            assert 0 <= depth <= 1


@pytest.mark.parametrize("name", TASKS)
def test_512_tokens_suffice_or_are_refused_with_a_length_that_does(name, tokenizer):
    task, settings = registry.task(name), Settings(lengths=(512,), depths=(0.5,), samples=1)
    if name not in TOO_SHORT:
        for sample in task.samples(tokenizer, settings):
            assert needs(tokenizer, sample) <= 512
        return
    with pytest.raises(ValueError, match=r"choose a length of at least \d+") as refused:
        next(iter(task.samples(tokenizer, settings)))
    enough = int(re.findall(r"\d+", str(refused.value))[-1])
    assert needs(tokenizer, next(iter(task.samples(tokenizer, replace(settings, lengths=(enough + 64,)))))) <= enough + 64
    with pytest.raises(ValueError, match="choose a length"):
        next(iter(task.samples(tokenizer, replace(settings, lengths=(40,)))))


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_is_a_function_of_seed_length_and_index(name, samples, tokenizer):
    task = registry.task(name)
    alone = list(task.samples(tokenizer, replace(SETTINGS, lengths=(1300, LENGTH), depths=(0.6,), samples=1)))
    found = {sample.id: sample for sample in samples[name]}
    assert any(sample.id in found for sample in alone)
    for sample in alone:
        assert found.get(sample.id, sample) == sample
    moved = list(task.samples(tokenizer, replace(SETTINGS, seed=1, samples=1)))
    for one, other in zip(moved, samples[name]):
        assert one.id == other.id and one.parts.document != other.parts.document
        assert one.references != other.references or one.meta.get("question") == "distance", "two chains may have the same number of generations"
    assert len({sample.parts.text for sample in samples[name]}) == len(samples[name])


@pytest.mark.parametrize("name", TASKS)
def test_the_oracle_is_right_silence_is_wrong_and_no_answer_breaks_a_score(name, samples):
    task = registry.task(name)
    for sample in samples[name]:
        assert set(task.score(sample, oracle(sample)).values()) == {1.0}
        assert task.score(sample, " " + ", ".join(sample.references))[task.metric] == 1.0
        assert set(task.score(sample, "").values()) == {0.0}
    for text in EDGE:
        assert all(0 <= value <= 1 for value in task.score(samples[name][0], text).values())


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("ruler-niah")])
def test_magic_needles(name, samples):
    """Every needle is whole, is there once, and only the asked keys lead to the references."""
    task = registry.task(name)
    for sample in samples[name]:
        document = sample.parts.document
        said = re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", document)
        assert document.count("special magic") == len(said) and {kind for kind, _, _ in said} == {task.value_type}
        assert task.filler == "needles" or len(said) == max(task.keys, task.queries) * task.values
        assert "special magic" not in re.sub(r"One of the special magic \w+ for \S+ is: \S+\.", "", document)
        asked = re.split(r", and |, ", re.search(r" for (.+) mentioned", sample.parts.query)[1])
        assert len(asked) == task.queries and sample.parts.answer_prefix.count(asked[0]) == 1
        assert Counter(value for _, key, value in said if key in asked) == Counter(sample.references)
        assert all(document.count(reference) == 1 for reference in sample.references)
        assert len(sample.references) == task.queries * task.values
        if task.value_type == "numbers":
            assert all(re.fullmatch(r"[1-9]\d{6}", value) for _, _, value in said)
        plural = task.queries * task.values > 1
        assert sample.parts.answer_prefix.endswith(" are" if plural else " is") and (f"magic {task.value_type} for" in sample.parts.query) == plural


def test_variables_can_be_tracked(samples, tokenizer):
    hard = Settings(lengths=(LENGTH,), samples=1, options={"chains": 3, "hops": 6})
    for sample in [*samples["ruler-vt"], *registry.task("ruler-vt").samples(tokenizer, hard)]:
        holds: dict[str, str] = {}
        for variable, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", sample.parts.document):
            holds[variable] = holds.get(source, source)
        value = re.search(r"hold the value (\d{5})\?", sample.parts.query)[1]
        assert tuple(variable for variable, held in holds.items() if held == value) == sample.references
        assert [sample.parts.document.count(name) for name in sample.references] == [2] * (len(sample.references) - 1) + [1]
        assert value not in sample.parts.prefix and sample.parts.document.count(value) == 1
        assert f" {len(sample.references)} variables" in sample.parts.answer_prefix
    one, other = samples["ruler-vt"]
    assert one.parts.prefix == other.parts.prefix, "the worked example is the same for all samples"


@pytest.mark.parametrize("length, often, seldom, shown", [(LENGTH, 6, 1, (3, 1, 20)), (4096, 30, 3, (10, 3, 40))])
def test_common_words_can_be_counted(length, often, seldom, shown, tokenizer):
    (sample,) = registry.task("ruler-cwe").samples(tokenizer, Settings(lengths=(length,), samples=1))
    counts = Counter(re.findall(r"\d+\. (\w+)", sample.parts.document))
    assert {word for word, count in counts.items() if count == often} == set(sample.references) and len(sample.references) == 10
    assert set(counts.values()) == {often, seldom} and len(counts) == sample.meta["words"] > 10
    example, answer = sample.parts.prefix.split("Question:")
    solved = Counter(re.findall(r"\d+\. (\w+)", example))
    assert (max(solved.values()), min(solved.values()), len(solved)) == shown
    assert set(re.findall(r"\d+\. (\w+)", answer)) == {word for word, count in solved.items() if count == shown[0]}
    assert not set(solved) & set(counts)


def test_frequent_words_can_be_counted(samples, tokenizer):
    for sample in [*samples["ruler-fwe"], *registry.task("ruler-fwe").samples(tokenizer, Settings(lengths=(400,), samples=1))]:
        ranked = Counter(sample.parts.document.split()).most_common()
        assert ranked[0][0] == "..." and {word for word, _ in ranked[1:4]} == set(sample.references)
        assert ranked[3][1] > ranked[4][1], "the third word is not ahead of the fourth"
    assert abs(ruler_words.zeta(2.0) - 1.6449340668482264) < 1e-12 and abs(ruler_words.zeta(1.1) - 10.584448464950803) < 1e-9


def test_golden_haystack_of_needle_threading():
    pairs = needle_threading.stream(Settings(), 0).pairs(25)
    assert len(pairs.text) == 2000
    assert hashlib.sha256(pairs.text.encode()).hexdigest() == "181b5fbf2898649fec9cf64e85f93a66fff45eb15a6dcc79f656a24bdc4a9d72"
    asked = needle_threading.SingleNeedle().ask(pairs, Random(0), Settings(), 0.5)
    assert pairs.keys[12] in asked.question and asked.references == (pairs.values[12],)
    assert needle_threading.stream(Settings(), 0).pairs(7).text == pairs.text[: 7 * 80 - 1] + "}"
    assert needle_threading.stream(Settings(), 1).pairs(1) != needle_threading.stream(Settings(), 0).pairs(1)


@pytest.mark.parametrize("name", ["needle-threading-single", "needle-threading-multiple", "infinitebench-kv-retrieval"])
def test_values_belong_to_their_keys(name, samples, tokenizer):
    more: list[Sample] = []
    if name == "needle-threading-multiple":
        more = list(registry.task(name).samples(tokenizer, replace(SETTINGS, options={"placement": "clustered", "needles": 4})))
        for sample in more:
            places = sorted(list(facts_of(sample).values()).index(reference) for reference in sample.references)
            assert places == list(range(places[0], places[0] + 4))
    for sample in samples[name] + more:
        keys = re.findall(r'"([^"]+)"', sample.parts.query)
        assert tuple(facts_of(sample)[key] for key in keys) == sample.references
        assert all(sample.parts.document.count(reference) == 1 for reference in sample.references)
        if "depth" in sample.meta:
            last = sample.meta["pairs"] - 1
            assert list(facts_of(sample)).index(keys[0]) == int(sample.meta["depth"] * last)


def test_conditional_keys_hold_the_character(samples):
    for sample in samples["needle-threading-conditional"]:
        marked = [value for key, value in facts_of(sample).items() if "*" in key]
        assert tuple(marked) == sample.references and len(marked) == 5
        assert not needle_threading._UUID.findall(" ".join(key for key in facts_of(sample) if "*" in key)), "an altered key must not read as an answer"


@pytest.mark.parametrize("direction", ["forward", "backward", "random"])
@pytest.mark.parametrize("name", ["needle-threading-thread", "needle-threading-multi-thread"])
def test_threads_lead_to_their_values(name, direction, tokenizer):
    steps = []
    for sample in registry.task(name).samples(tokenizer, replace(SETTINGS, samples=3, options={"direction": direction})):
        facts, ends = facts_of(sample), []
        order = list(facts)
        for at in re.findall(r'"([^"]+)"', sample.parts.query):
            count = 0
            while facts[at] in facts:
                steps.append(order.index(facts[at]) - order.index(at))
                at, count = facts[at], count + 1
            assert count == (5 if name.endswith("-thread") and "multi" not in name else 4)
            ends.append(facts[at])
        assert tuple(ends) == sample.references and all(sample.parts.document.count(end) == 1 for end in ends)
    signs = {step > 0 for step in steps}
    assert signs == {"forward": {True}, "backward": {False}, "random": {True, False}}[direction]


@pytest.mark.parametrize("steps, branches, length", [(3, 2, LENGTH), (4, 3, 4096), (1, 2, LENGTH)])
def test_one_way_of_a_branched_thread_is_the_longest(steps, branches, length, tokenizer):
    settings = Settings(lengths=(length,), samples=4, options={"steps": steps, "branches": branches})
    for sample in registry.task("needle-threading-branched").samples(tokenizer, settings):
        facts = facts_of(sample)

        def ends(key: str, facts: dict[str, str] = facts) -> Iterator[tuple[int, str]]:
            following = [key for key in facts[key].split(", ") if key in facts]
            if not following:
                yield 0, facts[key]
            for other in following:
                yield from ((count + 1, end) for count, end in ends(other))

        ways = sorted(ends(re.search(r'"([^"]+)"', sample.parts.query)[1]), reverse=True)
        assert ways[0] == (steps, sample.references[0])
        assert len(ways) == 1 + (steps - 1) * (branches - 1) and all(count < steps for count, _ in ways[1:])


def test_lists_are_scored_as_sets_with_the_order_beside():
    task = registry.task("needle-threading-multiple")
    a, b, c = (words.uuid4(Random(seed)) for seed in range(3))
    sample = Sample("x", Parts(""), (a, b), 100)
    assert task.score(sample, f"[{b}, {a}]") == {"accuracy": 1.0, "order": 0.0, "precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert task.score(sample, f"{a.upper()} {c} {a}") == {"accuracy": 0.0, "order": 0.0, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    single = registry.task("needle-threading-single")
    assert single.score(replace(sample, references=(a,)), f"It is {a}, not {b}.") == {"accuracy": 1.0}
    assert single.score(replace(sample, references=(a,)), f"{b} or {a}") == {"accuracy": 0.0}
    assert single.score(replace(sample, references=(a,)), f"0{a}") == {"accuracy": 0.0}


def test_numbers_of_infinitebench(samples):
    for sample in samples["infinitebench-number-string"]:
        digits = sample.references[0]
        assert re.fullmatch(r"[1-9]\d{9}", digits) and re.search(r"(\d)\1", digits)
        assert sample.parts.document.count(digits) == 2 and re.findall(r"\d+", sample.parts.document) == [digits] * 2
        assert abs(sample.meta["depth_actual"] - sample.meta["depth"]) < 0.03
        score = registry.task("infinitebench-number-string").score
        assert score(sample, f" {digits}. Not 1.") == {"accuracy": 1.0} and score(sample, f" {digits}1") == {"accuracy": 0.0}
    kv = samples["infinitebench-kv-retrieval"][0]
    assert registry.task("infinitebench-kv-retrieval").score(kv, f'{{"x": "{kv.references[0]}"}}') == {"accuracy": 1.0}
    assert registry.task("infinitebench-kv-retrieval").score(kv, f"x{kv.references[0]}") == {"accuracy": 0.0}


def read_kinship(text: str) -> dict[str, tuple[str, int]]:
    """Younger person -> (elder person, generations between them)."""
    term = "|".join(sorted(ancestral_trace.GENERATIONS, key=len, reverse=True))
    person = r"[A-Z]\w+ [A-Z]\w+"
    found: dict[str, tuple[str, int]] = {}
    for template in ancestral_trace.TEMPLATES:
        pattern = template.replace(".", r"\.").replace("{elder}", f"(?P<elder>{person})", 1).replace("{younger}", f"(?P<younger>{person})", 1)
        pattern = pattern.replace("{elder}", "(?P=elder)").replace("{younger}", "(?P=younger)").replace("{term}", f"(?P<term>{term})")
        for match in re.finditer(rf"(?<![^\s]){pattern}", text):
            assert match["younger"] not in found
            found[match["younger"]] = match["elder"], ancestral_trace.GENERATIONS[match["term"]]
    return found


def test_ancestors_can_be_traced(samples, tokenizer):
    counted = registry.task("ancestral-trace").samples(tokenizer, Settings(samples=1, options={"facts": (2, 32)}))
    for sample in [*samples["ancestral-trace"], *counted, *samples["needlebench-multi-reasoning"]]:
        above = read_kinship(sample.parts.document)
        assert len(above) == sample.meta["facts"]
        (youngest,) = set(above) - {elder for elder, _ in above.values()}
        at, generations = youngest, 0
        while at in above:
            at, more = above[at]
            generations += more
        kind = sample.meta.get("question", "eldest-ancestor")
        right = {"distance": str(generations), "nth-descendant": youngest}.get(kind, at)
        assert sample.references == (f"\\boxed{{{right}}}",)
        asked = {"distance": (at, youngest), "nth-descendant": (str(generations), at), "nth-ancestor": (str(generations), youngest)}.get(kind, (youngest,))
        assert all(part in sample.parts.query for part in asked)
        if kind in ("eldest-ancestor", "nth-ancestor"):
            assert sample.parts.document.count(at) == 1
        assert sample.meta["length_target"] == (LENGTH if "facts" not in sample.id.split("/") else needs(tokenizer, sample))


def test_boxes_are_read_and_cleaned():
    match = ancestral_trace.boxed_match
    right = ancestral_trace.box("Alice Selby")
    for answer in (
        r"So \boxed{Alice Selby}.",
        r"\boxed{\text{Alice~Selby}}",
        r"\boxed{\boxed{Alice  Selby}}",
        '\\boxed{"Alice Selby"}',
        r"\boxed{No} \boxed{Alice Selby}",
        r"\boxed{{Alice Selby}} {",
        "\\boxed{\\[Alice\n Selby\\] }",
    ):
        assert match(answer, right) == 1.0
    for answer in ("Alice Selby", r"\boxed{Alice Selby} or \boxed{Hugo Selby}", r"\boxed{}", r"\boxed{Alice Selby", r"\boxed{alice selby}",
                   r"\boxed{No} \boxed{Alice Selby} \boxed{", r"\boxed {Alice Selby}", r"\fbox{Alice Selby}", "\\boxed{“Alice Selby”}", r"\boxed{Alice~ Selby}",
                   r"\boxed{{{Alice Selby}}}", r"\boxed{`Alice Selby`}"):  # fmt: skip
        assert match(answer, right) == 0.0


def test_needles_of_needlebench(samples):
    for name in ("needlebench-single-retrieval", "needlebench-multi-retrieval"):
        for sample in samples[name]:
            said = re.findall(r"^In its tower the village of (\w+) keeps the (\w+ \w+)\.$", sample.parts.document, re.M)
            assert tuple(thing for _, thing in said) == sample.references and sample.parts.document.count("In its tower") == len(said)
            assert all(village in sample.parts.query and sample.parts.document.count(village) == 1 for village, _ in said)
            assert all(sample.parts.document.count(thing) == 1 for thing in sample.references)
    for sample in samples["needlebench-multi-retrieval"]:
        assert all(abs(depth - i / 10) < 0.5 * 600 / len(sample.parts.document) + 0.1 for i, depth in enumerate(sample.meta["depths_actual"]))
        assert registry.task("needlebench-multi-retrieval").score(sample, sample.references[3]) == {"accuracy": 1 / 11}
    begin, deep = (sample for sample in samples["needlebench-single-retrieval"] if sample.meta["index"] == 0)
    strip = [re.sub(r"\s+", " ", re.sub(r"\nIn its tower.*\n", " ", sample.parts.document)).strip()[:2000] for sample in (begin, deep)]
    assert strip[0] == strip[1] and begin.references == deep.references, "depths are compared on one text"


@pytest.mark.parametrize("text", ["word " * 50, CHINESE * 40, "7" * 999, "One. Two! Three? " * 3, "x"])
@pytest.mark.parametrize("name", ["ruler-niah-single-1", "ruler-niah-multivalue", "needlebench-single-retrieval", "infinitebench-number-string"])
def test_any_text_serves_and_is_repeated_if_short(name, text, tokenizer):
    settings = Settings(lengths=(600,), depths=(0.5,), samples=1, text=text)
    (sample,) = registry.task(name).samples(tokenizer, settings)
    assert 600 - 60 < needs(tokenizer, sample) <= 600
    assert fitting.FILLER not in sample.parts.document and text.strip()[:3] in sample.parts.document
    if "depth_actual" in sample.meta and "ruler" not in name:
        assert abs(sample.meta["depth_actual"] - 0.5) < 0.5 * 600 / len(sample.parts.document) + 0.02
    assert registry.task(name).score(sample, oracle(sample))[registry.task(name).metric] == 1.0


def test_variables_hide_in_a_text_of_the_user(tokenizer):
    (sample,) = registry.task("ruler-vt").samples(tokenizer, Settings(lengths=(700,), samples=1, text="The sea is wide. The WHALE swims. " * 9))
    assert "The WHALE swims." in sample.parts.document and fitting.FILLER not in sample.parts.document


def test_a_chat_template_counts(tokenizer):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{{ bos_token }}{% for m in messages %}The user says at length: {{ m['content'] }} {% endfor %}And the assistant answers to that:"
    for name in ("ruler-niah-single-2", "needle-threading-single", "passkey", "niah"):
        sample = next(iter(registry.task(name).samples(chatty, SETTINGS)))
        parts = sample.parts
        begun = parts.answer_prefix if sample.chat == "prefix" else ""
        turn = [{"role": "user", "content": parts.text.removesuffix(begun)}]
        read = chatty.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + begun
        assert LENGTH - 90 < len(chatty(read, add_special_tokens=False)["input_ids"]) + sample.max_new_tokens <= LENGTH
        assert budget.encode(chatty, sample).needs == fitting.needs(chatty, sample) > budget.encode(chatty, sample, "off").needs
    chatty.chat_template = "{{ raise_exception('no users') }}"
    (sample,) = registry.task("passkey").samples(chatty, Settings(lengths=(300,), depths=(0.5,), samples=1))
    assert fitting.needs(chatty, sample) == budget.encode(chatty, sample, "off").needs <= 300, "without the template it can be run"
    with pytest.raises(ValueError, match="pass --chat off"):
        budget.encode(chatty, sample)


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("ruler-niah-single-1", {"keys": 2}, "has no option keys; it knows none"),
        ("ruler-vt", {"hop": 2}, "has no option hop; it knows chains, hops"),
        ("ruler-vt", {"hops": 0}, "whole number of at least 1 for hops"),
        ("ruler-cwe", {"common_repeats": 2, "uncommon_repeats": 2}, "greater than uncommon_repeats"),
        ("ruler-fwe", {"alpha": 1}, "alpha of 1.01 to 20"),
        ("needle-threading-multiple", {"placement": "even"}, "choose one of random, clustered"),
        ("needle-threading-thread", {"direction": "up"}, "choose one of forward, backward, random"),
        ("needle-threading-conditional", {"character": "a"}, "one character that no UUID has"),
        ("needle-threading-multi-thread", {"threads": True}, "whole number of at least 1 for threads"),
        ("needlebench-multi-retrieval", {"needles": 1}, "whole number of at least 2 for needles"),
        ("ancestral-trace", {"facts": "many"}, "whole numbers of 1 to 9999 for facts"),
    ],
)
def test_what_cannot_be_is_refused(name, options, says, tokenizer):
    with pytest.raises(ValueError, match=says):
        list(registry.task(name).samples(tokenizer, replace(SETTINGS, options=options)))
    with pytest.raises(ValueError, match="divide percentages by 100"):
        list(registry.task(name).samples(tokenizer, replace(SETTINGS, depths=(50.0,))))


def test_what_runs_out_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the text to hide facts in is empty"):
        list(registry.task("ruler-niah-single-2").samples(tokenizer, replace(SETTINGS, text=" \n")))
    with pytest.raises(ValueError, match="no more than 20 different units"):
        fitting.fill(tokenizer, lambda n: Sample("x", Parts("word " * n), ("word",), 1), 500, 1, 20)


def test_filling_finds_what_a_search_of_all_sizes_finds():
    """Units of unequal size; the truth tries every n."""

    def letters(text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text)))}

    class Letters:
        eos_token_id = sep_token_id = bos_token_id = chat_template = None
        __call__ = staticmethod(letters)

    for seed in range(20):
        rng = Random(seed)
        units = ["x" * rng.randint(1, 9) for _ in range(3000)]
        length = rng.randint(20, 4000)

        def build(n: int, units: list[str] = units) -> Sample:
            return Sample("x", Parts("".join(units[:n])), ("x",), 5)

        found = len(fitting.fill(Letters(), build, length).parts.document)
        best = max(size for size in accumulate(map(len, units), initial=0) if size <= length - 5)
        assert best - 10 <= found <= best


def test_names_and_words_are_distinct():
    for drawn in (words.ADJECTIVES, words.NOUNS, words.FIRST_NAMES, words.LAST_NAMES):
        assert len(set(drawn)) == len(drawn)
    for first in words.FIRST_NAMES:
        assert not any(other != first and other.endswith(first) for other in words.FIRST_NAMES), "a full name would be part of another"
    for parts in (words.LAST_NAMES, words.NOUNS):
        assert not any(other != part and other.startswith(part) for part in parts for other in parts)
    assert not any(other != part and other.endswith(part) for part in words.ADJECTIVES for other in words.ADJECTIVES)
    assert not any("'" in name for name in words.FULL_NAMES)
    assert len(ruler_words.word_pool()) > 8000


def test_string_match_counts_references_in_any_case():
    assert string_match_all("\x07 one, TWO", ("One", "two")) == 1.0
    assert string_match_all("one", ("one", "two")) == 0.5
    assert string_match_all("", ("one",)) == 0.0
