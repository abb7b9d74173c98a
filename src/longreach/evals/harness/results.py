"""The files of a run: `run.json`, `samples.jsonl`, `metrics.json`, and the same as Markdown or in the shape of lm-eval.

Knows records, folders and JSON; not models, engines or pictures. Samples are only ever appended, one line each, so that a run which is killed
loses at most the line it was writing. The shards of a run write a file each into the same folder; whoever reads the folder reads all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longreach import files
from longreach.evals.scores import clusters, statistics
from longreach.quantities import counted

RUN, METRICS, CURVES, SAMPLES = "run.json", "metrics.json", "curves.csv", "samples"
GOES_ON = "free some space and run the same command again, which goes on from what is there"


@dataclass(frozen=True)
class Record:
    """One sample and what became of it. `metrics` are in 0..1; `error` is set where there is no answer or no score."""

    bench: str
    task: str
    task_version: str
    sample_id: str
    length_target: int | None
    prompt_tokens: int
    truncated_tokens: int
    depth: float | None
    depth_actual: float | None
    seed: int | None
    prompt_sha256: str
    prediction: str | None
    references: list[str]
    metrics: dict[str, float]
    stop_reason: str | None
    n_generated: int
    t_prefill: float | None
    tok_per_s: float | None
    peak_mem: int | None
    error: str | None
    config_hash: str
    reused_tokens: int = 0
    together: int = 1  # samples in one forward, at most
    meta: dict[str, Any] = field(default_factory=dict)
    document: str = ""  # a digest of it; runs of earlier versions do not have it
    prompt: str | None = None  # only where it was asked for

    @property
    def about(self) -> str:
        """Names the document that the question is about, in the samples of a task and length; where none is known, the question itself."""
        if not self.document and "keys" in self.meta:  # an earlier version of passkeys, which names the key last
            return self.sample_id.rpartition("/")[0]
        return self.document or str(self.meta.get("document", self.sample_id))

    @property
    def key(self) -> tuple[str, str]:
        return self.task, self.sample_id


@dataclass(frozen=True)
class Row:
    """One line of metrics.json: the mean of a metric in percent, over one length and depth, one length (depth null) or a whole task (both null)."""

    bench: str
    task: str
    length: int | None
    depth: float | None
    metric: str
    value: float | None
    n: int
    ci_low: float | None
    ci_high: float | None
    n_truncated: int
    n_errors: int
    documents: int | None = None  # that the n samples are about; None where they are no samples


def digest(data: Any) -> str:
    """A short name of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


class Folder:
    """The folder of a run, for writing by one of its shards and for reading by all."""

    def __init__(self, path: str | Path, shard: tuple[int, int] = (0, 1)) -> None:
        self.path = Path(path)
        index, world = shard
        if not 0 <= index < world:
            raise ValueError(f"shards are counted from 0: pass 0/{world} to {max(0, world - 1)}/{world}, not {index}/{world}")
        self.file = self.path / (f"{SAMPLES}.jsonl" if world == 1 else f"{SAMPLES}-{index}-of-{world}.jsonl")

    def check(self) -> None:
        """Refuses, before any work is done, a folder that cannot be."""
        if self.path == Path():
            raise ValueError("the results need a folder; name one, such as results")
        there = next(path for path in (self.path, *self.path.parents) if path.exists())
        if not there.is_dir():
            raise ValueError(f"{str(there)!r} is a file; name a folder for the results")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"this user may not write into {str(there)!r}; choose another folder for the results")
        self._before()

    def _before(self) -> dict[str, Any] | None:
        """The run that the folder holds, which may go on. Raises ValueError where files of somebody else's have the names of ours."""
        if (self.path / RUN).exists():
            found = read_object(self.path / RUN)
            if "config" not in found:
                raise ValueError(f"{str(self.path / RUN)!r} was not written by Longreach; choose another folder")
            return found
        if strange := [name for name in (METRICS, CURVES, self.file.name) if (self.path / name).exists()]:
            raise ValueError(f"{str(self.path)!r} holds {strange[0]} but no {RUN}, so it is no run of Longreach that could go on; choose another folder")
        return None

    def start(self, run: Mapping[str, Any]) -> None:
        """Write run.json. Raises ValueError if the folder holds a run of other settings or files of somebody else's, or cannot be written."""
        with files.said(self.path, GOES_ON):
            self.path.mkdir(parents=True, exist_ok=True)
        tasks = dict(run["tasks"])
        if (before := self._before()) is not None:
            if different := differences(before.get("config", {}), run["config"]):
                raise ValueError(f"{str(self.path)!r} holds a run of other settings ({different}); choose another folder, or the same settings to go on")
            for name, settings in tasks.items():
                known = before.get("tasks", {}).get(name)
                if known is not None and known["config_hash"] != settings["config_hash"]:
                    raise ValueError(
                        f"{str(self.path)!r} holds {name} with other settings ({differences(known, settings)}); choose another folder, or the same settings"
                    )
            run = {**run, "started": before.get("started", run["started"]), "tasks": {**before.get("tasks", {}), **tasks}}
        write_json(self.path / RUN, run)
        self._drop_torn_line()

    def finish(self, ended: str, more: Mapping[str, Any] | None = None) -> list[Row]:
        """Note the end, and `more` of the run, write metrics.json from all shards that are there -> its rows."""
        rows = summarise(self.records())
        self.conclude(rows, ended, more)
        return rows

    def conclude(self, rows: list[Row], ended: str, more: Mapping[str, Any] | None = None) -> None:
        """The same with rows that do not come from samples, such as perplexities."""
        write_json(self.path / METRICS, [dataclasses.asdict(row) for row in rows])
        write_json(self.path / RUN, {**read_object(self.path / RUN), "ended": ended, **(more or {})})

    def append(self, record: Record) -> None:
        data = dataclasses.asdict(record)
        if record.prompt is None:
            del data["prompt"]
        with files.said(self.path, GOES_ON), open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(data) + "\n")  # ASCII: an answer may hold half a character

    def records(self) -> list[Record]:
        """Those of all shards, by task and name; of several with one name the last that was written, unless only it failed."""
        found: dict[tuple[str, str], Record] = {}
        for file in sorted(self.path.glob(f"{SAMPLES}*.jsonl")):
            for record in read_records(file):
                if record.error is None or record.key not in found or found[record.key].error is not None:
                    found[record.key] = record
        return [found[key] for key in sorted(found)]

    @property
    def run(self) -> dict[str, Any]:
        if not (self.path / RUN).is_file():
            what = f"{str(self.path)!r} holds no {RUN}" if self.path.is_dir() else f"there is no folder {str(self.path)!r}"
            raise ValueError(f"{what}; pass a folder that `longreach eval run` or `longreach eval ppl` has written")
        return read_object(self.path / RUN)

    def metrics(self) -> list[Row]:
        """From the samples where there are any, for shards may have been added; else as written."""
        if records := self.records():
            return summarise(records)
        if not (self.path / METRICS).is_file():
            return []
        try:
            return [Row(**row) for row in read_json(self.path / METRICS)]
        except TypeError as error:
            raise ValueError(f"{str(self.path / METRICS)!r} does not hold the rows of a run ({error}); run again, or choose another folder") from None

    def _drop_torn_line(self) -> None:
        if not self.file.exists():
            return
        data = self.file.read_bytes()
        if whole := len(data) - (data.rfind(b"\n") + 1):
            with open(self.file, "r+b") as stream:
                stream.truncate(len(data) - whole)


