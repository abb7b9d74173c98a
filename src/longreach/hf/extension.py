"""extend(): a method on one model instance, and what people hold of it.

Knows what was chosen, verified and attached; how is in `verify.py`, `attach.py` and `forward.py`.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from transformers import DynamicCache, PreTrainedModel

from longreach import configs
from longreach.core.encodings import exact_device
from longreach.engine import turns
from longreach.engine.layer import Layer
from longreach.engine.watch import Choices, Ended, Probabilities, Watch
from longreach.hf import documents, flat_check, legacy, registration, report
from longreach.hf.attach import Attachment
from longreach.hf.cache import place
from longreach.hf.checks import configs_of, find_base, uncompiled
from longreach.hf.documents import Document
from longreach.hf.facts import Chosen, Exactness, Facts
from longreach.hf.fingerprint import checkpoint_fingerprint
from longreach.hf.flat import Flat
from longreach.hf.forward import Forward
from longreach.hf.interfaces import CausalLM
from longreach.hf.placement import device_of
from longreach.hf.retrieval import chooses_nothing
from longreach.hf.standard import StandardSeam
from longreach.hf.verify import verify
from longreach.memory.budgets import Tiered
from longreach.memory.contiguous import Contiguous
from longreach.memory.layer import Memory
from longreach.memory.pooled import Tiers
from longreach.methods.base import Method
from longreach.planning import dial
from longreach.planning.profile import Profile
from longreach.quantities import token_count

logger = logging.getLogger("longreach")
Watching = TypeVar("Watching", Watch, Probabilities, Choices)
_numbers = itertools.count(1)  # one attention name per extension, so that two extended models do not meet


def extend(
    model: PreTrainedModel,
    method: Method | None = None,
    *,
    context: int | str | None = None,
    trained_window: int | str | None = None,
    profile: Profile | str | Path | None = None,
    backend: str = "auto",
    memory: Memory | Tiered | None = None,
) -> Extension:
    """Make `model` usable at a longer context, without training.

    method          a method with its parameters; if None, the dial chooses one for `context`.
    context         the largest number of tokens of a sequence, new tokens included, such as 16384 or "16k". Longer input raises.
    trained_window  overrides the trained window read from the configuration.
    profile         what `longreach tune` found for this model, or the file of it: it chooses the method where the context is beyond the trained window.
                    None: the dial's rule chooses; no profile is looked for.
    backend         "auto", or "reference" for the dense truth: slow, for checking.
    memory          `longreach.Tiered(...)`, budgets for what is kept of every token: on the device, in the memory of the host and on disk. Or what makes the
                    memory of a layer, of the protocol `longreach.memory.layer.LayerMemory`. None: all is on the device, as long as there is room.

    Raises ValueError, with the fix, if the method cannot apply to this model or context, or the profile is of other weights or another trained
    window, does not reach the context, or stands beside a method. A model may be wrapped by torch.compile or PEFT,
    before or after.
    """
    model = uncompiled(model)
    tokens = None if context is None else token_count(context), None if trained_window is None else token_count(trained_window, "trained_window")
    if isinstance(method, int):
        raise ValueError(f"pass a declared context by name: extend(model, context={method})")
    if method is not None and not isinstance(method, Method):
        raise ValueError(f"{method!r} is not a method; pass for example longreach.SelfExtend(group_size=8, window=64), or context=N alone")
    if method is None and context is None:
        raise ValueError("pass context=N, the number of tokens you want to use, or a method such as longreach.LMInfinite(n_local=512)")
    if profile is not None and (method is not None or context is None):
        raise ValueError("a profile chooses the method for a declared context: pass context=N and no method, or leave the profile out")
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend must be 'auto' or 'reference', not {backend!r}")
    base = find_base(model)
    configs.refuse_unsupported(base.config)
    tiers = memory if isinstance(memory, Tiered) else None
    chosen = _chosen(model, base.config, method, *tokens, None if profile is None else _profile_of(base, profile), tiers)
    if backend == "reference" and exact_device(device_of(model)) != device_of(model):
        raise ValueError(f"the dense truth is computed in fp64, which {device_of(model).type} does not have; move the model to 'cpu' or leave out backend")
    before = [(config, config._attn_implementation_internal) for config in configs_of(model)]
    registration.refuse_taken(config for config, _ in before)
    name = f"{registration.PREFIX}{next(_numbers)}"
    seam = legacy.seam_of(model, name, before) or StandardSeam(model, base, name, before)
    try:
        facts = verify(seam, chosen, dense=backend == "reference")
        kept = _tiers(memory, facts) if isinstance(memory, Tiered) else memory or Contiguous
        if facts.remark:
            warnings.warn(facts.remark, stacklevel=2)
        extension = Extension(facts, Attachment(seam, Forward(facts, kept)))
    except BaseException:  # an interrupt may have broken off what cleans up
        seam.remove()
        registration.unregister(name)
        registration.set_back(before)
        raise
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", extension.describe())
    return extension


def _tiers(given: Tiered, facts: Facts) -> Tiers:
    if given.policy == "mass" and not any(layer.layout.choice and not layer.dense for layer in facts.layers):
        choice = facts.chosen.choice
        why = f"; it was chosen with a warning: {choice.warning}" if choice is not None and choice.warning else ""  # whoever is refused hears no other
        raise ValueError(
            f"policy='mass' goes by what queries pay to blocks that they have chosen, and here {facts.chosen.method} chooses nothing; leave out policy{why}"
        )
    return Tiers(given, facts.stored)


def _profile_of(base: Any, given: Profile | str | Path) -> Profile:
    """The profile itself. Raises if it was made for other weights."""
    found = Profile.read(given) if isinstance(given, str | Path) else given
    if not isinstance(found, Profile):
        raise ValueError(f"profile must be a longreach.Profile or the path of one, not {type(given).__name__}; leave it out to have the dial's rule choose")
    if found.fingerprint != (own := checkpoint_fingerprint(base)):
        raise ValueError(
            f"the profile of {found.model} was tuned for other weights than these (fingerprint {found.fingerprint[:16]}, and this model has {own[:16]}); "
            "pass the profile of this model, run longreach tune for it, or leave the profile out (--no-profile, profile=None)"
        )
    return found


def _chosen(
    model: Any, config: Any, method: Method | None, context: int | None, trained_window: int | None, profile: Profile | None, memory: Tiered | None
) -> Chosen:
    """The method, asked for or chosen by the dial, and how far it reaches. Raises where that is less than the declared context."""
    window = configs.trained_window(config, trained_window)
    choice, weight = None, next(model.parameters())
    if method is None:
        assert context is not None
        choice = dial.choose(window, context, dial.budget(config, weight.dtype, weight.device, memory), profile)
        method, context = choice.method, choice.context
    elif context and memory and (said := dial.too_large(method, context, dial.budget(config, weight.dtype, weight.device, memory))):
        warnings.warn(said, stacklevel=3)
    if method.needs_context and context is None:
        raise ValueError(
            f"{method.name} fixes its frequencies once for a whole sequence, from the declared context; pass context=N (--context N), "
            "the prompt plus the new tokens"
        )
    capacity = context if method.needs_context else method.capacity(window.tokens)
    if context is not None and capacity is not None and context > capacity:
        raise ValueError(
            f"{method} reaches {capacity} tokens on a trained window of {window.tokens}, less than the declared context of "
            f"{context}; use extend(model, context={context}) to have the parameters chosen{dial.combined(method, window.tokens, context)}"
        )
    return Chosen(method, window, context, capacity, choice)


class Extension:
    """A method attached to a model. `remove()` or the end of a `with` block takes it off; the model is then as before."""

    def __init__(self, facts: Facts, attachment: Attachment) -> None:
        self.facts = facts
        self.forward = attachment.forward
        self._attachment = attachment

    @property
    def model(self) -> CausalLM:
        return self.facts.model

    @property
    def method(self) -> Method:
        return self.facts.chosen.method

    @property
    def window(self) -> configs.Window:
        """The trained window."""
        return self.facts.chosen.window

    @property
    def context(self) -> int | None:
        """Tokens that were declared."""
        return self.facts.chosen.context

    @property
    def capacity(self) -> int | None:
        """Tokens that the method reaches; None: any number."""
        return self.facts.chosen.capacity

    @property
    def choice(self) -> dial.Choice | None:
        """What the dial chose, and why."""
        return self.facts.chosen.choice

    @property
    def exactness(self) -> Exactness:
        return self.facts.exactness

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What is fixed about every attention layer."""
        return self.facts.layers

    @property
    def attached(self) -> bool:
        return bool(self.forward.modules)

    # -- documents ----------------------------------------------------------------------------------------------------------------

    def save(self, cache: Any, file: str | Path, ids: Any = None, *, notes: Mapping[str, str] | None = None) -> None:
        """Write what `cache` has read to a folder, all of it or nothing. Saved there again when it has grown, only what is new is written; see
        `documents.save`."""
        documents.save(self.forward, cache, Path(file), ids, notes or {})

    def load(self, file: str | Path, *, max_bytes: int = documents.LARGEST) -> Document:
        """What was saved: its cache, ids and mask. Raises ValueError, with the fix, if the document does not belong to this extension."""
        return documents.load(self.forward, Path(file), max_bytes)

    def fork(self, cache: Any) -> DynamicCache:
        """A second cache that goes on from the same place, independently. What the two have in common is held once, however they go on; what is bounded or
        short is copied at the first write."""
        return documents.fork(self.forward, cache)

    # -- turns --------------------------------------------------------------------------------------------------------------------

    def turn(self, cache: Any, *tokens: int) -> None:
        """Announce the next turns, such as a question and its answer, by their tokens. Of a method that evicts, what a turn has no room for leaves before its
        first token is read; a turn may be read in any number of forwards. `cache`: of this extension, or an empty `DynamicCache`.

        Raises ValueError for a turn of less than one token, and for a method that evicts nothing.
        """
        if self.method.eviction is None or not all(isinstance(n, int) and n > 0 for n in tokens):
            raise ValueError(f"turns of at least one token are announced to a method that evicts, such as SirLLM, not {tokens} to {self.method.name}")
        turns.announce(place(cache, self.forward.new_store(), self.forward.calls)[1], tokens)

    # -- many requests ------------------------------------------------------------------------------------------------------------

    def flat(self) -> Flat:
        """Requests that are read together in one forward of the model, each with a memory of its own; see `Flat`.

        Raises ValueError, with the reason, where the model's own code does not allow it: its layers scale queries by the slots of a cache, its activations are
        quantised with one scale for a whole tensor, or a request that is read beside others differs from the same one alone.
        """
        if self.method.eviction is not None:
            raise ValueError(f"{self.method.brief()} evicts before a turn, and a flat forward has none; read requests one by one, with generate or stream")
        found = Flat(self.forward)
        flat_check.require_exact(self.forward)
        return found

    @contextmanager
    def watching(self, layers: Collection[int] | None = None, queries: int | None = None) -> Iterator[Watch]:
        """Inside, forwards of the model also say how much attention every token gets, in a second pass over the keys of a layer.

            with extension.watching(queries=1) as watch:
                model(ids)
            watch.mass[layer]     # [B, H, N]: of the last token of every row, in every head of a layer; see `Watch`

        Raises ValueError for layers that do not exist, fewer than one query, a dense reference, and inside another.
        """
        if queries is not None and queries < 1:
            raise ValueError(f"at least one query counts, not {queries}; pass queries=None for all")
        with self._watched(Watch(self._existing(layers), queries)) as watch:
            yield watch

    @contextmanager
    def watching_probabilities(self, first: int | Sequence[int], layers: Collection[int] | None = None, ends: bool = False) -> Iterator[Probabilities]:
        """Inside, forwards of the model also say how much attention every token gets from each single query, all heads added up.

            with extension.watching_probabilities(first=90, layers=[3]) as watch:
                model(ids)
            watch.paid[3][0]      # [queries, tokens]: of the tokens from index 90 on, in layer 3; see `Probabilities`

        `first`: queries from this index on count, or from one for every row. `ends`: a forward ends in the last of these layers, and the block with it;
        later layers and the head are not computed, and nothing is stored. Raises ValueError as `watching` does, and for a `first` that is no index.
        """
        each = [first] if isinstance(first, int) else [*first]
        if not each or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in each):
            raise ValueError(f"first is the index of a query, or one for every row, not {first!r}; pass whole numbers from 0 on")
        last = max(range(len(self.facts.layers)) if layers is None else layers, default=None) if ends else None
        with self._watched(Probabilities(first if isinstance(first, int) else tuple(each), self._existing(layers)), last) as watch:
            yield watch

    def _existing(self, layers: Collection[int] | None) -> frozenset[int] | None:
        count = len(self.facts.layers)
        if layers is not None and not all(0 <= layer < count for layer in layers):
            raise ValueError(f"layers {sorted(layers)} are not all among the {count} of this model; pass numbers from 0 to {count - 1}")
        return None if layers is None else frozenset(layers)

    @contextmanager
    def watching_choices(self, first: int = 0) -> Iterator[Choices]:
        """Inside, forwards of the model also say which tokens an index chooses for their queries, and which they see anyway; see `Choices`.

            with extension.watching_choices() as choices:
                model(ids)
            choices.chosen[layer]     # [B, N]: how often each token was chosen

        `first`: queries from this index on count. Raises ValueError for one that is no index, where the method chooses nothing, for a dense reference, and
        inside another.
        """
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise ValueError(f"first is the index of a query, not {first!r}; pass a whole number from 0 on, or leave it out for all queries")
        if not any(layer.layout.choice for layer in self.facts.layers):
            raise ValueError(chooses_nothing(self.method, self.window.tokens))
        with self._watched(Choices(first)) as watch:
            yield watch

    @contextmanager
    def _watched(self, watch: Watching, last: int | None = None) -> Iterator[Watching]:
        if self.facts.layers[0].dense or self.forward.calls.watch is not None:
            raise ValueError("neither a dense reference nor a model that is watched already can be watched; extend() without backend, or leave the other first")
        calls = self.forward.calls
        calls.watch, calls.last = watch, last
        try:
            yield watch
        except Ended:
            pass
        finally:
            calls.watch = calls.last = None

    # -- people -----------------------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """What was attached, as plain data."""
        return report.report(self.facts, self.forward.memory)

    def describe(self) -> str:
        """Method, parameters, layers, capacity, backend, memory and measured exactness, in words."""
        return report.describe(self.facts, self.forward.memory)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.forward.__reduce_ex__(protocol)  # which refuses

    def __repr__(self) -> str:
        return f"Extension({self.method}, {'attached' if self.attached else 'removed'})"

    def remove(self) -> None:
        """Take the method off; the model is bit-identical to before. Safe to call twice."""
        self._attachment.remove()

    def __enter__(self) -> Extension:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()
