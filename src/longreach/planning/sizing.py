"""plan(): what reading so many tokens with a model costs on a device, by method, before any weight is downloaded.

Puts the pieces of this room together with the dial and the registry: rows, the bound of each, and the nearest request that can be met.
Loads configurations only; knows no terminals.
"""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longreach import configs
from longreach.configs import EMBEDDED
from longreach.memory.budgets import Tiered, size_text
from longreach.methods import registry
from longreach.methods.base import Method
from longreach.methods.selfextend import SelfExtend
from longreach.methods.stock import Stock
from longreach.planning import devices, dial, needs, offers, terms, timing
from longreach.planning.architecture import read
from longreach.planning.hardware import CARDS, Hardware
from longreach.planning.memory import Schedule, largest, store_forms
from longreach.planning.needs import Request
from longreach.planning.theory import Term
from longreach.planning.tiers import Spread
from longreach.planning.timing import Bound, Seconds
from longreach.planning.work import Recall, recall
from longreach.quantities import CHUNK_SIZE, token_count

ORDER: tuple[Recall, ...] = ("everything", "what is retrieved", "recent only", "fluent only", "untrained")


@dataclass(frozen=True)
class Row:
    """One method. Bytes are those of one user, but for `peak_bytes`: everything on the device at the concurrency asked for."""

    method: Method
    chosen: bool  # by the dial, or given
    fits: bool
    users: int  # at once
    kv_bytes: int
    temporary_bytes: int
    peak_bytes: int
    prefill_seconds: float  # until the first new token, of one user
    token_seconds: float  # per further token, in a batch of all users that fit
    switch_seconds: float  # a user's keys and values out, another's in; paid where fewer fit than were asked for
    bound: Bound
    recall: Recall
    remark: str  # the recall in words
    command: str
    prefill: Seconds
    token: Seconds
    forms: tuple[dict[str, object], ...]
    tiers: Spread | None  # over tiers: what lies where, and what a token brings to the device
    moved: Seconds  # how long that takes by bandwidth, a part of `token_seconds`


@dataclass(frozen=True)
class Alternative:
    """The nearest request that can be met, in one respect."""

    change: str
    command: str | None


@dataclass(frozen=True)
class Plan:
    """The answer. `rows` are sorted: what recalls more first, what fits before what does not, then by time."""

    request: Request
    rows: tuple[Row, ...]
    terms: tuple[Term, ...]  # plain attention at the hardware's peak, arXiv 2405.08944
    offloading: dict[str, Any]  # SpeContext's thresholds, arXiv 2512.00722
    nearest: tuple[Alternative, ...]  # empty if a method that recalls everything fits
    notes: tuple[str, ...]

    @property
    def possible(self) -> bool:
        return any(row.fits and row.recall != "untrained" for row in self.rows)

    def row(self, name: str) -> Row:
        """The row of a method, by its name on the command line."""
        for row in self.rows:
            if row.method.name == name:
                return row
        raise ValueError(f"the plan has no row for {name!r}; it has {', '.join(row.method.name for row in self.rows)}")

    def to_json(self) -> dict[str, Any]:
        r = self.request
        return {
            "model": r.model,
            "dtype": r.dtype,
            "context": r.context,
            "new_tokens": r.new_tokens,
            "concurrency": r.concurrency,
            "chunk_size": r.chunk_size,
            "memory": None if r.memory is None else r.memory.budgets,
            "trained_window": r.window.tokens,
            "trained_window_reason": r.window.reason,
            "weights": {"parameters": r.architecture.weights.parameters, "bytes": r.architecture.weights.nbytes, "active": r.architecture.weights.active},
            "hardware": {f.name: getattr(r.hardware, f.name) for f in dataclasses.fields(Hardware) if f.name != "measured"},
            "speeds": "measured" if r.hardware.measured is not None else "datasheet x assumed efficiency",
            "possible": self.possible,
            "methods": [row_json(row) for row in self.rows],
            "terms": [dataclasses.asdict(term) for term in self.terms],
            "offloading": self.offloading,
            "nearest": [dataclasses.asdict(a) for a in self.nearest],
            "notes": list(self.notes),
        }


def row_json(row: Row) -> dict[str, Any]:
    plain = {f.name: getattr(row, f.name) for f in dataclasses.fields(Row)}
    plain["tiers"] = None if row.tiers is None else {**dataclasses.asdict(row.tiers), "moved": row.tiers.moved}
    seconds = {name: {**dataclasses.asdict(getattr(row, name)), "bound": getattr(row, name).bound} for name in ("prefill", "token", "moved")}
    return {**plain, "method": row.method.to_json(), "forms": list(row.forms), **seconds}


