"""Prefixes: what was read is kept, so that whoever begins with the same tokens reads only what is new. What prompts have in common lies once in memory.

A prefix is found by its token ids; model, method, parameters and context are those of the scheduler, which serves one extension. Where prefixes share tokens,
their memory is a tree of frozen bases (memory/bases.py). How far a prefix can be used depends on the method:

- One that keeps every token is used up to any token, so that many questions about one text, or another answer to the same turn, find what they share.
- Layers that keep the last tokens only (bounded methods; the near keys of SelfExtend; sliding layers) can go back 128 tokens. Apart from that a prefix is used
  at its exact end: the next turn of a chat goes on from there. For what is common to prompts that go on differently a prefix has to end there: where a job says
  so (`Job.shared`), at documents, and where a second prompt has shown that it comes again.
- Where a method allows to cut a prompt at multiples of a number only (`Method.cut`), a prefix is used at such multiples, and only what was read of a prompt:
  its end, and what was decoded, are not as another prompt would have read them. A method that allows no cut shares nothing.

Knows ids and snapshots; schedules nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longreach.hf.flat import Snapshot
from longreach.methods.base import Method
from longreach.running.prefix import common
from longreach.running.rows import shareable

WORTH = 64  # tokens: a shorter prefix is not kept, nor waited for


@dataclass(eq=False)
class Prefix:
    """ids       what the snapshot has read.
    sound     so many of them are as any prompt would have read them.
    ends      it was kept because prompts part here; others give way to longer ones.
    document  the name of the document that it is.
    """

    ids: Sequence[int]
    snapshot: Snapshot
    sound: int
    ends: bool = False
    document: str | None = None

    def usable(self, method: Method, ids: Sequence[int]) -> tuple[int, int]:
        """-> (how many tokens a prompt can have from it, how many it could have if a prefix ended there)."""
        shared = shareable(method, min(common(self.ids, ids), self.sound), [len(ids)])
        return (shared if shared == self.snapshot.length or shared >= self.snapshot.reaches else 0), shared


@dataclass(eq=False)
class Document:
    """A text that has a name. `ids` are all of its tokens, of which the prefix has read those that can be read for every question. `folder`: where it is on
    disk; then it may leave the memory. `notes` are kept there beside it."""

    name: str
    ids: Sequence[int]
    folder: Path | None = None
    prefix: Prefix | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Prefixes:
    """All that is kept, at most `most` without a name. The one that was used longest ago is the first to go."""

    method: Method
    most: int
    kept: dict[Prefix, None] = field(default_factory=dict)  # in the order of their use
    documents: dict[str, Document] = field(default_factory=dict)

    @property
    def snapshots(self) -> list[Snapshot]:
        return [prefix.snapshot for prefix in self.kept]

    def find(self, ids: Sequence[int]) -> tuple[Prefix | None, int, int]:
        """-> (the prefix to go on from, how many of its tokens, how many it could be if one ended there)."""
        best, length, most = None, 0, 0
        for prefix in self.kept:
            own, shared = prefix.usable(self.method, ids)
            most = max(most, shared)
            if own > length:
                best, length = prefix, own
        return best, length, most

    def use(self, prefix: Prefix, gone: bool) -> None:
        """It was used just now. `gone`: whoever uses it holds all of it, so that nothing is lost."""
        self.kept.pop(prefix, None)
        if not gone:
            self.kept[prefix] = None

    def keep(self, prefix: Prefix) -> None:
        """Shorter ones that it begins with give way, unless prompts part at their ends."""
        for other in [other for other in self.kept if not other.ends and other.document is None and _begins(prefix.ids, other.ids)]:
            del self.kept[other]
        if not any(other.ids == prefix.ids and other.sound >= prefix.sound for other in self.kept):
            self.kept[prefix] = None
        while len(without := [other for other in self.kept if other.document is None]) > self.most:
            del self.kept[without[0]]

    def drop(self, prefix: Prefix) -> None:
        """It is no longer in memory. A document on disk can come back."""
        del self.kept[prefix]
        if prefix.document is not None:
            self.documents[prefix.document].prefix = None

    def leaving(self, but: Prefix | None = None) -> Iterator[Prefix]:
        """Those that may go, in this order: those without a name, then documents that are on disk."""
        every = [prefix for prefix in self.kept if prefix is not but]
        yield from (prefix for prefix in every if prefix.document is None)
        yield from (prefix for prefix in every if prefix.document is not None and self.documents[prefix.document].folder is not None)

    def name(self, document: Document) -> None:
        """One of this name takes the place of an earlier one."""
        self.forget(document.name)
        self.documents[document.name] = document
        if document.prefix is not None:
            self.kept[document.prefix] = None

    def forget(self, name: str) -> None:
        document = self.documents.pop(name, None)
        if document is not None and document.prefix is not None:
            del self.kept[document.prefix]


def _begins(ids: Sequence[int], other: Sequence[int]) -> bool:
    return len(other) < len(ids) and ids[: len(other)] == other