def read_records(file: Path) -> list[Record]:
    """The lines of a file; a last one without its end was torn when the run was killed, and does not count."""
    known = {f.name for f in dataclasses.fields(Record)}
    found = []
    try:
        whole, _, _torn = file.read_text(encoding="utf-8").rpartition("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not text ({error.reason} at byte {error.start}); remove the file, or choose another folder") from None
    for number, line in enumerate(whole.splitlines() if whole else [], 1):
        try:
            found.append(Record(**{name: value for name, value in json.loads(line).items() if name in known}))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} of {str(file)!r} is no record of a sample ({error}); remove the line and run again to fill the gap") from None
    return found


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); choose another folder") from None


def read_object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object, so it was not written by Longreach; choose another folder")
    if wrong := [name for name in ("config", "tasks") if not isinstance(found.get(name, {}), dict)]:
        raise ValueError(f"{str(path)!r} does not describe a run ({' and '.join(wrong)}); choose another folder")
    return found


def write_json(path: Path, data: Any) -> None:
    """The shards of a run may do this at the same time."""
    files.write(path, json.dumps(data, indent=1, allow_nan=False) + "\n", full=GOES_ON)


UNDECISIVE = ("context", "lengths", "depths", "samples")  # a sample's answer does not depend on them, beyond what other settings say


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is not the same, in words."""
    names = [name for name in sorted({*before, *now} - {"config_hash", *UNDECISIVE}) if before.get(name) != now.get(name)]
    return "; ".join(f"{name}: {json.dumps(before.get(name))} there, {json.dumps(now.get(name))} now" for name in names)


def summarise(records: Iterable[Record]) -> list[Row]:
    """Rows of metrics.json. The order of the records does not matter."""
    cells: dict[tuple[str, str, int | None, float | None], list[Record]] = {}
    for record in sorted(records, key=lambda r: r.key):
        places = {(record.length_target, record.depth), (record.length_target, None), (None, None)}
        for length, depth in places:
            cells.setdefault((record.bench, record.task, length, depth), []).append(record)
    ordered = sorted(cells, key=lambda c: (c[0], c[1], c[2] is not None, c[2] or 0, c[3] is not None, c[3] or 0.0))
    return [row for cell in ordered for row in _rows(cell, cells[cell])]


def _rows(cell: tuple[str, str, int | None, float | None], records: list[Record]) -> list[Row]:
    good = [record for record in records if record.error is None]
    truncated, errors = sum(record.truncated_tokens > 0 for record in records), len(records) - len(good)
    names = sorted({name for record in good for name in record.metrics})
    rows = []
    for name in names:
        groups = clusters.grouped(*zip(*((record.metrics[name], record.about) for record in good if name in record.metrics)))
        found = statistics.mean([value for group in groups for value in group], clusters.design_effect(groups))
        rows.append(Row(*cell, name, percent(found.value), found.n, percent(found.low), percent(found.high), truncated, errors, len(groups)))
    return rows or [Row(*cell, "", None, 0, None, None, truncated, errors)]


def compare(a: Folder, b: Folder) -> list[dict[str, Any]]:
    """Two runs on the samples that both have answered, paired: one row for every task, length and metric; length null for all of them.
    Questions about one document are not independent: an interval and a p are those of n / effect samples, see `clusters`.

    Raises ValueError where the runs have no sample in common.
    """
    for folder in (a, b):
        if not folder.run.get("tasks"):
            raise ValueError(f"{str(folder.path)!r} holds no answers to compare; pass folders of `longreach eval run`, or use `longreach eval report`")
    first, second = ({(*r.key, r.prompt_sha256): r for r in folder.records() if r.error is None} for folder in (a, b))
    common = sorted(first.keys() & second.keys())
    if not common:
        raise ValueError("the two runs have no sample in common; run the same tasks with the same seed, lengths and tokenizer")
    cells: dict[tuple[str, int | None, str], list[tuple[float, float, str]]] = {}
    for key in common:
        one, other = first[key], second[key]
        for name in sorted(one.metrics.keys() & other.metrics.keys()):
            for length in {one.length_target, None}:
                cells.setdefault((one.task, length, name), []).append((one.metrics[name], other.metrics[name], one.about))
    rows = []
    for (task, length, name), pairs in sorted(cells.items(), key=lambda c: (c[0][0], c[0][2], c[0][1] is not None, c[0][1] or 0)):
        x, y, documents = zip(*pairs)
        groups = clusters.grouped([other - one for one, other in zip(x, y)], documents)
        found = dataclasses.asdict(statistics.compare(x, y, clusters.design_effect(groups)))
        for value in ("a", "b", "difference", "low", "high"):
            found[value] = percent(found[value])
        rows.append({"task": task, "length": length, "metric": name, **found, "documents": len(groups)})
    return rows


def size(n: int, documents: int | None) -> str:
    """How many samples, and about how many documents, where several are about one."""
    return str(n) if documents in (None, n) else f"{n} in {counted(documents or 0, 'document')}"


def percent(share: float) -> float:
    return round(100 * share, 4)


def markdown(rows: Iterable[Row], metrics: Mapping[str, str] | None = None) -> str:
    """A table of tasks by lengths: mean in percent, its 95 % interval, and the number of samples.

    metrics  the metric to show for each task; None shows all.
    """
    chosen = [row for row in rows if row.depth is None and row.value is not None and (metrics is None or metrics.get(row.task, row.metric) == row.metric)]
    lengths = sorted({row.length for row in chosen if row.length is not None})
    lines = ["| task | metric | all | " + " | ".join(map(str, lengths)) + (" |" if lengths else ""), "|---|---|---|" + "---|" * len(lengths)]
    for task, metric in dict.fromkeys((row.task, row.metric) for row in chosen):
        own = [row for row in chosen if (row.task, row.metric) == (task, metric)]
        cells = {row.length: _cell(row) for row in own}
        lines.append(f"| {task} | {metric} | " + " | ".join(cells.get(length, "") for length in (None, *lengths)) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    interval = "" if row.ci_low is None or row.ci_high is None else f"{row.ci_low:.4g} to {row.ci_high:.4g}, "
    return f"{row.value:.4g} ({interval}n={size(row.n, row.documents)})"


def runs_in_markdown(folders: Iterable[Folder]) -> str:
    """A heading and a table for each run: the main metric of its tasks, or every one where a run has no tasks."""
    parts = []
    for folder in folders:
        run = folder.run
        metrics = {name: facts["metric"] for name, facts in run.get("tasks", {}).items()}
        parts.append(f"## {folder.path.name}: {run.get('config', {}).get('method_text', '')}\n\n{markdown(folder.metrics(), metrics)}")
    return "\n".join(parts)


def lm_eval(run: Mapping[str, Any], rows: Iterable[Row]) -> dict[str, Any]:
    """The rows in the shape of lm-eval's results file; values are in 0..1 there. A length is a suffix of the metric."""
    results: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.depth is None and row.value is not None:
            name = row.metric if row.length is None else f"{row.metric}@{row.length}"
            results.setdefault(row.task, {"alias": row.task})[f"{name},none"] = row.value / 100
    tasks = run.get("tasks", {})
    counts = {row.task: {"effective": row.n} for row in rows if row.length is None and row.depth is None}
    return {
        "results": results,
        "versions": {name: tasks.get(name, {}).get("version") for name in results},
        "n-samples": counts,
        "config": run.get("config", {}),
        "configs": {name: tasks.get(name, {}) for name in results},
    }