def plan(
    model: Any = EMBEDDED,
    context: int | str | None = None,
    hardware: str | Path | Hardware = "cpu",
    *,
    config: str | Path | dict[str, Any] | None = None,
    new_tokens: int | str = 128,
    concurrency: int = 1,
    method: Method | None = None,
    dtype: str | torch.dtype | None = None,
    trained_window: int | str | None = None,
    chunk_size: int | str = CHUNK_SIZE,
    calibration: Path | None = None,
    memory: Tiered | None = None,
) -> Plan:
    """What it costs to read `context` tokens, the last `new_tokens` of them generated, for `concurrency` users at a time.

    Numbers of tokens may be written as 16384 or "16k".

    model           "nano", the id of a model on the Hub, a folder, or a Transformers configuration. Weights are neither loaded nor downloaded.
    hardware        a card such as "A100-80", a TOML file, "cpu" or "cuda" of this machine once it was calibrated, or a `Hardware`.
    config          a config.json, or its content, in place of the model's.
    method          one method, in place of every method with the parameters it suggests for this context.
    dtype           of the weights, keys and values; None: as `load` would have it.
    trained_window  overrides the trained window read from the configuration.
    chunk_size      prompt tokens of one forward.
    calibration     the file of `longreach plan --calibrate`; None: in the user's cache folder.
    memory          `longreach.Tiered(...)`, budgets of all users together for what is kept of every token; None: all of it on the device.

    Raises ValueError, with the fix, for requests that make no sense; a request that cannot be met is a plan with `nearest`.
    """
    if context is None:
        raise ValueError("pass context=N (--context N), the tokens of the prompt and of the answer together")
    context, new_tokens, chunk_size = token_count(context), token_count(new_tokens, "new_tokens"), token_count(chunk_size, "chunk_size")
    check(context, new_tokens, concurrency)
    trained_window = None if trained_window is None else token_count(trained_window, "trained_window")
    found, name = configs.load(model, config)
    wanted = configs.parse_dtype(dtype) or (torch.float32 if config is None and configs.embedded(model) else None)
    architecture = read(found, wanted)
    window = configs.trained_window(found.get_text_config(), trained_window)
    device = hardware if isinstance(hardware, Hardware) else devices.find(str(hardware), calibration)
    request = Request(name, architecture, window, device, context, new_tokens, concurrency, chunk_size, trained_window is not None, memory)
    if memory is not None and device.host_memory is not None and memory.budgets.get("host", 0) > device.host_memory:
        raise ValueError(f"host={size_text(memory.budgets['host'])} is more than the {size_text(device.host_memory)} of the host; pass a smaller budget")
    methods, notes = candidates(window, context) if method is None else ([(method, True)], [])
    rows = sorted((row_of(request, m, chosen) for m, chosen in methods), key=place)
    return Plan(
        request=request,
        rows=tuple(rows),
        terms=tuple(terms.peak(architecture, device, context, new_tokens, concurrency)),
        offloading=terms.offloading(architecture, device, concurrency, context),
        nearest=tuple(nearest(request, rows, method)),
        notes=(*architecture.notes, *notes, *waiting(request, rows[0])),
    )


def waiting(request: Request, row: Row) -> list[str]:
    """Users that do not fit wait on the host, if it has room for them."""
    outside, room = request.concurrency - row.users, request.hardware.host_memory
    if not row.users or outside <= 0 or room is None or outside * row.kv_bytes <= room:
        return []
    held = room // row.kv_bytes
    return [f"the host's memory holds the keys and values of {held} of the {outside} users that would wait; ask for {row.users + held} at a time"]


def check(context: int, new_tokens: int, concurrency: int) -> None:
    if not isinstance(concurrency, int) or isinstance(concurrency, bool) or concurrency < 1:
        raise ValueError(f"concurrency must be a number of at least 1, not {concurrency!r}; pass concurrency=N (--concurrency N)")
    if context <= new_tokens:
        raise ValueError(f"a context of {context} leaves no room for a prompt beside {new_tokens} new tokens; pass a context of at least {new_tokens + 1}")


def candidates(window: configs.Window, context: int) -> tuple[list[tuple[Method, bool]], list[str]]:
    """The dial's choice, plain attention, and what every other method suggests for this context."""
    found: list[tuple[Method, bool]] = []
    notes = []
    try:
        choice = dial.choose(window, context)
        found.append((choice.method, True))
        notes += [choice.warning] if choice.warning else []
    except ValueError as error:
        notes.append(str(error))
    for kind in registry().values():
        if any(isinstance(m, kind) for m, _ in found):
            continue
        suggested = kind() if kind is Stock else kind.suggest(window.tokens, context)  # plain attention stands for what is compared, reach or not
        suggested = suggested or offers.retrieving(kind, window.tokens, context)
        if suggested is not None and not (suggested.rescales and context <= window.tokens):
            found.append((suggested, False))
    return found, notes


