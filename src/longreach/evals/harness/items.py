"""What is to be run: samples with the lengths of their prompts, and the order in which they are asked.

Knows tasks, samples and numbers of tokens; no engines, costs or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from longreach.evals.samples.base import Sample, Task


@dataclass(frozen=True)
class Item:
    """A sample that is to be run. `index` counts the samples of the whole run, whatever its shards; the texts stay in memory until the run ends.

    tokens  of the prompt.
    shared  how many of them, from the first on, questions about the same document have in common; 0: none.
    """

    task: Task
    sample: Sample
    index: int
    tokens: int
    shared: int = 0

    @property
    def needs(self) -> int:
        return self.tokens + self.sample.max_new_tokens

    @property
    def key(self) -> tuple[str, str]:
        return self.task.name, self.sample.id

    @cached_property
    def document(self) -> str:
        """Names what questions about one document have in common."""
        parts = self.sample.parts
        return hashlib.sha256("\0".join((parts.prefix, parts.document)).encode("utf-8", "surrogatepass")).hexdigest()


def ordered(items: Sequence[Item]) -> list[Item]:
    """Questions about one document together, the longest document first: what does not fit into memory shows at once."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.document, []).append(item)
    by_length = sorted(groups.values(), key=lambda group: (-max(item.tokens for item in group), group[0].index))
    return [item for group in by_length for item in sorted(group, key=lambda item: item.index)]


def shard(items: Sequence[Item], index: int, world: int) -> list[Item]:
    """Every `world`-th document from the `index`-th on, in the order of the samples, with all its questions: no two shards read the same one."""
    numbers: dict[str, int] = {}
    for item in items:
        numbers.setdefault(item.document, len(numbers))
    return [item for item in items if numbers[item.document] % world == index]


def by_length(items: Sequence[Item]) -> Iterator[tuple[str, int | None, list[Item]]]:
    """The samples of every task and length."""
    groups: dict[tuple[str, int | None], list[Item]] = {}
    for item in items:
        groups.setdefault((item.task.name, item.sample.meta.get("length_target")), []).append(item)
    for (task, length), found in sorted(groups.items(), key=lambda g: (g[0][0], g[0][1] or 0)):
        yield task, length, found
