"""Running tasks on an engine: which samples, in which order, what is done already, and what became of each.

Knows tasks, budgets, engines and the folder of a run; not models, options or terminals.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longreach.evals.harness.costs import PLAIN, Work
from longreach.evals.harness.engine import Engine, Reply, answers
from longreach.evals.harness.estimates import Clock, Step
from longreach.evals.harness.items import Item, ordered
from longreach.evals.harness.items import shard as part_of
from longreach.evals.harness.results import UNDECISIVE, Folder, Record, digest
from longreach.evals.samples import budget
from longreach.evals.samples.base import Sample, Settings, Task
from longreach.evals.samples.budget import ChatMode, Prompt
from longreach.hf.interfaces import Tokenizer
from longreach.quantities import counted

META = ("length_target", "depth", "depth_actual", "seed")  # have fields of their own in a record


Progress = Callable[[Step], None]


@dataclass(frozen=True)
class Outcome:
    """answered and failed in this call; known before it; of all three, those whose prompt was cut."""

    answered: int
    failed: int
    known: int
    truncated: int


def plan(work: Mapping[Task, Settings], tokenizer: Tokenizer, chat: ChatMode = "auto") -> list[Item]:
    """Every sample of the tasks, with the length of its prompt."""
    items: list[Item] = []
    for task, settings in work.items():
        seen: set[str] = set()
        for sample in task.samples(tokenizer, settings):
            if sample.id in seen:
                raise ValueError(f"{task.name} makes two samples called {sample.id}; leave out what is given twice (lengths, depths)")
            seen.add(sample.id)
            prompt = budget.encode(tokenizer, sample, chat)
            items.append(Item(task, sample, len(items), len(prompt.ids), prompt.shared))
    if not items:
        raise ValueError("there are no samples to run; pass lengths (--lengths 1k,2k), and at least one depth and sample")
    return items


def describe(work: Mapping[Task, Settings], config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tasks and their settings as run.json holds them, each with a hash of what decides its answers.

    config  what else does: the model, the method, the cuts.

    Lengths, depths and the number of samples do not: a sample is a function of its own, so that a run can be made larger.
    """
    found = {}
    for task, settings in work.items():
        text = None if settings.text is None else hashlib.sha256(settings.text.encode("utf-8", "surrogatepass")).hexdigest()
        facts = {name: getattr(task, name) for name in ("group", "version", "license", "source", "metric", "random")}
        chosen = {"seed": settings.seed, "options": {**task.options, **settings.options}, "text": text, "data": settings.data}
        size = {"lengths": list(settings.lengths), "depths": list(settings.depths), "samples": settings.samples}
        deciding = {name: value for name, value in config.items() if name not in UNDECISIVE}
        found[task.name] = {**facts, **chosen, **size, "config_hash": digest([task.name, task.version, chosen, deciding])}
    return found


def overflowing(items: Sequence[Item], limit: int | None) -> str | None:
    """What to say, before any work is done, where prompts are longer than may be read."""
    long = [item for item in items if limit is not None and item.needs > limit]
    if not long:
        return None
    most = max(item.needs for item in long)
    need = f"{len(long)} of {counted(len(items), 'sample')} {'needs' if len(long) == 1 else 'need'}"
    return (
        f"{need} more than {counted(limit or 0, 'token')} with the answer, the longest {most}; "
        f"pass --context {most}, shorter --lengths, or --truncate middle, which cuts their documents and counts it"
    )


