"""lm-evaluation-harness on an extended model, and our tasks within it. lm_eval is optional and imported when it is used.

What it is good for here: short tasks as a guard that an extension does no harm (mmlu, hellaswag, gsm8k), and numbers to compare with other
reports made with lm-eval. Its LongBench and RULER differ from the published ones; ours are in `evals/tasks/`. Its rolling perplexity reads
windows side by side, not sliding ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from longreach.evals.samples.base import Sample, Settings, Task
from longreach.hf.interfaces import CausalLM, Tokenizer
from longreach.quantities import CHUNK_SIZE

NEEDED = (0, 4, 13)
BEFORE = (0, 5)


def evaluate(
    model: CausalLM,
    tokenizer: Any,
    tasks: Sequence[Any],
    *,
    extension: Any = None,
    max_length: int | None = None,
    overflow: str = "refuse",
    chunk_size: int = CHUNK_SIZE,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    apply_chat_template: bool = False,
    gen_kwargs: Mapping[str, Any] | None = None,
    include_path: str | None = None,
    use_cache: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    seed: int = 0,
    bootstrap_iters: int = 1000,
    confirm_run_unsafe_code: bool = False,
) -> dict[str, Any]:
    """lm_eval.simple_evaluate with a model of ours -> its results, and "longreach": the method, the length, how many requests were shortened.

    tasks        names of lm-eval's tasks and groups (`mmlu_*` matches several), or what `as_lm_eval_task` makes.
    extension    what `extend` returned for the model; None evaluates the stock model.
    max_length   tokens of a prompt and its answer; None: the declared context, else the capacity or the trained window.
    overflow     "refuse" raises on a longer request, before any of its kind is run; "middle" or "left" shorten its prompt, are counted, and warn at the end.
    include_path folder with further task files (YAML).
    metadata     handed to the tasks, as lm-eval's --metadata.

    Raises ValueError, with the fix, if lm_eval is missing or of another version, or a task cannot work.
    """
    require()
    refuse_broken(tasks)
    import lm_eval
    from lm_eval.tasks import TaskManager

    from longreach.evals.lm_eval.model import LongContextLM

    given = {"tokenizer": tokenizer.name_or_path, **(metadata or {})}  # tasks that build prompts to a length ask for it
    manager = TaskManager(include_path=include_path, metadata=given)
    names = [name for name in tasks if isinstance(name, str)]
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ValueError(f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them, include_path adds a folder of your own")
    lm = LongContextLM(model, tokenizer, extension=extension, max_length=max_length, overflow=overflow, chunk_size=chunk_size)  # type: ignore[arg-type]
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=[*manager.match_tasks(names), *(task for task in tasks if not isinstance(task, str))],
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        gen_kwargs=dict(gen_kwargs) if gen_kwargs else None,
        use_cache=use_cache,
        bootstrap_iters=bootstrap_iters,
        **dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed),
        confirm_run_unsafe_code=confirm_run_unsafe_code,
    )
    report = lm.report()
    if lm.shortened:
        warnings.warn(
            f"{lm.shortened} of {lm.requests} requests were longer than {lm.max_length} tokens and lost {lm.left_out} of their tokens ({overflow}); "
            "their scores are not those of the whole prompts",
            stacklevel=2,
        )
    return {**dict(found), "longreach": report}


def scores(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `evaluate` returned as rows of plain data: task, metric, filter, value, stderr, n. None where there is no value or spread."""
    rows = []
    for task, metrics in found["results"].items():
        n = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                error = metrics.get(f"{metric}_stderr,{kind}")
                rows.append({"task": task, "metric": metric, "filter": kind, "value": finite(value), "stderr": finite(error), "n": n})
    return rows


def finite(value: Any) -> float | None:
    """A number; None for what is none, as lm-eval's "N/A" and the NaN of a single document."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def require() -> None:
    """Raises ValueError if lm_eval cannot be used."""
    from importlib.metadata import PackageNotFoundError, version

    fix = "run pip install 'longreach[eval]'"
    try:
        found = version("lm_eval")
    except PackageNotFoundError as error:
        raise ValueError(f"this needs lm-evaluation-harness, which is not installed; {fix}") from error
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    if not NEEDED <= numbers < BEFORE:
        raise ValueError(f"lm_eval {found} is installed, but 0.4.13 or a later 0.4 is needed; {fix}")


def refuse_broken(tasks: Sequence[Any]) -> None:
    if broken := [name for name in tasks if isinstance(name, str) and name.startswith("infinitebench")]:
        raise ValueError(f"lm-eval's {', '.join(broken)} fail to load their data; use our own: longreach eval run infinitebench-longbook-qa-eng and others")


def as_lm_eval_task(task: Task, tokenizer: Tokenizer, settings: Settings) -> Any:
    """One of our tasks for lm-eval: the same prompts, the same scores. The name in lm-eval is "longreach_" and ours.

    Answers have the longest of the samples' lengths, since lm-eval has one for a task. Whether a chat template applies is lm-eval's choice.
    """
    require()
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    samples: list[Sample] = list(task.samples(tokenizer, settings))
    if not samples:
        raise ValueError(f"{task.name} made no samples; ask for at least one")
    stops = {sample.stop for sample in samples}
    if len(stops) > 1:
        raise ValueError(f"the samples of {task.name} end at different strings, which lm-eval cannot do; run it with longreach eval run")
    documents = [
        {"index": index, "text": s.parts.prefix + s.parts.document + s.parts.query, "answer_prefix": s.parts.answer_prefix, "target": list(s.references)}
        for index, s in enumerate(samples)
    ]
    config = {
        "task": f"longreach_{task.name}",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": lambda document: document["text"],
        "doc_to_target": lambda document: document["target"],
        "process_results": lambda document, results: task.score(samples[document["index"]], results[0]),
        "gen_prefix": "answer_prefix" if any(s.parts.answer_prefix for s in samples) else None,
        "generation_kwargs": {"until": list(stops.pop()), "max_gen_toks": max(s.max_new_tokens for s in samples), "do_sample": False},
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in task.score(samples[0], "")],
        "metadata": {"version": task.version},
    }
    return ConfigurableTask(config=config)
