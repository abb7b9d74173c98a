"""What RULER's tasks have in common: the score, and where they come from.

Definitions: Hsieh et al. 2024, arXiv 2404.06654. Written anew, with own words and an own haystack, and seeded per sample: scores are not to be
compared with the published table, least of all those of tasks over an essay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from longreach.evals.samples.base import Sample, Task
from longreach.evals.scores import scorers


class Ruler(Task):
    """The length counts prompt and answer. The prompt is filled to the last unit of filler that fits (the original works in coarser steps)."""

    group: ClassVar[str] = "ruler"
    license: ClassVar[str] = "generated; needs no data"
    source: ClassVar[str] = "arXiv 2404.06654"
    metric: ClassVar[str] = "string_match"
    new_tokens: ClassVar[int]

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"string_match": string_match_all(prediction, sample.references)}


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """The share of the references that the answer holds, whatever the case of their letters."""
    return scorers.contains_all(scorers.printable(prediction), references)
