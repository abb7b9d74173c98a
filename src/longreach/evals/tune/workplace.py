"""The folder of a tune: a run folder for every candidate (answers, losses) and for the ceiling, which `longreach eval report` reads as any other run.

Knows folders, records and JSON; not models. A folder of other settings, or with files of somebody else's, is refused; what is read back is checked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longreach.evals.harness import results
from longreach.evals.harness.items import Item
from longreach.evals.harness.results import RUN, Folder, Record, Row
from longreach.evals.scores import statistics
from longreach.evals.tune.bench import Answers, Loss
from longreach.methods.base import Method
from longreach.planning.machine import cache_folder

FILE, KIND = "tune.json", "longreach tune"
ANSWERS, LOSSES, CEILING = "candidates", "losses", "ceiling"
BLOCKS = 256  # at most: pieces of a passage whose mean losses are kept
FEWEST = 64  # tokens of a piece
MOST_SECONDS = 1e9


@dataclass(frozen=True)
class Workplace:
    """`settings` decide every answer, the version of this library among them, and name the folder in the user's cache where none is given. `model` is its name
    for people."""

    path: Path
    settings: Mapping[str, Any]
    model: str

    @classmethod
    def open(cls, path: Path | None, settings: Mapping[str, Any], model: str) -> Workplace:
        """Make the folder, or go on in it. Raises ValueError, with the fix, where it holds something else."""
        root = default_path(settings) if path is None else path
        Folder(root).check()
        root.mkdir(parents=True, exist_ok=True)
        file = root / FILE
        if file.exists():
            before = results.read_json(file)
            if not isinstance(before, dict) or before.get("kind") != KIND or not isinstance(before.get("settings"), dict) or not _line(before.get("model")):
                raise ValueError(f"{str(file)!r} was not written by this longreach; choose another --work folder, or remove it")
            if (there := before["settings"].get("longreach")) != settings["longreach"]:
                made = f"longreach {json.dumps(there)}" if there else "a longreach that did not say its version"
                raise ValueError(
                    f"{str(root)!r} holds what {made} measured, and this is {json.dumps(settings['longreach'])}: their answers do not belong together; "
                    f"choose another --work folder, or go on with that version"
                )
            if different := results.differences(before["settings"], settings):
                raise ValueError(f"{str(root)!r} holds a tune of other settings ({different}); choose another --work folder, or the same settings to go on")
            return cls(root, settings, before["model"])  # the same weights may have been given by another name then
        if any(root.iterdir()):
            raise ValueError(f"{str(root)!r} holds files and no {FILE}, so it is no tune that could go on; choose an empty or a new --work folder")
        results.write_json(file, {"kind": KIND, "model": model, "settings": dict(settings)})
        return cls(root, settings, model)

    def folder(self, kind: str, name: str) -> Folder:
        return Folder(self.path / kind / name)

    def config(self, method: Method, **more: Any) -> dict[str, Any]:
        """Of the run of a method, as run.json has it."""
        named = {"model": self.model, "method": method.to_json(), "method_text": method.brief(), "context": self.settings["tuned_context"]}
        return {**named, **self.settings, **more}


def default_path(settings: Mapping[str, Any]) -> Path:
    return cache_folder() / "tune" / f"{str(settings['fingerprint'])[:12]}-{settings['tuned_context']}-{results.digest(dict(settings))}"


def slug(method: Method) -> str:
    """The name of a method's folder: readable, and another one for every method."""
    words = re.sub(r"[^a-z0-9.]+", "-", "-".join(method.options()).lower()).strip("-")
    return f"{words[:60]}-{results.digest(method.to_json())[:8]}"


