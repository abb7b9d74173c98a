"""LongBench v2 (arXiv 2412.15204): 503 questions of four choices about documents of 8k to 2M words; without the chain-of-thought variant.

The published protocol reads the choice from a fixed phrase; an answer without it is wrong, also an empty one, which the official script
leaves out of the count. The wording is our own; for the official one give the path of its prompts/0shot.txt: option `prompt`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from longreach.evals.samples import data
from longreach.evals.samples.base import Parts, Sample, Settings, Task
from longreach.hf.interfaces import Tokenizer

LETTERS = "ABCD"
FIELDS = {"$DOC$": "context", "$Q$": "question", **{f"$C_{letter}$": f"choice_{letter}" for letter in LETTERS}}  # the official file's slots
COLUMNS: data.Columns = dict.fromkeys(("_id", "domain", "sub_domain", "difficulty", "length", "answer", *FIELDS.values()), str)
TEMPLATE = (
    "Read the text below and answer a question about it.\n\n<text>\n$DOC$\n</text>\n\nWhat is the right answer to this question: $Q$\n"
    "Choices:\n(A) $C_A$\n(B) $C_B$\n(C) $C_C$\n(D) $C_D$\n\nWrite your answer in this form: "
    '"The correct answer is (letter)", where the letter is A, B, C or D.'
)


class LongBenchV2(Task):
    name = "longbench-v2"
    group = "longbench-v2"
    license = "see the data card"
    source = "arXiv 2412.15204, THUDM/LongBench-v2"
    needs_data = True
    random = 0.25
    options: ClassVar[Mapping[str, Any]] = {"prompt": None}

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        data.refuse_lengths(self, settings)
        path = self.option(settings, "prompt")
        template = TEMPLATE if path is None else official_template(path)
        source = data.Source("THUDM/LongBench-v2", ("data.json", "train.jsonl", "train*.parquet"), COLUMNS)
        for row in data.pick(data.rows(source, settings, self.group), settings, self.name):
            if row["answer"] not in tuple(LETTERS):
                raise ValueError(f"{self.name}, {row['_id']}: the answer {row['answer']!r} is no letter from A to D; this is not the official format")
            before, after = (_filled(half, row) for half in template.split("$DOC$"))
            parts = Parts(prefix=before, document=row["context"].strip(), query=after)
            meta = {name: row[name] for name in ("domain", "sub_domain", "difficulty", "length")}
            yield Sample(f"{self.name}:{row['_id']}", parts, (row["answer"],), 128, meta, chat="user_turn")

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        found = chosen(prediction)
        right = float(found == sample.references[0])
        return {"accuracy": right, "compensated": 0.25 if found is None else right, "unreadable": float(found is None)}


def _filled(template: str, row: data.Row) -> str:
    """All slots in one pass, so that a slot's name within the data is left alone."""
    return re.sub("|".join(map(re.escape, FIELDS)), lambda slot: row[FIELDS[slot[0]]].strip(), template)


def chosen(answer: str) -> str | None:
    answer = answer.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", answer) or re.search(r"The correct answer is ([A-D])", answer)
    return found[1] if found else None


def official_template(path: Any) -> str:
    file = Path(str(path)).expanduser()
    try:
        template = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the prompt {file} ({error}); pass prompts/0shot.txt of the LongBench repository") from error
    if any(template.count(slot) != 1 for slot in FIELDS):
        raise ValueError(f"{file} has not each of {', '.join(FIELDS)} once; pass prompts/0shot.txt of the LongBench repository")
    return template


