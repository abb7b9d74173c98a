"""Random histories of a cache: whatever is done to it, and in whatever order, the logits are those of the dense truth of the tokens that are left.

A history is drawn from its seed: a family, a method, rows, and operations (append ragged with pads anywhere, decode, generate, hide cached tokens by a
mask, crop, fork, save and load, reorder, repeat, a forward that fails in any layer, an interrupt, calls that have to be refused, several conversations in
turn, and between them requests that are read together in flat batches: join, read, decode, fork, crop, leave, fail). Beside every cache and every request
stands a `Model` of it, plain lists of tokens. After every operation the next logits of every row are compared with one dense forward
(`backend="reference"`, no cache) of those tokens.

    python tests/histories.py --first 0 --count 10000 --log histories.jsonl     # resumable: seeds that the log has are not run again
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import random
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import longreach
from families import WINDOW, build
from longreach import Combined, InfiniteHiP, Tiered, YaRN
from longreach.engine import batch
from longreach.hf.cache import store_of
from longreach.memory import buffer, placement, store
from longreach.methods.base import Method
from methods_matrix import METHODS, context, refusal

FAMILIES = [
    "llama", "llama-head8", "llama3", "llama-dynamic", "mistral-sliding", "qwen2", "gemma2", "gemma3", "phi", "phi3-longrope", "cohere", "gpt-oss",
    "llama4-rope", "deepseek-v2", "smollm3", "ministral3", "gptj", "falcon", "falcon-alibi", "bloom",
]  # fmt: skip
CUTTABLE = [
    *(method for method in METHODS if method.cut == 1 and method.eviction is None),
    InfiniteHiP(7, 2, 6, (4, 2), (8,), (1, 1), 1, (1, 1), 0), Combined(YaRN(2.0), InfiniteHiP(9, 0, 6, (3,), (), (1,), 1, (1,), 1)),
]  # fmt: skip
GATE = 3e-5
LONGEST = 2000  # declared context
NEVER = 10_000  # an end token that no model makes
SHARING = 5  # neighbouring seeds have one family and one method, for making a model and its twin takes as long as a history


class Mismatch(AssertionError):
    pass


# -- what a cache should be ----------------------------------------------------------------------------------------------------------


@dataclass
class Token:
    id: int
    slot: int
    number: int  # names it for good, in this row and its copies
    blind: frozenset[int] = frozenset()  # numbers of earlier tokens that it does not see


@dataclass
class Model:
    """What is left of a conversation, in plain lists. `real` and `hidden` say of every slot whether it holds a token and whether masks hide it."""

    rows: list[list[Token]]
    seen: int = 0
    hidden: list[set[int]] = field(default_factory=list)  # slots, per row
    farthest: list[int] = field(default_factory=list)  # the most tokens that a row has had: so far back from there it can always go

    def copy(self) -> Model:
        return Model([[*row] for row in self.rows], self.seen, [{*row} for row in self.hidden], [*self.farthest])

    @classmethod
    def empty(cls, rows: int) -> Model:
        return cls([[] for _ in range(rows)], 0, [set() for _ in range(rows)], [0] * rows)

    def goes_back(self, slots: int, rollback: int) -> bool:
        """Whether a crop must be possible."""
        left = [sum(token.slot < self.seen - slots for token in row) for row in self.rows]
        return all(n >= far - rollback for n, far in zip(left, self.farthest, strict=True))

    def mask(self) -> torch.Tensor:
        mask = torch.zeros(len(self.rows), self.seen, dtype=torch.long)
        for r, row in enumerate(self.rows):
            for token in row:
                mask[r, token.slot] = token.slot not in self.hidden[r]
        return mask

    def append(self, ids: torch.Tensor, new: torch.Tensor, number: Callable[[], int]) -> None:
        for r, row in enumerate(self.rows):
            while row and row[-1].slot in self.hidden[r]:  # a new token follows the last that is visible
                row.pop()
            blind = frozenset(token.number for token in row if token.slot in self.hidden[r])
            for column in new[r].nonzero()[:, 0].tolist():
                row.append(Token(int(ids[r, column]), self.seen + column, number(), blind))
        self.seen += ids.shape[1]
        self.farthest = [max(far, len(row)) for far, row in zip(self.farthest, self.rows, strict=True)]

    def crop(self, slots: int) -> None:
        self.seen -= slots
        self.rows = [[token for token in row if token.slot < self.seen] for row in self.rows]
        self.hidden = [{slot for slot in row if slot < self.seen} for row in self.hidden]

    def select(self, index: list[int]) -> None:
        self.rows, self.farthest = [[*self.rows[r]] for r in index], [self.farthest[r] for r in index]
        self.hidden = [{*self.hidden[r]} for r in index]


@dataclass
class Talk:
    cache: Any
    model: Model


# -- the machines --------------------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """The extended model, and its twin that computes the dense truth."""

    extension: Any
    dense: Any
    flat: bool  # whether the family's requests can be read together


@functools.lru_cache(maxsize=4)
def pair(family: str, method: Method, tiers: Tiered | None = None) -> Pair:
    model = build(family, eos_token_id=None)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = NEVER, 0
    twin = copy.deepcopy(model)
    arguments: dict[str, Any] = dict(context=context(method, LONGEST), trained_window=WINDOW)
    extension, dense = longreach.extend(model, method, **arguments, memory=tiers), longreach.extend(twin, method, backend="reference", **arguments)
    try:
        extension.flat()
    except ValueError as error:
        if "one by one" not in str(error):
            raise
        return Pair(extension, dense, False)
    return Pair(extension, dense, True)


@contextmanager
def constants(rollback: int, slack: int) -> Iterator[None]:
    """Small ones make short histories meet what long ones meet."""
    before = placement.ROLLBACK, placement.SLACK, placement.SMALLEST, placement.COPIED
    placement.ROLLBACK = store.ROLLBACK = rollback
    placement.SLACK = slack
    placement.SMALLEST = 4 * slack
    placement.COPIED = 2 * slack
    try:
        yield
    finally:
        placement.ROLLBACK, placement.SLACK, placement.SMALLEST, placement.COPIED = before
        store.ROLLBACK = placement.ROLLBACK


@contextmanager
def blindness(matrix: torch.Tensor | None) -> Iterator[None]:
    """For the dense truth: [B, 1, T, T] which key a query is forbidden to see."""
    before = batch.Rows.barred
    batch.Rows.barred = lambda rows, a, b, device: matrix  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        batch.Rows.barred = before  # type: ignore[method-assign]


def drawn(number: int) -> tuple[str, Method]:
    """A family and a method that can be attached to it."""
    rng = random.Random(f"pair {number}")
    while True:
        family, method = rng.choice(FAMILIES), rng.choice(CUTTABLE)
        if not refusal(family, method):
            return family, method


def tiered(number: int) -> Tiered | None:
    """Every third pair has blocks, few of them on the device."""
    rng = random.Random(f"tiers {number}")
    if rng.random() > 1 / 3:
        return None
    device, host, disk = rng.choice([(1024, None, 64), (1024, 64, 64), (2**16, None, None), (2**13, 256, None)])  # KiB, and MiB on disk
    return Tiered(
        f"{device}KiB", None if host is None else f"{host}KiB", None if disk is None else f"{tempfile.gettempdir()}:{disk}MiB", block=rng.choice([2, 4, 16]),
        staging=f"{rng.choice([1, 16, 4096])}KiB",
    )  # fmt: skip


class Failure(Exception):
    """Raised inside a forward on purpose."""


class History:
    def __init__(self, seed: int) -> None:
        self.family, self.method = drawn(seed // SHARING)
        self.rng = rng = random.Random(seed)
        self.small = rng.random() < 0.96
        self.rollback, self.slack = (rng.choice([3, 8, 20]), rng.choice([1, 4, 9])) if self.small else (placement.ROLLBACK, placement.SLACK)
        self.longest_chunk = rng.choice([4, 12, 40]) if self.small else rng.choice([80, 260])
        self.most = 100 if self.small else 400
        self.pair = pair(self.family, self.method, tiered(seed // SHARING))
        self.extended = self.pair.extension.model
        self.numbers = 0
        self.log: list[str] = [f"{self.family} {self.method} rollback={self.rollback} slack={self.slack} memory={tiered(seed // SHARING)}"]
        rows = rng.choice([1, 1, 2, 2, 3, 4])
        self.talks = [Talk(DynamicCache(), Model.empty(rows))]
        self.flat: Any = None
        self.requests: dict[int, Model] = {}  # of the flat batches, one row each
        self.worst = 0.0
        self.compared = False  # whether the operation under way has seen logits
        self.undecided = 0  # rows that nothing can be said of, for rounding decides what the model makes of them

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def run(self, operations: int) -> float:
        with constants(self.rollback, self.slack), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.append()
            for _ in range(operations):
                self.compared = False
                self.step()
                if not self.compared or self.rng.random() < 0.25:
                    self.probe(self.talk)
        return self.worst

    def step(self) -> None:
        self.talk = self.rng.choice(self.talks)
        if max(map(len, self.talk.model.rows)) > self.most or self.talk.model.seen > 3 * self.most:
            self.shrink()
            return
        kinds: dict[Callable[[], None], int] = {
            self.append: 8, self.decode: 6, self.generate: 2, self.draft: 2, self.hide: 3, self.show: 2, self.crop: 4, self.fork: 2, self.save: 1,
            self.fork_within: 1, self.select: 2, self.repeat: 1, self.fail: 4, self.interrupt: 1, self.refused: 1, self.meet: 2,
            self.together: 8 if self.pair.flat else 0,
        }  # fmt: skip
        self.rng.choices(list(kinds), list(kinds.values()))[0]()

    # -- forwards -------------------------------------------------------------------------------------------------------------

    talk: Talk

    def columns(self, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and mask [B, C] of a ragged chunk: pads on the left, on the right, inside, or none."""
        rng, rows = self.rng, len(self.talk.model.rows)
        columns = rng.randint(1, longest)
        new = torch.ones(rows, columns, dtype=torch.long)
        where = rng.choice(["none", "left", "right", "inner", "mixed", "meet"])
        for r in range(rows):
            kind = rng.choice(["none", "left", "right", "inner"]) if where == "mixed" else where
            pads = rng.randint(0, columns if rng.random() < 0.2 else columns - 1)
            if kind == "meet":  # rows end at one length, read in different portions
                pads = max(0, min(columns, len(self.talk.model.rows[r]) - min(map(len, self.talk.model.rows))))
                kind = rng.choice(["left", "right"])
            if kind == "left":
                new[r, :pads] = 0
            elif kind == "right":
                new[r, columns - pads :] = 0
            elif kind == "inner":
                new[r, rng.sample(range(columns), pads)] = 0
        ids = torch.tensor([[rng.randrange(3, 96) for _ in range(columns)] for _ in range(rows)])
        return ids, new

    def full_mask(self, new: torch.Tensor) -> torch.Tensor | None:
        """The mask of all slots and the new columns, in one of the shapes that people pass."""
        mask = torch.cat([self.talk.model.mask(), new], 1)
        if bool(mask.all()) and self.rng.random() < 0.3:
            return None
        if self.rng.random() < 0.25:  # preallocated: what it says beyond the new columns is about tokens that are not there
            more = torch.tensor([[self.rng.randint(0, 1) for _ in range(self.rng.randint(1, 9))]] * len(mask))
            mask = torch.cat([mask, more], 1)
        return mask.to(self.rng.choice([torch.long, torch.bool, torch.float32]))

    def forward(self, ids: torch.Tensor, new: torch.Tensor, **more: Any) -> torch.Tensor:
        mode = self.rng.choice([torch.no_grad, torch.no_grad, torch.inference_mode])
        with mode():
            return self.extended(ids, attention_mask=self.full_mask(new), past_key_values=self.talk.cache, **more).logits.clone()

    def append(self) -> None:
        self.talk = self.rng.choice(self.talks)
        self.read(*self.columns(self.longest_chunk))

    def decode(self) -> None:
        rows = len(self.talk.model.rows)
        for _ in range(self.rng.choice([1, 1, 3, 7])):
            self.read(torch.tensor([[self.rng.randrange(3, 96)] for _ in range(rows)]), torch.ones(rows, 1, dtype=torch.long))

    def read(self, ids: torch.Tensor, new: torch.Tensor) -> None:
        before = self.talk.model.copy()
        try:
            logits = self.forward(ids, new)
        except ValueError as error:
            if "hides the last" not in str(error) or not any(row and row[-1].slot in gone for row, gone in zip(before.rows, before.hidden, strict=True)):
                raise
            self.log.append(f"append {new.shape[1]}: refused, for too much would be forgotten")
            self.talk.model.hidden = [set() for _ in before.rows]
            return
        self.talk.model.append(ids, new, self.number)
        self.log.append(f"append {new.sum(1).tolist()} of {new.shape[1]} columns -> {[len(row) for row in self.talk.model.rows]}")
        self.compare(self.talk.model, [logits[r][new[r].bool()] for r in range(len(new))])

    def generate(self) -> None:
        """Another turn through stock `generate`, left padded."""
        if any(any(row) for row in self.talk.model.hidden):
            return
        ids, new = self.columns(min(self.longest_chunk, 12))
        new[:, -1] = 1
        count = self.rng.randint(2, 5)
        everything = torch.zeros(len(new), self.talk.model.seen, dtype=torch.long)
        for r, row in enumerate(self.talk.model.rows):
            for token in row:
                everything[r, token.slot] = token.id
        mask = torch.cat([self.talk.model.mask(), new], 1)
        out = self.extended.generate(
            torch.cat([everything, ids * new], 1), attention_mask=mask, past_key_values=self.talk.cache, max_new_tokens=count, do_sample=False
        )
        made = out[:, mask.shape[1] :]
        self.talk.model.append(ids, new, self.number)
        self.talk.model.append(made[:, :-1], torch.ones_like(made[:, :-1]), self.number)
        self.log.append(f"generate {count} after {new.sum(1).tolist()}")
        for r, (row, wanted) in enumerate(zip(made, self.truth(self.talk.model, count), strict=True)):
            top = wanted.topk(2).values
            clear = (top[:, 0] - top[:, 1]) > 1e-3 * wanted.abs().max()
            if not torch.equal(row[clear], wanted.argmax(-1)[clear]):
                if self.rounding_decides(self.talk.model, r, count, 2e-2):
                    self.undecided += 1
                    continue
                raise Mismatch(f"generate made {row.tolist()}, the truth {wanted.argmax(-1).tolist()}")

    def draft(self) -> None:
        """A chunk whose logits are all asked for may be undone, however long it is."""
        rows, count = len(self.talk.model.rows), self.rng.randint(2, self.longest_chunk + 2)
        ids, new = torch.tensor([[self.rng.randrange(3, 96) for _ in range(count)] for _ in range(rows)]), torch.ones(rows, count, dtype=torch.long)
        if any(row and row[-1].slot in gone for row, gone in zip(self.talk.model.rows, self.talk.model.hidden, strict=True)):
            return
        logits = self.forward(ids, new, logits_to_keep=count)
        self.talk.model.append(ids, new, self.number)
        self.compare(self.talk.model, list(logits))
        undone = self.rng.randint(0, count - 1)
        self.talk.cache.crop(-undone)
        self.talk.model.crop(undone)
        self.log.append(f"draft {count}, {undone} undone")

    def meet(self) -> None:
        """Rows that were read in portions as unequal as can be come to one length: the tails of their buffers then begin at different tokens."""
        lengths = [len(row) for row in self.talk.model.rows]
        if len(lengths) < 2 or max(lengths) > self.most:
            return
        far = max(self.longest_chunk, 12 + self.rollback + self.slack)
        for last in (False, True):
            target = max(lengths) + self.rng.choice([1, self.longest_chunk]) if last else None
            counts = [target - n if target is not None else self.rng.choice([1, far]) for n in lengths]
            columns = max(counts)
            new = torch.stack([(torch.arange(columns) >= columns - n).long() for n in counts])
            self.read(torch.tensor([[self.rng.randrange(3, 96) for _ in range(columns)] for _ in counts]), new)
            lengths = [len(row) for row in self.talk.model.rows]
        self.decode()

    # -- masks ----------------------------------------------------------------------------------------------------------------

    def hide(self) -> None:
        """From now on masks hide some cached tokens of some rows: any of them, or the last."""
        for row, hidden in zip(self.talk.model.rows, self.talk.model.hidden, strict=True):
            if not row or self.rng.random() < 0.4:
                continue
            a = self.rng.randrange(len(row))
            b = len(row) if self.rng.random() < 0.4 else self.rng.randint(a, len(row))
            a = max(a, b - self.rollback) if b == len(row) and self.rng.random() < 0.7 else a
            hidden.update(token.slot for token in row[a:b])
        self.log.append(f"hide {[len(row) for row in self.talk.model.hidden]}")

    def show(self) -> None:
        self.talk.model.hidden = [set() for _ in self.talk.model.rows]
        self.log.append("show all")

    # -- what is done between forwards --------------------------------------------------------------------------------------------

    def crop(self) -> None:
        slots = self.rng.randint(0, min(self.talk.model.seen, self.rng.choice([self.rollback, 2 * self.rollback, 500])))
        try:
            self.talk.cache.crop(-slots)
        except ValueError as error:
            if "cannot go back" not in str(error) or self.talk.model.goes_back(slots, self.rollback):
                raise
            self.log.append(f"crop {slots}: refused")
            self.save()
            return
        self.talk.model.crop(slots)
        self.log.append(f"crop {slots}")

    def shrink(self) -> None:
        self.talk.cache.reset()
        self.talk.model = Model.empty(len(self.talk.model.rows))
        self.log.append("reset")

    def fork(self) -> None:
        other = copy.deepcopy(self.talk.cache) if self.rng.random() < 0.5 else self.pair.extension.fork(self.talk.cache)
        self.talks = [*self.talks[-2:], Talk(other, self.talk.model.copy())]
        self.talk = self.rng.choice(self.talks)
        self.log.append("fork")

    def save(self) -> None:
        if not any(self.talk.model.rows):
            return
        with tempfile.TemporaryDirectory() as folder:
            self.pair.extension.save(self.talk.cache, Path(folder) / "a.safetensors")
            found = self.pair.extension.load(Path(folder) / "a.safetensors")
        kept = torch.ones(len(self.talk.model.rows), self.talk.model.seen, dtype=torch.long) if found.mask is None else found.mask
        whole = replace(self.talk.model, hidden=[set() for _ in self.talk.model.rows])
        if not torch.equal(kept, whole.mask()):
            raise Mismatch("the mask of the loaded document is another")
        self.talk.cache = found.cache
        self.log.append("save and load")

    def select(self) -> None:
        rows = len(self.talk.model.rows)
        index = [self.rng.randrange(rows) for _ in range(self.rng.randint(1, 4))]
        if len(index) == rows and self.rng.random() < 0.5:
            self.talk.cache.reorder_cache(torch.tensor(index))
        else:
            self.talk.cache.batch_select_indices(torch.tensor(index))
        self.talk.model.select(index)
        self.log.append(f"select {index}")

    def repeat(self) -> None:
        if len(self.talk.model.rows) > 2:
            return
        self.talk.cache.batch_repeat_interleave(2)
        self.talk.model.select([r for r in range(len(self.talk.model.rows)) for _ in range(2)])
        self.log.append("repeat")

    # -- requests that are read together -------------------------------------------------------------------------------------------

    def together(self) -> None:
        """What a scheduler does for a while."""
        if self.flat is None:
            self.flat = self.pair.extension.flat()
        kinds: dict[Callable[[], None], int] = {
            self.join_requests: 2, self.read_requests: 5, self.decode_requests: 5, self.fork_request: 2, self.crop_request: 3, self.leave_request: 2,
            self.fail_requests: 1,
        }  # fmt: skip
        for _ in range(self.rng.randint(2, 6)):
            kind = self.join_requests if not self.requests else self.rng.choices(list(kinds), list(kinds.values()))[0]
            kind()
            held = {request: self.flat.length(request) for request in self.flat.requests}
            if held != {request: len(model.rows[0]) for request, model in self.requests.items()}:
                raise Mismatch(f"the requests hold {held}, the models {[len(model.rows[0]) for model in self.requests.values()]}")
        self.decode_requests()

    def join_requests(self) -> None:
        for _ in range(self.rng.randint(1, 3)):
            self.requests[self.flat.join()] = Model.empty(1)
        self.log.append(f"join -> {[*self.requests]}")

    def some(self, sizes: list[int]) -> dict[int, torch.Tensor]:
        """New tokens for some of the requests, fewer than would make one too long."""
        chosen = self.rng.sample([*self.requests], self.rng.randint(1, len(self.requests)))
        counts = {request: self.rng.choice(sizes) for request in chosen if len(self.requests[request].rows[0]) <= self.most}
        return {request: torch.tensor([[self.rng.randrange(3, 96) for _ in range(count)]]) for request, count in counts.items()}

    def read_requests(self) -> None:
        """Chunks and single tokens beside each other."""
        self.flat_forward(self.some([1, 1, 2, self.rng.randint(1, self.longest_chunk), 12 + self.rollback + self.slack]))

    def decode_requests(self) -> None:
        for _ in range(self.rng.choice([1, 1, 3])):
            if self.requests:
                self.flat_forward(self.some([1]))

    def flat_forward(self, new: dict[int, torch.Tensor]) -> None:
        if not new:
            return
        wanted = self.rng.choice(["last", "last", "all", "none"])
        found = self.flat.read({request: ids[0] for request, ids in new.items()}, wanted)
        for request, ids in new.items():
            self.requests[request].append(ids, torch.ones_like(ids), self.number)
        self.log.append(f"read together {({request: ids.shape[1] for request, ids in new.items()})} -> {wanted}")
        if wanted != "none":
            rows = [self.requests[request].rows[0] for request in new]
            self.compare(Model(rows), [found[request].reshape(-1, found[request].shape[-1]) for request in new])

    def fork_request(self) -> None:
        if len(self.requests) < 7:
            old = self.rng.choice([*self.requests])
            self.requests[self.flat.fork(old)] = self.requests[old].copy()
            self.log.append(f"fork request {old}")

    def crop_request(self) -> None:
        request = self.rng.choice([*self.requests])
        model = self.requests[request]
        gone = self.rng.randint(0, min(model.seen, self.rng.choice([self.rollback, 2 * self.rollback, 500])))
        try:
            self.flat.crop(request, model.seen - gone)
        except ValueError as error:
            if "can be forgotten" not in str(error) or model.goes_back(gone, self.rollback):
                raise
            self.log.append(f"crop request {request} by {gone}: refused")
            return
        model.crop(gone)
        self.log.append(f"crop request {request} by {gone}")

    def leave_request(self) -> None:
        gone = self.rng.choice([*self.requests])
        self.flat.leave(gone)
        del self.requests[gone]
        self.log.append(f"leave {gone}")

    def fail_requests(self) -> None:
        """A flat forward that raises in some layer: nobody has read anything."""
        new = self.some([1, self.rng.randint(1, self.longest_chunk), 12 + self.rollback + self.slack])
        if not new:
            return

        def broken(*anything: Any) -> None:
            raise Failure

        hook = self.rng.choice(self.pair.extension.forward.modules).register_forward_hook(broken)
        try:
            self.flat.read({request: ids[0] for request, ids in new.items()})
        except Failure:
            self.log.append("fail together")
        else:
            raise Mismatch("the flat forward did not fail")
        finally:
            hook.remove()

    # -- what goes wrong ------------------------------------------------------------------------------------------------------------

    def fail(self) -> None:
        """A forward that raises in some layer, before, in or after its attention."""
        modules = self.pair.extension.forward.modules
        module = self.rng.choice([*modules, *modules, self.extended.get_output_embeddings()])
        when = self.rng.choice([module.register_forward_pre_hook, module.register_forward_hook])

        def broken(*anything: Any) -> None:
            raise Failure

        hidden = self.talk.model.hidden
        if self.rng.random() < 0.3:  # rows of one visible length share a call, whatever they hold behind it
            shortest = min(map(len, self.talk.model.rows))
            self.talk.model.hidden = [{token.slot for token in row[shortest:]} for row in self.talk.model.rows]
        hook = when(broken)
        try:
            self.forward(*self.columns(self.longest_chunk))
        except Failure:
            pass
        except ValueError as error:
            if "hides the last" not in str(error):
                raise
        else:
            raise Mismatch("the forward did not fail")
        finally:
            hook.remove()
            self.talk.model.hidden = hidden
        self.log.append(f"fail in {type(module).__name__}")

    def fork_within(self) -> None:
        """A hook of a forward takes a copy of the cache that is being written to: as it was before."""
        if store_of(self.talk.cache) is None:
            return
        before, copies = self.talk.model.copy(), []
        hook = self.rng.choice(self.pair.extension.forward.modules).register_forward_hook(
            lambda *anything: copies.append(copy.deepcopy(self.talk.cache) if self.rng.random() < 0.5 else self.pair.extension.fork(self.talk.cache))
        )
        try:
            self.read(*self.columns(self.longest_chunk))
        finally:
            hook.remove()
        self.talks = [*self.talks[-2:], *(Talk(cache, before.copy()) for cache in copies)]
        self.log.append(f"{len(copies)} copied within")
        for talk in self.talks[-len(copies) :] if copies else ():
            self.probe(talk)

    def interrupt(self) -> None:
        """The user stops the program while what was read is being counted: it counts."""
        before, calls, at = buffer.Buffer.settle, 0, self.rng.randint(1, 5)
        error = self.rng.choice([KeyboardInterrupt, RuntimeError])  # the second as where memory is short: the forward has succeeded all the same

        def settle(buffer: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise error
            before(buffer)

        rows = len(self.talk.model.rows)
        ids, new = self.columns(self.longest_chunk)
        if any(row and row[-1].slot in gone for row, gone in zip(self.talk.model.rows, self.talk.model.hidden, strict=True)):
            return
        buffer.Buffer.settle = settle  # type: ignore[method-assign]
        try:
            self.forward(ids, new)
        except KeyboardInterrupt:
            pass
        finally:
            buffer.Buffer.settle = before  # type: ignore[method-assign]
        self.talk.model.append(ids, new, self.number)
        self.log.append(f"interrupt at buffer {at} of {rows} rows")

    def refused(self) -> None:
        """Calls that no cache can honour change nothing."""
        ids, new = self.columns(3)
        mask = torch.cat([self.talk.model.mask(), new], 1)
        wrong: list[tuple[torch.Tensor, torch.Tensor]] = [(ids, mask[:, 1:]), (ids, mask * 2 - 1), (torch.cat([ids, ids]), torch.cat([mask, mask]))]
        pads = [(r, s) for r, row in enumerate(self.talk.model.rows) for s in set(range(self.talk.model.seen)) - {token.slot for token in row}]
        if pads:
            shown = mask.clone()
            shown[self.rng.choice(pads)] = 1
            wrong.append((ids, shown))
        if not self.talk.model.seen:
            return
        for x, m in wrong:
            if bool((m == mask).all()) if m.shape == mask.shape else False:
                continue
            try:
                with torch.no_grad():
                    self.extended(x, attention_mask=m, past_key_values=self.talk.cache)
            except ValueError:
                continue
            raise Mismatch(f"a mask of shape {list(m.shape)} was taken")
        self.log.append("refused")

    # -- the truth ----------------------------------------------------------------------------------------------------------------

    def truth(self, model: Model, last: int | list[int]) -> list[torch.Tensor]:
        """The logits of the last tokens of every row, from one dense forward."""
        lengths = [len(row) for row in model.rows]
        longest = max(1, *lengths) if lengths else 1
        ids = torch.tensor([[token.id for token in row] + [3] * (longest - len(row)) for row in model.rows])
        matrix = None
        if any(token.blind for row in model.rows for token in row):
            matrix = torch.zeros(len(model.rows), 1, longest, longest, dtype=torch.bool)
            for r, row in enumerate(model.rows):
                for i, token in enumerate(row):
                    if token.blind:
                        matrix[r, 0, i, : len(row)] = torch.tensor([other.number in token.blind for other in row])
        with torch.no_grad(), blindness(matrix):
            logits = self.pair.dense.model(ids, use_cache=False).logits
        counts = [last] * len(lengths) if isinstance(last, int) else last
        return [logits[r, n - count : n] for r, (n, count) in enumerate(zip(lengths, counts, strict=True))]

    def compare(self, model: Model, logits: list[torch.Tensor]) -> None:
        self.compared = True
        for r, (ours, wanted) in enumerate(zip(logits, self.truth(model, [len(x) for x in logits]), strict=True)):
            if not len(ours):
                continue
            difference = ((ours - wanted).abs().max() / wanted.abs().max()).item()
            if difference <= GATE:
                self.worst = max(self.worst, difference)
            elif self.rounding_decides(model, r, len(ours), difference):
                self.undecided += 1
            else:
                raise Mismatch(f"row {r} is off by {difference:.1e}")

    def rounding_decides(self, model: Model, row: int, count: int, difference: float) -> bool:
        """Whether the dense truth itself moves as far if its embeddings are off by 1e-6, as where two experts of a router are equally good, or where all keys
        are, for the token whose embedding is zero."""
        alone = Model([model.rows[row]], model.seen, [set()], [0])
        (before,) = self.truth(alone, count)
        embeddings, moved = self.pair.dense.model.get_input_embeddings(), 0.0
        for seed in range(10):
            noise = torch.Generator().manual_seed(seed)
            hook = embeddings.register_forward_hook(lambda module, args, out, noise=noise: out + 1e-6 * out.std() * torch.randn(out.shape, generator=noise))
            (after,) = self.truth(alone, count)
            hook.remove()
            moved = max(moved, ((after - before).abs().max() / before.abs().max()).item())
        return moved >= difference / 2

    def probe(self, talk: Talk) -> None:
        """One more token for every row, on a fork, with a plain mask: has the last operation left what it should have?"""
        if store_of(talk.cache) is None or not talk.model.seen:
            return
        self.talk = Talk(self.pair.extension.fork(talk.cache), talk.model.copy())
        if store_of(self.talk.cache).lengths != [len(row) for row in talk.model.rows]:
            raise Mismatch(f"the cache holds {store_of(self.talk.cache).lengths} tokens, the model {[len(row) for row in talk.model.rows]}")
        self.talk.model.hidden = [set() for _ in talk.model.rows]
        rows = len(talk.model.rows)
        ids, new = torch.tensor([[self.rng.randrange(3, 96)] for _ in range(rows)]), torch.ones(rows, 1, dtype=torch.long)
        logits = self.forward(ids, new)
        self.talk.model.append(ids, new, self.number)
        self.compare(self.talk.model, list(logits))


def run(seed: int, operations: int = 8) -> dict[str, Any]:
    """One history -> what came of it."""
    started, history = time.perf_counter(), None
    try:
        history = History(seed)
        found: dict[str, Any] = {"worst": history.run(operations)}
        if history.undecided:
            found["undecided"] = history.undecided
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(limit=-4), "log": [] if history is None else history.log}
    where = {} if history is None else {"family": history.family, "method": str(history.method)}
    return {"seed": seed, **where, **found, "seconds": round(time.perf_counter() - started, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--log", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = {json.loads(line)["seed"] for line in arguments.log.read_text().splitlines()} if arguments.log.exists() else set()
    failed = 0
    with arguments.log.open("a") as log:
        for seed in range(arguments.first, arguments.first + arguments.count):
            if seed in done:
                continue
            found = run(seed)
            log.write(json.dumps(found) + "\n")
            log.flush()
            if "error" in found:
                failed += 1
                print(seed, found["error"], *found["log"], found["trace"], sep="\n  ", flush=True)
    print(f"{arguments.count} histories from seed {arguments.first}, {len(done)} of the log before, {failed} failed")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
