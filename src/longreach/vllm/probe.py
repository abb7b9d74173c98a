"""Is an attention layer of an engine what we take it for? It is run on a few tokens, with its own rotary and with the identity in its place.

With the identity, queries and keys must not depend on positions at all; with its own rotary they must be what ours makes of those. So support is verified on
the model at hand. Knows modules that take positions and hidden states and call an attention module with q, k, v; no engine.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from longreach.core.differences import relative
from longreach.core.encodings import Rotary
from longreach.hf.facts import PROBE_POSITIONS
from longreach.vllm.rotary import Unturned, read

Reached = tuple[torch.Tensor, torch.Tensor]  # q [H, T, D] and k [G, T, D]
FAR = 2**20  # positions at which a layer that scales by them would show it
HIDDEN, PLACES = "hidden_states", ("positions", "position_ids")  # names of what a unit is called with


@dataclass(frozen=True, eq=False)
class Unit:
    """The module around one attention module that turns hidden states into its queries and keys. `places`: what it calls positions. `rotaries`: (parent, name)
    of those inside."""

    name: str
    module: nn.Module
    attention: nn.Module
    places: str
    rotaries: tuple[tuple[nn.Module, str], ...]


class _Reached(Exception):
    """The forward of a unit came to its attention: what it was called with."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor) -> None:
        self.q, self.k = q, k


def unit_of(model: nn.Module, name: str, rotary: str) -> Unit:
    """The unit of the attention module of this name. `rotary`: the package that rotary modules are from. Raises ValueError where there is none we can run."""
    inside = name
    while "." in inside:
        inside = inside.rpartition(".")[0]
        module = model.get_submodule(inside)
        parameters = inspect.signature(module.forward).parameters
        places = next((each for each in PLACES if each in parameters), None)
        if HIDDEN in parameters and places is not None:
            needed = [each for each, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
            if lacking := [each for each in needed if each not in (HIDDEN, places)]:
                raise ValueError(f"{type(module).__name__} needs {', '.join(lacking)} beside hidden states and positions; longreach cannot verify it on vLLM")
            found = [(parent, child) for parent in module.modules() for child, each in parent.named_children() if type(each).__module__.startswith(rotary)]
            inner = [(parent, child) for parent, child in found if not type(parent).__module__.startswith(rotary)]
            return Unit(inside, module, model.get_submodule(name), places, tuple(inner))
    raise ValueError(f"no module around {name} takes hidden states and positions; longreach cannot verify it on vLLM, use longreach serve")


def replace_rotaries(unit: Unit) -> tuple[Rotary | None, float]:
    """Put the identity in place of the rotary modules of a unit, and verify what that changes -> (how it rotates, None: not at all; largest difference of q
    and k to its own rotary). Raises ValueError, and leaves the unit as it was, where something else depends on positions."""
    width = _width(unit.module)
    parameter = next(unit.module.parameters())
    hidden = torch.randn(len(PROBE_POSITIONS), width, generator=torch.Generator().manual_seed(0)).to(parameter.device, _dtype(unit.module))
    near = torch.tensor(PROBE_POSITIONS, device=parameter.device)
    turned = reached(unit, hidden, near)
    originals = [getattr(parent, name) for parent, name in unit.rotaries]
    for (parent, name), original in zip(unit.rotaries, originals):
        setattr(parent, name, Unturned(original))
    try:
        raw = reached(unit, hidden, near)
        _independent(unit, raw, reached(unit, hidden, near.flip(0)))  # before the far ones: whoever reads a table unseen would read behind its end
        _independent(unit, raw, reached(unit, hidden, near + FAR))
        return _verified(unit, originals, raw, turned)
    except BaseException:
        for (parent, name), original in zip(unit.rotaries, originals):
            setattr(parent, name, original)
        raise


def _independent(unit: Unit, raw: Reached, others: Reached) -> None:
    if not all(torch.equal(a, b) for a, b in zip(raw, others)):
        raise ValueError(
            f"the queries or keys of {unit.name} depend on positions beside their rotary (by a scale, or by code that reads its tables), which longreach "
            "cannot take over on vLLM; use longreach serve"
        )


def _verified(unit: Unit, originals: Sequence[nn.Module], raw: Reached, turned: Reached) -> tuple[Rotary | None, float]:
    if all(torch.equal(a, b) for a, b in zip(raw, turned)):
        return None, 0.0
    if len(originals) != 1:
        raise ValueError(f"{unit.name} has {len(originals)} rotary modules; longreach cannot tell on vLLM which one turns its queries; use longreach serve")
    rotary = read(originals[0])
    table = rotary.table(torch.tensor(PROBE_POSITIONS)).to(raw[0].device)
    difference = max(relative(table.rotate(a), b) for a, b in zip(raw, turned))
    if not difference < (1e-4 if raw[0].dtype == torch.float32 else 2e-2):
        raise ValueError(f"{unit.name} rotates in another way than its {type(originals[0]).__name__} says (by {difference:.1e}); use longreach serve")
    return rotary, difference


def reached(unit: Unit, hidden: torch.Tensor, positions: torch.Tensor) -> Reached:
    """What the attention of a unit is called with."""

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("query", "key"), args)) | kwargs
        q, k = (given[name].detach().clone().view(len(hidden), -1, module.head_size).transpose(0, 1) for name in ("query", "key"))
        raise _Reached(q, k)

    hook = unit.attention.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            unit.module(**{unit.places: positions, HIDDEN: hidden.clone()})
    except _Reached as found:
        return found.q, found.k
    except Exception as error:  # the engine's own code, which expects something else around it
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise ValueError(f"{unit.name} does not run by itself ({said}), so longreach cannot verify it on vLLM; use longreach serve") from error
    finally:
        hook.remove()
    raise ValueError(f"{unit.name} did not call its attention; longreach cannot verify it on vLLM, use longreach serve")


def _width(module: nn.Module) -> int:
    """Of the hidden states: the input of the first projection."""
    for each in module.modules():
        if isinstance(size := getattr(each, "input_size", None), int):
            return size
    raise ValueError(f"{type(module).__name__} has no projection whose input we know; longreach cannot verify it on vLLM")


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point() and p.element_size() > 1), torch.get_default_dtype())