def answers(folder: Folder, config: Mapping[str, Any], items: Sequence[Item], hashes: Mapping[str, str], unit: str) -> Answers | None:
    """What a folder holds of the answers to some questions; None if one of them is missing."""
    run = _run(folder, config)
    if run is None:
        return None
    known = {record.key: record for record in folder.records() if record.error is None}
    found = [known.get((item.task.name, item.sample.id)) for item in items]
    scores, seconds, reading = [], 0.0, 0.0
    for item, record in zip(items, found):
        if record is None or record.config_hash != hashes[item.task.name] or record.prompt_tokens != item.tokens:
            return None
        scores.append(_score(folder, record, item.task.metric))
        prefill = _seconds(record.t_prefill) or 0.0
        reading = max(reading, prefill)
        speed, tokens = _seconds(record.tok_per_s), _seconds(record.n_generated)
        seconds += prefill + ((tokens - 1) / speed if speed and tokens and tokens > 1 else 0.0)
    units = run.get("units")
    whole = _seconds(units.get(unit)) if isinstance(units, dict) else None
    return Answers(tuple(scores), seconds if whole is None else whole, reading, tuple(item.task.name for item in items))


def note_seconds(folder: Folder, unit: str, seconds: float) -> None:
    """How long a document took with everything around it: an attachment, its making."""
    results.write_json(folder.path / RUN, {**folder.run, "units": {**units(folder), unit: round(seconds, 3)}})


def units(folder: Folder) -> dict[str, Any]:
    """What `note_seconds` noted, to be kept when a run goes on."""
    found = folder.run.get("units") if (folder.path / RUN).is_file() else None
    return found if isinstance(found, dict) else {}


def loss(folder: Folder, config: Mapping[str, Any]) -> dict[str, Loss]:
    """The losses that a folder holds, by the part of the passage; {} if none."""
    run = _run(folder, config)
    noted = None if run is None else run.get("losses")
    if noted is None:
        return {}
    try:
        return {str(name): _loss(each) for name, each in noted.items()}
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError):
        raise ValueError(f"{str(folder.path / RUN)!r} does not hold the losses of a tune; remove that folder, and run again") from None


def _loss(noted: Any) -> Loss:
    blocks, seconds = tuple(float(block) for block in noted["blocks"]), _seconds(noted["seconds"])
    nats = float(noted["nats"])
    if seconds is None or not 0 < len(blocks) <= BLOCKS or not all(math.isfinite(value) for value in (nats, *blocks)):
        raise ValueError
    return _with_interval(nats, blocks, seconds)


def losses_of(tokens: Sequence[float], seconds: float) -> Loss:
    """From the loss of every token."""
    size = max(FEWEST, math.ceil(len(tokens) / BLOCKS))
    blocks = tuple(math.fsum(tokens[at : at + size]) / len(tokens[at : at + size]) for at in range(0, len(tokens), size))
    return _with_interval(math.fsum(tokens) / len(tokens), blocks, seconds)


def _with_interval(nats: float, blocks: tuple[float, ...], seconds: float) -> Loss:
    interval = statistics.mean(blocks)
    return Loss(nats, min(nats, interval.low), max(nats, interval.high), blocks, seconds)


def keep_losses(folder: Folder, found: Mapping[str, tuple[int, Loss]], ended: str) -> None:
    """The losses of some parts of a passage, each with the length up to which it goes."""
    rows = [Row("perplexity", f"loss-{name}", length, None, "nll", each.nats, 1, each.low, each.high, 0, 0) for name, (length, each) in found.items()]
    folder.conclude(rows, ended)
    noted = {name: {"nats": each.nats, "blocks": list(each.blocks), "seconds": each.seconds} for name, (_, each) in found.items()}
    results.write_json(folder.path / RUN, {**folder.run, "losses": noted})


def _run(folder: Folder, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """run.json, if there is one, of the same settings."""
    if not (folder.path / RUN).is_file():
        return None
    run = folder.run
    if different := results.differences(run.get("config", {}), config):
        raise ValueError(f"{str(folder.path)!r} holds a run of other settings ({different}); choose another --work folder")
    return run


def _score(folder: Folder, record: Record, metric: str) -> float:
    value = record.metrics.get(metric) if isinstance(record.metrics, dict) else None
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{str(folder.file)!r} holds no {metric} in 0..1 for {record.sample_id}; remove that folder, and run again")
    return float(value)


def _seconds(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MOST_SECONDS else None


def _line(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000 and value.isprintable()
