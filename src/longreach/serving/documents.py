"""Documents with names: texts that are read once, kept in a folder as sealed blocks, and asked any number of times, also after the server was started anew.

A document is a folder of its name, as `longreach run --save-document` writes it; it is there when its manifest is, so one that was being read when the server
was killed is not, and those before it are. Names are checked where requests are, and here once more: nothing outside the folder is read, written or removed.
Knows files, the worker and what is asked; not HTTP.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from longreach.hf import documents as saved
from longreach.hf.interfaces import Tokenizer
from longreach.memory.sealed import MANIFEST
from longreach.running.prefix import common
from longreach.serving import asking, replies
from longreach.serving.asking import About, Room
from longreach.serving.limits import Limits
from longreach.serving.protocol import NAME, DocumentRequest, Missing, Refused, Taken
from longreach.serving.scheduler import Scheduler
from longreach.serving.worker import Asked, Failed, Worker

T = TypeVar("T")
Encoded = Callable[[int, Callable[[Tokenizer], T]], Coroutine[Any, Any, T]]
NONE = "this server keeps no documents; start it with --documents FOLDER"


@dataclass(frozen=True)
class Reading:
    """One that is being read: so many of its tokens are."""

    tokens: int
    read: int = 0


class Documents:
    """The documents of one folder; None: none can be kept. `encoded` calls a function with a tokenizer, in a thread for
    texts of so many characters."""

    def __init__(self, folder: Path | None, worker: Worker, encoded: Encoded, room: Room, limits: Limits) -> None:
        self.folder, self.worker, self.encoded, self.room, self.limits = folder, worker, encoded, room, limits
        self._reading: dict[str, Reading] = {}
        self._known: dict[str, About] = {}  # those that the scheduler holds
        self._loading = asyncio.Lock()

    def all(self) -> list[replies.Document]:
        """Those that are kept, and those that are being read. One that is damaged or was just removed is left out: GET of its name says so."""
        found = []
        for name in self._names():
            with suppress(Missing, Refused):
                found.append(self.one(name))
        return found

    def _names(self) -> list[str]:
        kept = [] if self.folder is None else sorted(entry.name for entry in os.scandir(self.folder) if self._there(entry.name))
        return [*dict.fromkeys([*kept, *self._reading])]

    def one(self, name: str) -> replies.Document:
        if (reading := self._reading.get(name)) is not None:
            return replies.Document(id=name, status="reading", tokens=reading.tokens, read=reading.read, bytes=0)
        place = self._place(name)
        before = self._stamp(place)  # before all else: what happens from now on is seen
        self._require(name)
        try:
            tokens, size = int(saved.facts(place)["seen"]), saved.size(place)
        except (OSError, ValueError, TypeError, KeyError) as error:
            if self._stamp(place) != before:  # it was removed or replaced meanwhile
                return self.one(name)
            raise Refused("document", f"the document {name!r} is damaged ({self.hidden(error)}); delete it and upload its text again", None) from error
        return replies.Document(id=name, status="ready", tokens=tokens, read=tokens, bytes=size)

    def _require(self, name: str) -> None:
        if not self._there(name):
            raise Missing(f"there is no document {name!r}; GET /v1/documents lists them, and POST makes one", "document", "document_not_found")

    async def add(self, request: DocumentRequest, asked: Asked) -> replies.Document:
        """Read a text and save it. Raises Taken where there is one of the name, and Refused where it cannot be."""
        name, place = request.name, self._place(request.name)
        if name in self._reading or self._there(name):
            raise Taken(f"there is a document {name!r} already; delete it first, or choose another name")
        if not self._free(place):
            raise Taken(f"the name {name!r} belongs to something in the server's folder that is no document; choose another name")
        if len(self._names()) >= self.limits.documents:
            raise Refused("name", f"there are {self.limits.documents} documents, as many as this server keeps; delete one first", None)
        self._reading[name] = Reading(0)
        try:
            await self._read(name, place, About(request.text, request.system), asked)
        finally:
            del self._reading[name]
        return self.one(name)

    async def _read(self, name: str, place: Path, about: About, asked: Asked) -> None:
        ids = await self.worker.prepared(asked, self.encoded(len(about.text), lambda tokenizer: asking.opening(tokenizer, about, self.room)))
        if self.room.context is not None and len(ids) >= self.room.context:
            raise Refused(
                "text",
                f"the text has {len(ids)} tokens, and with a question more than the context of {self.room.context}; upload a shorter one, or start the "
                "server with a larger --context",
                "context_length_exceeded",
            )
        self._reading[name] = Reading(len(ids))
        notes = {"document": about.text} | ({} if about.system is None else {"system": about.system})
        try:
            await self.worker.ask(asked, lambda scheduler: [scheduler.hold(name, ids, place, notes)], self.worker.writers(1))
            async for piece in self.worker.pieces(asked):
                self._reading[name] = replace(self._reading[name], read=piece.read)
        except ValueError as error:
            raise Refused("text", self.hidden(error), None) from error
        except Failed as error:
            raise type(error)(self.hidden(error)) from error
        self._known[name] = replace(about, ids=ids)

    async def about(self, name: str) -> About:
        """What is asked about, in the scheduler's hands from now on."""
        if name in self._reading:
            raise Refused("document", f"the document {name!r} is still being read; ask again when GET /v1/documents/{name} says that it is ready", None)
        self.one(name)
        async with self._loading:
            if name not in self._known:
                self._known[name] = await self._load(name)
        return self._known[name]

    async def _load(self, name: str) -> About:
        place = self._place(name)
        try:
            held = await self.worker.do(lambda scheduler: scheduler.load(name, place))
            if "document" not in held.notes:
                raise ValueError("it was saved without its text")
            about = About(held.notes["document"], held.notes.get("system"), [*held.ids])
            begins = await self.encoded(len(about.text), lambda tokenizer: asking.opening(tokenizer, about, self.room))
            if common(about.ids, begins) < min(len(about.ids), len(begins)):
                raise ValueError("the tokenizer of this model makes other tokens of it")
        except ValueError as error:
            self._require(name)  # it may have been removed meanwhile
            said = f"the document {name!r} cannot be asked ({self.hidden(error)}); delete it and upload its text again"
            raise Refused("document", said, None) from error
        return about

    def held(self, name: str, ids: Sequence[int], scheduler: Scheduler) -> None:
        """In the thread of the model: raises Missing where the document that a request began with was removed or replaced since."""
        there = scheduler.room.prefixes.documents.get(name)
        if there is None or [*there.ids] != [*ids]:
            raise Missing(f"the document {name!r} was removed while it was asked about; ask again where it was uploaded anew", "document", "document_not_found")

    async def remove(self, name: str) -> replies.Deleted:
        """Requests that have begun go on."""
        if name in self._reading:
            raise Taken(f"the document {name!r} is still being read; end the request that uploads it first")
        place = self._place(name)
        self._require(name)

        def forget(scheduler: Scheduler) -> None:
            if name in scheduler.documents:
                scheduler.release(name)
            (place / MANIFEST).unlink(missing_ok=True)  # from now on it is no document
            shutil.rmtree(place, ignore_errors=True)

        async with self._loading:  # who loads it now would know one that is gone
            self._known.pop(name, None)
            await self.worker.do(forget)
        return replies.Deleted(id=name)

    # -- files --------------------------------------------------------------------------------------------------------------------

    def _place(self, name: str) -> Path:
        if self.folder is None:
            raise Refused("document", NONE, None)
        if re.fullmatch(NAME, name) is None:
            raise Refused("name", "a document's name has 1 to 64 letters, digits, dots, hyphens and underscores, and begins with a letter or a digit", None)
        return self.folder / name

    def _there(self, name: str) -> bool:
        """Whether a document of this name lies in the folder itself, and not behind a link."""
        place = self._place(name) if re.fullmatch(NAME, name) else None
        return place is not None and not place.is_symlink() and (place / MANIFEST).is_file()

    @staticmethod
    def _stamp(place: Path) -> tuple[int, int] | None:
        """Another one for every time that a document is written; None: there is none."""
        try:
            found = os.stat(place / MANIFEST)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    @staticmethod
    def _free(place: Path) -> bool:
        """Whether a document can be saved there, where none is: what was left of one that was not finished is no hindrance."""
        if not os.path.lexists(place):
            return True
        if place.is_symlink() or not place.is_dir() or os.path.lexists(place / MANIFEST):
            return False
        try:
            saved.writable(place)
        except (OSError, ValueError):  # which names files that are none of the client's
            return False
        return True

    def hidden(self, error: Exception) -> str:
        """A sentence that says nothing of where the folder is."""
        if self.folder is None:
            return str(error)
        return str(error).replace(f"{self.folder}{os.sep}", "")
