"""Who has memory: jobs in their places, prefixes and documents, within a budget of bytes.

What a job will need when it has its last token is asked of the memory itself (`memory/declared.py`), before it gets its place. Knows flat requests, prefixes
and folders; not queues, tokens that are drawn, or clocks.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from longreach.hf.extension import Extension
from longreach.hf.flat import Snapshot
from longreach.memory.blocks import Blocked
from longreach.memory.budgets import size_at_least, size_text
from longreach.memory.declared import Need
from longreach.planning.machine import free_memory
from longreach.running.prefix import common
from longreach.running.rows import Row, shareable
from longreach.serving.jobs import Job
from longreach.serving.prefixes import WORTH, Document, Prefix, Prefixes

logger = logging.getLogger("longreach.serving")
SHARE = 0.5  # of the memory that is free: a forward needs some too, and so does the rest of the machine
GROWTH = 64  # tokens that room is made for at a time, where less was reserved than an answer takes
REST = "rest"  # in the notes of a document on disk: its last tokens, which are read with every question


def usual_budget(extension: Extension) -> int | None:
    """Bytes of keys and values where nobody says how many: half of the memory that is free. None, which is no limit, where that is not known, and over tiers,
    which have budgets of their own."""
    free = free_memory(extension.facts.reading.entries[0].device)
    return None if free is None or isinstance(extension.forward.memory, Blocked) else int(SHARE * free)


def named(problem: Exception) -> str:
    """What failed, as it is told."""
    return f"{type(problem).__name__}: {problem}"


@dataclass(eq=False)
class Place:
    """A job on its way. Its row has a name while it is in memory.

    number     of the job: those that came first have small ones.
    total      tokens that room is reserved for.
    cached     tokens of its prompt that it did not read.
    marks      how far it has read when a prefix is kept, or others begin.
    holds      the document that it reads.
    moved      the folder that its memory is in.
    overtaken  how many that came later got memory while it waited for room.
    """

    job: Job
    row: Row
    number: int
    total: int = 0
    cached: int = 0
    marks: set[int] = field(default_factory=set)
    holds: Document | None = None
    moved: Path | None = None
    overtaken: int = 0


class Room:
    """places  jobs that are in memory.

    Raises ValueError for budgets that do not go together.
    """

    def __init__(self, extension: Extension, budget: int | None, prefixes: int, reserve: float, moved: Path | None) -> None:
        if not 0 <= reserve <= 1:
            raise ValueError(f"reserve is a share of the new tokens, from 0 to 1, not {reserve}; leave it out to reserve room for all")
        if reserve < 1 and (moved is None or not moved.is_dir()):
            raise ValueError("where less is reserved than jobs may need, some are moved out; pass moved=, a folder that is there, or leave out reserve")
        self.flat = extension.flat()
        if budget is not None and self.flat.tiered:
            raise ValueError("tiers have budgets of their own; leave out budget")
        self.method, self.budget, self.reserve, self._folder = extension.method, budget, reserve, moved
        self.prefixes = Prefixes(extension.method, prefixes)
        self.vocabulary = cast(Any, extension.model).get_input_embeddings().weight.shape[0]
        self.places: dict[Row, Place] = {}

    @property
    def nbytes(self) -> int:
        """What is held; what several share counts once."""
        return self.flat.held(self.prefixes.snapshots)

    # -- jobs -------------------------------------------------------------------------------------------------------------------------

    def check(self, place: Place) -> None:
        """Raises ValueError for a job that has no room even where there is nothing else."""
        place.total = self._reserved(place, 1.0)
        need = self.flat.need_alone(place.total)
        if self.budget is not None and need.nbytes > self.budget:
            raise ValueError(
                f"{place.total} tokens take {size_text(need.nbytes)} of keys and values, and all jobs together have {size_text(self.budget)}; shorten the "
                f"prompt, ask for fewer new tokens, or serve with a budget of {size_at_least(need.nbytes)} or more"
            )
        try:
            self.flat.require_ever(need)
        except ValueError as error:
            said = f"{place.total} tokens never have room: {error}; shorten the prompt, ask for fewer new tokens, or serve with larger tiers"
            raise ValueError(said) from error

    def enter(self, place: Place, drops: bool = True) -> Literal["in", "waits", "full"]:
        """Give it memory, if there is room: "full" else. "waits": another job is reading what it begins with. `drops`: prefixes may go for it. Raises
        ValueError, or whatever a disk or a device raises, where it can have none."""
        place.total = self._reserved(place, self.reserve)
        if place.moved is not None:
            return self._move_in(place, place.moved, drops)
        if (document := self.prefixes.documents.get(place.job.document or "")) is not None and document.prefix is None and document.folder is not None:
            if not self._clear([(place.total, None, 0)], drops=drops):
                return self._full(place)
            self.load(document.name, document.folder)
        found = self._source(place)
        if found is None:
            return "waits"
        prefix, length = found
        if not self._clear([(place.total, None if prefix is None else prefix.snapshot, length)], but=prefix, drops=drops):
            if self.places or not self._clear([(place.total, None, 0)]):
                return self._full(place)
            prefix, length = None, 0  # nobody will make room: it is read anew, in the place of what it would have gone on from
        if prefix is None:
            place.row.name = self.flat.join()
        else:
            place.row.name = self.flat.begin(prefix.snapshot, length)
            self.prefixes.use(prefix, gone=length == prefix.snapshot.length and not prefix.ends and prefix.document is None)
        place.row.read = place.cached = length
        self.places[place.row] = place
        return "in"

    def _full(self, place: Place) -> Literal["full"]:
        if self.places:
            return "full"
        if any(prefix.document is not None for prefix in self.prefixes.kept):
            raise ValueError("documents leave no room for this job; release one, hold them in a folder, or serve with a larger budget")
        raise ValueError(f"{place.total} tokens have no room; shorten the prompt, ask for fewer new tokens, or serve with a larger budget")

    def leave(self, place: Place, keep: bool = True) -> None:
        """A job is over, wherever it is. What it has read is kept for those that begin with it."""
        if place.moved is not None:
            shutil.rmtree(place.moved, ignore_errors=True)
        if place.row in self.places:
            try:
                if keep and place.holds is None and self.sound(place.row) >= WORTH:
                    self._take(place.row)
            except Exception:  # too little memory: the answer is there, and only what would have come after it is slower
                logger.warning("what job %d has read could not be kept", place.number, exc_info=True)
            self._free(place.row)

    def _free(self, row: Row) -> None:
        del self.places[row]
        self.flat.leave(row.name)

    def passed(self, place: Place) -> bool:
        """Whether it has read as far as others wait for, or as is worth keeping, which is kept."""
        marks = {mark for mark in place.marks if mark <= place.row.read}
        place.marks -= marks
        if self.flat.forgets and place.row.read in marks:
            self._take(place.row, ends=True)
        return bool(marks)

    def grow(self) -> list[tuple[Place, str | None]]:
        """Before a forward: room for what it adds, where less was reserved than jobs may take. -> Jobs that had to make room, the youngest first, and why one
        of them could not be moved out and is lost."""
        gone: list[tuple[Place, str | None]] = []
        if self.reserve == 1:
            return gone
        for place in self.places.values():
            if len(place.row.ids) > place.total:
                place.total = self._reserved(place, self.reserve)
        while not self._clear() and len(self.places) > 1:
            place = max(self.places.values(), key=lambda place: place.number)
            try:
                self._move_out(place)
                gone.append((place, None))
            except Exception as problem:  # of a disk
                gone.append((place, named(problem)))
            self._free(place.row)
        return gone

    def _reserved(self, place: Place, share: float) -> int:
        """Tokens of a job that there has to be room for; its last new token is never read."""
        row, new = place.row, max(1, place.job.max_new_tokens)
        least = len(row.ids) + (GROWTH if share < 1 else 0)
        return min(row.prompt + new - 1, max(least, row.prompt + math.ceil(share * new) - 1))

    # -- what others have read --------------------------------------------------------------------------------------------------------

    def sound(self, row: Row) -> int:
        """How many of the tokens that a row has read are as any prompt would have read them."""
        return row.read if self.method.cut == 1 else min(row.read, self.method.apart(row.prompt))

    def _source(self, place: Place) -> tuple[Prefix | None, int] | None:
        """-> (what a job goes on from, how many tokens of it); None: it waits for one that is reading what both begin with."""
        ids, waits = place.row.ids, False
        prefix, length, most = self.prefixes.find(ids)
        for other in [*self.places.values()] if self.prefixes.most else ():
            row = other.row
            sound = len(row.ids) if self.method.cut == 1 else self.method.apart(row.prompt)
            shared = shareable(self.method, min(common(row.ids, ids), sound), [len(ids)])
            if shared - length < WORTH:
                continue
            most = max(most, shared)
            if shared > row.read:
                other.marks.add(shared)
                waits = True
            elif (shared == row.read or self.flat.reaches(row.name) <= shared) and (taken := self._take(row, but=prefix)) is not None:
                prefix, length = taken, shared
        if waits:
            return None
        if self.flat.forgets and most - length >= WORTH:
            place.marks.add(most)
        return prefix, length

    def _take(self, row: Row, ends: bool = False, but: Prefix | None = None) -> Prefix | None:
        """Keep what a row has read, where it can be used and there is room."""
        sound = self.sound(row)
        if not self.prefixes.most or (sound < row.read and self.flat.reaches(row.name) > sound) or not self._clear(taken=[row.name], but=but):
            return None
        prefix = Prefix(row.ids[: row.read], self.flat.take(row.name), sound, ends)
        self.prefixes.keep(prefix)
        return prefix

    # -- documents --------------------------------------------------------------------------------------------------------------------

    def keep_document(self, place: Place, document: Document) -> None:
        """A job has read it."""
        row = place.row
        if row.read:
            snapshot = self.flat.take(row.name)
            if document.folder is not None:
                self.flat.save(snapshot, document.folder, row.ids, {**document.notes, REST: json.dumps([*document.ids[row.read :]])})
            document.prefix = Prefix(row.ids, snapshot, row.read, document=document.name)
        self.leave(place, keep=False)
        self.prefixes.name(document)

    def load(self, name: str, folder: Path) -> Document:
        """A document from a folder, in the place of one that has its name; others leave the memory for it."""
        snapshot, ids, notes = self.flat.load(folder)
        rest = self._rest(notes, folder) if self.method.cut != 1 or REST in notes else []
        prefix = Prefix(ids, snapshot, len(ids), document=name)
        document = Document(name, [*ids, *rest], folder, prefix, notes)
        self.prefixes.name(document)
        self._clear(but=prefix)
        return document

    def _rest(self, notes: dict[str, str], folder: Path) -> list[int]:
        """The last tokens of a document. What others have saved may end where no prompt may be cut."""
        try:
            found = json.loads(notes[REST])
        except (KeyError, ValueError, RecursionError):
            found = None
        if not isinstance(found, list) or not all(type(token) is int and 0 <= token < self.vocabulary for token in found):
            raise ValueError(f"{str(folder)!r} does not say how its end is to be read with a question, as this method needs it; hold the document again")
        return found

    # -- room -------------------------------------------------------------------------------------------------------------------------

    def _clear(self, coming: Sequence[tuple[int, Snapshot | None, int]] = (), taken: Sequence[int] = (), but: Prefix | None = None, drops: bool = True) -> bool:
        """Whether there is room, when prefixes have gone that were used long ago. Where there is none whatever goes, none goes."""
        need = self.flat.need({place.row.name: place.total for place in self.places.values()}, coming, taken)
        leaving, gone = self.prefixes.leaving(but) if drops else iter(()), list[Prefix]()
        while not self._fits(need, gone):
            if (prefix := next(leaving, None)) is None:
                return False
            gone.append(prefix)
        for prefix in gone:
            self.prefixes.drop(prefix)
        return True

    def _fits(self, need: Need, gone: Sequence[Prefix]) -> bool:
        if self.budget is None:
            return self.flat.has_room(need, [prefix.snapshot for prefix in gone])
        return need.nbytes + self.flat.beside([prefix.snapshot for prefix in self.prefixes.kept if prefix not in gone]) <= self.budget

    def _move_out(self, place: Place) -> None:
        """What it has read goes to a folder."""
        if place.row.read and self._folder is not None:
            folder = self._folder / f"job-{place.number}"
            self.flat.save(self.flat.take(place.row.name), folder, place.row.ids[: place.row.read])
            place.moved = folder

    def _move_in(self, place: Place, folder: Path, drops: bool) -> Literal["in", "full"]:
        if not self._clear([(min(place.total + GROWTH, self._reserved(place, 1.0)), None, 0)], drops=drops):
            return self._full(place)
        snapshot = self.flat.load(folder)[0]
        place.row.name = self.flat.begin(snapshot, snapshot.length)
        self.places[place.row] = place
        place.moved = None
        shutil.rmtree(folder, ignore_errors=True)
        return "in"
