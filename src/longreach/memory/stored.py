"""What one layer stores of a token: how long, and how many bytes. Knows forms and sizes; not models or methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from longreach.core.choice import OfQueries
from longreach.core.segments import Form, PositionMap, Retention, Summary
from longreach.memory.arenas import Kind
from longreach.memory.contiguous import values_kept


@dataclass(frozen=True, eq=False)
class Stored:
    """What one layer stores of a token, and how long."""

    forms: Mapping[Form, Retention]
    heads: int
    queries: int  # heads
    key_width: int
    value_width: int
    itemsize: int

    def summaries(self) -> dict[Summary, int]:
        """Bytes of one entry of what an index keeps."""
        key, group = self.heads * self.key_width * self.itemsize, self.queries // self.heads
        return {form: key * form.index.numbers(group) for form in self.forms if isinstance(form, Summary)}

    def buffers(self, shared: bool) -> Iterator[tuple[Retention, int]]:
        """What is kept, and the bytes of an entry: of every key form and the values, of what an index keeps of blocks, and of queries. `shared`: several rows
        may be read in one call, and values are kept once more for every shorter tail."""
        of_keys: dict[PositionMap, Retention] = {form: kept for form, kept in self.forms.items() if not isinstance(form, Summary | OfQueries)}
        for kept in of_keys.values():
            yield kept, self.heads * self.key_width * self.itemsize
        for kept in values_kept(of_keys, shared):
            yield kept, self.heads * self.value_width * self.itemsize
        for index, size in self.summaries().items():
            yield self.forms[index], size
        for form, kept in self.forms.items():
            if isinstance(form, OfQueries):
                yield kept, self.queries * (self.key_width * self.itemsize if form.what == "q" else 4)


@dataclass(frozen=True, eq=False)
class Placed(Stored):
    """And as what numbers, and where."""

    dtype: torch.dtype
    device: torch.device

    def kinds(self, block: int) -> list[Kind]:
        """Of the buffers whose entries go to blocks."""
        widths = [self.key_width for form, kept in self.forms.items() if kept.place is None]
        widths += [self.value_width] if widths else []
        return [Kind((self.heads, block, width), self.dtype, self.device) for width in widths]
