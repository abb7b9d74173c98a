"""What a request needs of a device: bytes of one user and of all, beside the weights; over tiers too. Knows a request; no seconds and no alternatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longreach import configs
from longreach.memory.budgets import Tiered
from longreach.methods.base import Method
from longreach.planning import tiers
from longreach.planning.architecture import Architecture
from longreach.planning.hardware import Hardware
from longreach.planning.memory import Schedule, kv_bytes, largest, temporary_bytes
from longreach.planning.tiers import Spread


@dataclass(frozen=True)
class Request:
    """What was asked."""

    model: str
    architecture: Architecture
    window: configs.Window
    hardware: Hardware
    context: int
    new_tokens: int
    concurrency: int
    chunk_size: int
    window_given: bool = False
    memory: Tiered | None = None

    @property
    def dtype(self) -> str:
        return self.architecture.dtype_name


@dataclass(frozen=True)
class Needs:
    """In bytes. `kv`: keys, values and summaries of one user, wherever they lie.

    fixed    on the device whatever the users are: weights, temporary memory, the driver's share; over tiers their budgets and the staging.
    each     on the device, of every user.
    room     users that the tiers have room for, at most those who were asked for; None: there are none.
    spread   of one user, where all who are asked for have read.
    """

    kv: int
    temporary: int
    fixed: int
    each: int
    room: int | None = None
    spread: Spread | None = None

    def users(self, memory: int) -> int:
        """Who fit at once."""
        found = max(0, memory - self.fixed) // self.each
        return found if self.room is None else min(found, self.room)

    def peak(self, users: int) -> int:
        return self.fixed + users * self.each


def of(request: Request, method: Method, context: int) -> Needs:
    """At a context, of which the request's new tokens are a part."""
    architecture, memory = request.architecture, request.memory
    schedule = Schedule.of(method, context, min(request.new_tokens, context - 1), request.chunk_size)
    expands = request.hardware.device == "cuda" and architecture.dtype == torch.float32
    temporary = temporary_bytes(architecture, method, schedule, expands_groups=expands)
    fixed = request.hardware.reserved + architecture.weights.nbytes + temporary
    if memory is None:
        kv = kv_bytes(architecture, method, schedule)
        return Needs(kv, temporary, fixed, kv)
    found = tiers.spread(architecture, method, schedule, memory, request.concurrency)
    if found.blocks:
        fixed += memory.budgets["device"] + int(memory.staging) + (memory.budgets.get("host", 0) if request.hardware.device == "cpu" else 0)
    room = largest(lambda n: tiers.spread(architecture, method, schedule, memory, n).fits(n), request.concurrency)
    return Needs(found.blocks + found.summaries + found.apart, temporary, fixed, max(1, found.apart), room, found)


def fits(request: Request, method: Method, context: int) -> bool:
    """All users who were asked for."""
    return of(request, method, context).users(request.hardware.memory) >= request.concurrency