def run(
    items: Sequence[Item],
    engine: Engine,
    tokenizer: Tokenizer,
    folder: Folder,
    hashes: Mapping[str, str],
    *,
    limit: int | None = None,
    truncate: str | None = None,
    chat: ChatMode = "auto",
    shard: tuple[int, int] = (0, 1),
    save_prompts: bool = False,
    work: Work = PLAIN,
    progress: Progress = lambda step: None,
) -> Outcome:
    """Answer and score the samples of a shard that the folder does not hold yet. What goes wrong with one is recorded, and the run goes on.

    hashes    of every task's settings, see `describe`; answers under others do not count.
    limit     tokens of a prompt and its answer together; None: no limit.
    truncate  what to leave out of a longer prompt, see `budget.fit`; None raises before the first answer.
    shard     (i, n): every n-th document from the i-th on, with all its questions.
    work      what the engine does for a prompt, by which the time left is told.
    """
    if truncate is None and (sentence := overflowing(items, limit)):
        raise ValueError(sentence)
    mine = ordered(part_of(items, *shard))
    known = {record.key: record for record in folder.records() if record.error is None}
    waiting = [item for item in mine if not _is_known(item, known, hashes)]
    clock = Clock(len(mine), waiting, work, limit)
    left = {item.key: item for item in waiting}
    cut = sum(known[item.key].truncated_tokens > 0 for item in mine if item.key not in left)
    failed = 0

    def note(item: Item, prompt: Prompt | None, reply: Reply | Exception) -> None:
        nonlocal failed, cut
        record = _record(item, prompt, reply, hashes[item.task.name], save_prompts)
        folder.append(record)
        del left[item.key]
        failed, cut = failed + (record.error is not None), cut + (record.truncated_tokens > 0)
        clock.read(item, None if isinstance(reply, Exception) else reply, record.prompt_tokens)
        progress(clock.step(next(iter(left.values()), None), failed))

    begun: dict[int, tuple[Item, Prompt]] = {}

    def prompts() -> Iterator[Prompt]:
        numbers = itertools.count()
        for item in waiting:
            try:
                prompt = budget.fit(tokenizer, item.sample, limit, truncate, chat)
            except Exception as problem:  # one bad sample must not cost the run
                note(item, None, problem)
                continue
            begun[next(numbers)] = item, prompt
            yield prompt

    progress(clock.step(next(iter(left.values()), None), failed))
    for number, reply in answers(engine, prompts()):
        note(*begun.pop(number), reply)
    return Outcome(len(waiting) - failed, failed, len(mine) - len(waiting), cut)


def _is_known(item: Item, known: Mapping[tuple[str, str], Record], hashes: Mapping[str, str]) -> bool:
    record = known.get(item.key)
    if record is None or record.config_hash != hashes[item.task.name]:
        return False
    return record.references == list(item.sample.references) and (record.truncated_tokens > 0 or record.prompt_tokens == item.tokens)


def _record(item: Item, prompt: Prompt | None, reply: Reply | Exception, config_hash: str, save_prompts: bool) -> Record:
    sample: Sample = item.sample
    metrics: dict[str, float] = {}
    problem, answer = (reply, None) if isinstance(reply, Exception) else (None, reply)
    if answer is not None:
        try:
            metrics = item.task.score(sample, answer.text)
        except Exception as found:
            problem = found
    error = None if problem is None else f"{type(problem).__name__}: {' '.join(str(problem).split())}"
    meta = {name: value for name, value in sample.meta.items() if name not in META}
    return Record(
        bench=item.task.group or item.task.name,
        task=item.task.name,
        task_version=item.task.version,
        sample_id=sample.id,
        length_target=sample.meta.get("length_target"),
        prompt_tokens=len(prompt.ids) if prompt else item.tokens,
        truncated_tokens=prompt.truncated if prompt else 0,
        depth=sample.meta.get("depth"),
        depth_actual=sample.meta.get("depth_actual"),
        seed=sample.meta.get("seed"),
        prompt_sha256=prompt.sha256 if prompt else "",
        prediction=answer.text if answer else None,
        references=list(sample.references),
        metrics=metrics,
        stop_reason=answer.finish if answer else None,
        n_generated=answer.tokens if answer else 0,
        t_prefill=round(answer.prefill_seconds, 5) if answer else None,
        tok_per_s=round(answer.tokens_per_second, 3) if answer and answer.tokens_per_second else None,
        peak_mem=answer.peak_memory if answer else None,
        error=error,
        config_hash=config_hash,
        reused_tokens=answer.reused if answer else 0,
        together=answer.together if answer else 1,
        meta=meta,
        document=digest(sample.parts.document) if sample.parts.document else "",
        prompt=prompt.text if prompt and save_prompts else None,
    )