def row_of(request: Request, method: Method, chosen: bool) -> Row:
    architecture, device = request.architecture, request.hardware
    schedule, speeds = Schedule.of(method, request.context, request.new_tokens, request.chunk_size), device.speeds(request.dtype)
    need = needs.of(request, method, request.context)
    users = need.users(device.memory)
    together = max(1, min(users, request.concurrency))
    prefill = timing.prefill(architecture, method, schedule, speeds)
    token = timing.decode(architecture, method, schedule, speeds, together)
    brought = Seconds() if need.spread is None else timing.moved(need.spread.token, device, speeds)
    if need.spread is not None:
        prefill += timing.moved(need.spread.prefill, device, speeds)
        token += brought * together
    switch = timing.switch(need.kv, speeds)
    turn = prefill + token * (request.new_tokens - 1) + (switch if 0 < users < request.concurrency else Seconds())
    kind, remark = recall(architecture, method, request.window.tokens, request.context, request.new_tokens)
    return Row(
        method=method,
        chosen=chosen,
        fits=users >= request.concurrency,
        users=users,
        kv_bytes=need.kv,
        temporary_bytes=need.temporary,
        peak_bytes=need.peak(request.concurrency),
        prefill_seconds=prefill.total,
        token_seconds=token.total,
        switch_seconds=switch.total,
        bound=turn.bound if users else "capacity",
        recall=kind,
        remark=remark,
        command=command(request, method),
        prefill=prefill,
        token=token,
        forms=tuple(store_forms(architecture, method, schedule)),
        tiers=need.spread,
        moved=brought,
    )


def place(row: Row) -> tuple[Any, ...]:
    return ORDER.index(row.recall), not row.fits, not row.chosen, row.prefill_seconds + row.token_seconds


def command(request: Request, method: Method, **changed: Any) -> str:
    """What to type to run it."""
    r = replace(request, **changed) if changed else request
    words = ["longreach run", "--model", shlex.quote(r.model), "--context", str(r.context), "--method", *method.options()]
    words += ["--dtype", r.dtype, "--device", r.hardware.device, "--max-new-tokens", str(r.new_tokens)]
    words += ["--trained-window", str(r.window.tokens)] if r.window_given else []
    words += ["--chunk-size", str(r.chunk_size)] if r.chunk_size != CHUNK_SIZE else []
    words += ["--memory", shlex.quote(str(r.memory))] if r.memory is not None else []
    return " ".join([*words, "--file TEXT", "--prompt QUESTION"])


def nearest(request: Request, rows: list[Row], given: Method | None) -> list[Alternative]:
    """What can be had instead, where no method that recalls everything fits (or not the one that was given)."""
    if any(row.fits and row.recall in (ORDER[:-1] if given is not None else ORDER[:1]) for row in rows):
        return []
    best = next((row for row in rows if row.chosen), rows[0])
    found: list[Alternative] = []
    if best.recall == "untrained":
        reach = best.method.capacity(request.window.tokens) or 0
        if request.new_tokens < reach < request.context:
            change = f"{reach} tokens, as far as {best.method.brief()} was trained for"
            found.append(Alternative(change, command(request, best.method, context=reach)))
    if not best.fits:
        found += by_memory(request, best, given)
    for row in rows:
        if row.fits and row.recall != "untrained" and row is not best:
            found.append(Alternative(f"{row.method.brief()}, which recalls {row.remark}", row.command))
            break
    return found


def by_memory(request: Request, best: Row, given: Method | None) -> list[Alternative]:
    """Less context, fewer users, fewer bits, a larger card: each alone."""
    found: list[Alternative] = []
    fixed, device = request.hardware.reserved + request.architecture.weights.nbytes, request.hardware

    def method_at(n: int) -> Method:
        """The dial takes another group size at another length; what was given stays."""
        return dial.by_length(request.window, n).method if given is None and isinstance(best.method, SelfExtend) else best.method

    longest = largest(lambda n: n <= request.new_tokens or needs.fits(request, method_at(n), n), request.context)
    if longest > request.new_tokens:
        method = method_at(longest)
        found.append(Alternative(f"a context of {longest} with {method.brief()}", command(request, method, context=longest)))
    if best.users:
        found.append(Alternative(f"{best.users} of {request.concurrency} users at once; a change of user then takes {best.switch_seconds:.3g} s", best.command))
    if request.architecture.dtype == torch.float32:
        whole = request.architecture
        weights = replace(whole.weights, nbytes=whole.weights.nbytes // 2)
        half = replace(request, architecture=replace(whole, dtype=torch.bfloat16, weights=weights))
        if needs.fits(half, best.method, half.context):
            found.append(Alternative("bfloat16 in place of float32", command(half, best.method)))
    for card in sorted(CARDS.values(), key=lambda c: c.memory):
        if card.memory > device.memory and needs.fits(replace(request, hardware=card), best.method, request.context):
            found.append(Alternative(f"the card {card.name} with {card.memory / 10**9:.0f} GB", None))
            break
    if not found:
        need = best.peak_bytes / 2**30
        what = "the weights alone exceed this device" if fixed > device.memory else "keys and values exceed this device"
        found.append(Alternative(f"{what} and every listed card: {need:.1f} GiB are needed; take a smaller model or several devices", None))
    return found
