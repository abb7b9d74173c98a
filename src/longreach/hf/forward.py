"""One forward of an extended model: the hooks around it, its mask function and its attention function.

Before the base model runs, the store is placed into its cache and the batch is formed; the mask function hands the batch out, every layer calls
the attention function with it, and when the model has finished the new tokens count. Knows Transformers' forwards; how these functions get
into a model is in `attach.py`, what is true of the model in `facts.py`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from longreach.core.eviction import Eviction
from longreach.engine import turns
from longreach.engine.batch import Batch
from longreach.engine.executor import execute
from longreach.engine.layer import Inputs
from longreach.engine.watch import Ended
from longreach.hf import layer_kinds
from longreach.hf.cache import place
from longreach.hf.calls import Calls, HeadCall
from longreach.hf.checks import check_positions
from longreach.hf.facts import Facts
from longreach.kernels import kernel_for
from longreach.memory.blocks import Blocked
from longreach.memory.contiguous import Contiguous
from longreach.memory.layer import Memory
from longreach.memory.placement import ROLLBACK
from longreach.memory.store import Store

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Forward:
    """The forwards of one model under one method. The hooks of the model hold it, so that it lives as long as the model."""

    def __init__(self, facts: Facts, memory: Memory = Contiguous) -> None:
        self.facts, self.memory = facts, memory
        self.calls = Calls()
        self.modules = facts.reading.modules  # the attention layers; none after the method was taken off
        self._arguments = list(inspect.signature(facts.base.forward).parameters)
        self._warned = False
        self.flat_checked = False
        self.eviction = facts.chosen.method.eviction

    def new_store(self, joins: bool = False) -> Store:
        return Store([layer.kept for layer in self.facts.layers], joins, self.memory)

    def end(self) -> None:
        """The method is taken off: no layer and no cache is served any more."""
        self.modules = []
        self.calls.clear()
        if isinstance(self.memory, Blocked):
            self.memory.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy of an extended model would share the extension, or be without."""
        raise ValueError(
            "an extended model cannot be copied, pickled or saved with torch.save; call remove() on its extension first and extend() the copy, or write the "
            "weights alone with save_pretrained"
        )

    # -- around the model with its head ----------------------------------------------------------------------------------------

    @torch.compiler.disable
    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Before it runs. Assisted decoding asks for the logits of its draft tokens, and crops what they do not confirm."""
        wanted = kwargs.get("logits_to_keep")
        args, kwargs, tokens = _marked(args, kwargs)
        if tokens is not None:
            self.calls.enter(tokens, wanted - 1 if isinstance(wanted, int) and wanted > 1 else 0, wanted)
        if wanted is not None and self.eviction is not None:  # every token is scored
            kwargs = {**kwargs, "logits_to_keep": 0}
        return args, kwargs

    @torch.compiler.disable
    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        """After it ran, head and all."""
        tokens = _tokens(args, kwargs)[1]
        call = self.calls.leave(tokens)
        if self.eviction is not None and call is not None and output is not None:
            self._score(self.eviction, call, tokens, output)
        _count(None if call is None else call.finished, output)

    def _score(self, eviction: Eviction, call: HeadCall, ids: torch.Tensor | None, output: Any) -> None:
        """What the logits say of the new tokens. The caller gets those that it wants."""
        logits, batch = getattr(output, "logits", None), call.finished
        if batch is not None and batch.store is not None:
            if ids is None or ids.is_floating_point() or logits is None:
                raise ValueError("tokens are kept by the logits that the model gave them; pass input_ids, not inputs_embeds, and leave out return_dict=False")
            batch.require_unchanged()
            batch.store.scores = turns.after(batch, ids.to(logits.device), logits, eviction)
        if logits is not None and (call.wanted is not None and not (isinstance(call.wanted, int) and call.wanted == 0)):
            output.logits = logits[:, -call.wanted :] if isinstance(call.wanted, int) else logits[:, call.wanted]

    # -- around the base model -------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def open(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Before it runs: place the store, form the batch."""
        facts, config = self.facts, self.facts.base.config
        if config._attn_implementation != facts.name:
            raise ValueError(
                "the attention implementation was changed after extend(), so the method is no longer in force; call remove(), change it, extend() again"
            )
        kwargs = {**dict(zip(self._arguments, args)), **kwargs}  # a family's second argument may be the mask or the cache
        if kwargs.get("output_attentions") or (kwargs.get("output_attentions") is None and getattr(config, "output_attentions", False)):
            raise ValueError("attention weights are never formed, so output_attentions=True cannot be served; drop it or call remove() first")
        _, kwargs, tokens = _marked((), kwargs)
        if tokens is None:
            raise ValueError("pass input_ids or inputs_embeds")
        rows, columns = tokens.shape[:2]
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            raise ValueError("attention_mask must be the 2-D padding mask [batch, tokens seen so far]; 4-D, packed and prepared masks cannot be honoured")
        store, caller = None, self.calls.caller()
        use_cache = kwargs.get("use_cache")
        if kwargs.get("past_key_values") is not None or (config.use_cache if use_cache is None else use_cache):
            kwargs["past_key_values"], store = place(kwargs.get("past_key_values"), self.new_store(), self.calls)
            self.calls.refuse_nested(store)
            drafts = getattr(getattr(facts.model, "generation_config", None), "num_assistant_tokens", None) or 0  # that this model makes for another
            kept = rows if store.asked is None else store.rows
            store.open(kept, columns, max(0 if caller is None else min(columns, caller.announced), drafts + 1 if drafts >= ROLLBACK else 0))
        if self.eviction is not None:
            self._make_room(self.eviction, store, rows, columns, mask, caller is not None)
        if store is not None and store.asked is not None:
            batch = Batch.flat(store.asked, tokens.device, store)
        else:
            batch = Batch.of(rows, columns, mask, tokens.device, store)
        if batch.past is not None and any(past.hidden for past in batch.past):
            warnings.warn(
                "attention_mask hides tokens that are in the cache: they are not seen, and all others keep the distances they were read with, "
                "whatever position_ids say",
                stacklevel=2,
            )
        if (positions := kwargs.get("position_ids")) is not None:
            check_positions(positions, batch)
        layer_kinds.refuse_shifted(facts.slot_scales, batch)
        if "position_ids" in self._arguments:  # some models scale queries by them, and pads must not count
            kwargs["position_ids"] = batch.positions(rows, tokens.device)
        self._check_length(max((g.start + g.count for g in batch.groups), default=0))
        self.calls.begin(batch, tokens, caller)
        return (), kwargs

    @torch.compiler.disable
    def close(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        """After it ran: the new tokens count, once the model that called it has finished too. A forward that raises, which has no output, changes nothing."""
        _count(self.calls.end(_tokens(args, kwargs)[1], output is not None), output)

    def _make_room(self, eviction: Eviction, store: Store | None, rows: int, columns: int, mask: torch.Tensor | None, scored: bool) -> None:
        """Before the tokens of a turn are read, those leave that it has no room for."""
        if store is None:
            eviction.before(columns, torch.zeros(0))
            return
        if not scored:
            raise ValueError("tokens are kept by the logits that the model gave them; call the model with its head, or pass use_cache=False")
        new = None if mask is None else mask[:, store.seen : store.seen + columns]
        turns.before(store, self.facts.layers, eviction, [columns] * rows if new is None else new.sum(1).tolist())

    def _check_length(self, tokens: int) -> None:
        chosen = self.facts.chosen
        if chosen.context is not None and tokens > chosen.context:
            raise ValueError(
                f"a sequence of {tokens} tokens exceeds the declared context of {chosen.context}; shorten it, or remove() and extend(model, context={tokens})"
            )
        if chosen.capacity is None or tokens <= chosen.capacity or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"a sequence of {tokens} tokens exceeds the capacity of {chosen.capacity} tokens of {chosen.method} on a trained window of "
            f"{chosen.window.tokens}: distances beyond it were never trained. Use extend(model, context={tokens})",
            stacklevel=2,
        )

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def mask(self, *, batch_size: int, q_length: int, use_vmap: bool = False, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
        """Called by the model where it builds its masks, once per kind of layer: hands out the batch of this forward."""
        if (batch := self.calls.batch) is None:
            raise ValueError(
                "a mask was asked for outside a forward of the extended model; leave out cache_implementation (static caches cannot be used), call the "
                "model itself, not its parts, and give each model its own config (copy.deepcopy)"
            )
        if not self.facts.legacy and (use_vmap or not allow_is_causal_skip):  # Falcon asks for a mask that is always materialised
            raise ValueError("packed sequences and custom masks cannot be honoured; pass one sequence per row with a 2-D attention_mask")
        return batch

    def attention(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, scaling: float | None = None,
        dropout: float = 0.0, softcap: float | None = None, s_aux: torch.Tensor | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """The attention function that every layer calls. q, k [B, H, T, D] arrive un-rotated; k, v are the new tokens only."""
        index = getattr(module, "layer_idx", None)
        if index is None or index >= len(self.modules) or self.modules[index] is not module:
            raise ValueError(
                "this attention layer does not belong to the model that was extended; give each model its own config (copy.deepcopy) and extend it itself"
            )
        batch = attention_mask
        if not isinstance(batch, Batch):
            raise ValueError("the attention mask is not the batch of this forward; pass a 2-D padding mask or none")
        batch.require_unchanged()
        if dropout:
            raise ValueError("attention dropout is not supported; call model.eval()")
        layer, memory = self.facts.layers[index], None if batch.store is None else batch.store.layers[index]
        kind, given = query.device.type, query.dtype
        autocast = torch.is_autocast_enabled(kind)
        own = self.facts.reading.entries[index].dtype if autocast else given
        kernel = kernel_for(query.device, own)
        inputs = Inputs(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, None if s_aux is None else s_aux.detach())

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if not autocast:
                return execute(layer, batch, memory, kernel, q, k, v, inputs, self.calls.watch)
            # A cache is of one dtype, whether its tokens were read under autocast or not, and exact: that of the weights, as stock's keys have it.
            # Attention computes in it too, for what is stored would have to be cast anew for every token; the result is what stock's kernel gives.
            with torch.autocast(kind, enabled=False):
                out = execute(layer, batch, memory, kernel, q.to(own), k.to(own), v.to(own), inputs, self.calls.watch)
            return out.to(torch.get_autocast_dtype(kind))

        if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
            return _ForwardOnly.apply(query, key, value, run), None
        out = run(query, key, value)
        if index == self.calls.last:
            raise Ended
        return out, None


def _tokens(args: Args, kwargs: Kwargs) -> tuple[str | None, torch.Tensor | None]:
    """The tokens of a call, and the name they are passed by; None: they are its first argument."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(tokens := kwargs.get(name), torch.Tensor):
            return name, tokens
    return None, args[0] if args and isinstance(args[0], torch.Tensor) else None


def _marked(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs, torch.Tensor | None]:
    """The tokens as an object that this call alone holds, which tells calls apart: see Calls."""
    name, tokens = _tokens(args, kwargs)
    if tokens is None:
        return args, kwargs, None
    own = tokens.view_as(tokens)
    return (args, {**kwargs, name: own}, own) if name is not None else ((own, *args[1:]), kwargs, own)


def _count(batch: Batch | None, output: Any) -> None:
    if output is not None and batch is not None and batch.store is not None:
        batch.require_unchanged()
        batch.store.advance(batch.real, batch.columns, batch.past, batch.counts)


class _ForwardOnly(torch.autograd.Function):
    """Lets a forward run with gradients on; a backward pass raises, for the gradient through the merge would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Callable[..., torch.Tensor]) -> torch.Tensor:
        return run(q, k, v)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("Longreach extends models at inference; call extension.remove() before training, or wrap the forward in torch.no_grad()")
