"""extend(): attach a method to one model instance, and take it off again.

The only room that knows Transformers' forward. Four pieces, all per instance and reversible: the identity in place of the rotary
module, one attention function (the executor), one mask function under the same name (it returns the plan of the forward), and a
forward pre-hook that places our store into the cache and opens the plan.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from longreach import configs
from longreach.core.differences import relative
from longreach.core.encodings import Alibi, Rotary, exact_device
from longreach.engine import batch
from longreach.engine.batch import Plan
from longreach.engine.executor import Inputs, Layer, execute
from longreach.hf import documents, frequencies, layer_kinds, legacy, registration, selfcheck
from longreach.hf import rotary as probe
from longreach.hf.cache import keep_in_generation, place
from longreach.hf.checks import Inexact, check_arguments, check_positions, configs_of, find_base
from longreach.hf.documents import Document, Entry
from longreach.hf.placement import device_of
from longreach.hf.registration import Forwards
from longreach.hf.rotary import IdentityRotary, Seen
from longreach.kernels import backend_for
from longreach.memory.store import ROLLBACK, Store
from longreach.methods.base import Method
from longreach.methods.stock import Stock
from longreach.planning import dial
from longreach.quantities import counted, token_count

logger = logging.getLogger("longreach")
_numbers = itertools.count(1)  # one attention name per extension, so that two extended models do not meet

PROBE_POSITIONS = (0, 1, 2, 3, 5, 8, 13, 21, 30, 34, 41, 55)


@dataclass(frozen=True)
class Exactness:
    """Measured on this model at attach time, on 12 tokens with neutral parameters.

    rotary        q and k of every layer: our rotation against the model's own; of a legacy family, the output of every attention layer. Relative to the
                  largest value.
    logits        against the stock model's eager code in fp32, relative to the largest logit. In half precision against the same weights computed in
                  fp32, root mean square over that of the logits; where that cannot be, against the nearer stock kernel.
    layers        half precision: the same of the attention layers, each on the input that it has in the stock model; the largest.
    stock_logits, stock_layers  what the better of the stock kernels (eager, sdpa) has of these errors by itself.
    """

    rotary: float
    logits: float
    what: str = "rotation"  # "attention" of a legacy family
    layers: float | None = None
    stock_logits: float | None = None
    stock_layers: float | None = None
    dtype: str = "float32"
    without: str = ""  # half precision: why there is nothing in fp32 to compare with

    def __str__(self) -> str:
        text = f"{self.what} {self.rotary:.1e}, logits {self.logits:.1e}"
        if self.layers is None:
            return f"{text} (largest relative difference to the stock model on {len(PROBE_POSITIONS)} tokens)"
        if self.stock_logits is None or self.stock_layers is None:
            return f"{text}, a layer {self.layers:.1e} (relative difference to the nearer stock kernel: rounding of {self.dtype}; {self.without})"
        return (
            f"{text} where stock itself has {self.stock_logits:.1e}, a layer {self.layers:.1e} where stock has {self.stock_layers:.1e} (relative error against "
            f"the same weights in fp32, on {len(PROBE_POSITIONS)} tokens: rounding of {self.dtype})"
        )


def extend(
    model: PreTrainedModel,
    method: Method | None = None,
    *,
    context: int | str | None = None,
    trained_window: int | str | None = None,
    backend: str = "auto",
) -> Extension:
    """Make `model` usable at a longer context, without training.

    method          a method with its parameters; if None, the dial chooses one for `context`.
    context         the largest number of tokens of a sequence, new tokens included, such as 16384 or "16k". Longer input raises.
    trained_window  overrides the trained window read from the configuration.
    backend         "auto", or "reference" for the dense truth: slow, for checking.

    Raises ValueError, with the fix, if the method cannot apply to this model or context. A model may be wrapped by torch.compile or PEFT,
    before or after.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile calls the model that it wraps, and so sees what is attached to it
    tokens = None if context is None else token_count(context), None if trained_window is None else token_count(trained_window, "trained_window")
    return Extension(model, method, context=tokens[0], trained_window=tokens[1], backend=backend)


class Extension:
    """A method attached to a model. `remove()` or the end of a `with` block takes it off; the model is then as before."""

    def __init__(self, model: PreTrainedModel, method: Method | None, *, context: int | None, trained_window: int | None, backend: str) -> None:
        if isinstance(method, int):
            raise ValueError(f"pass a declared context by name: extend(model, context={method})")
        if method is not None and not isinstance(method, Method):
            raise ValueError(f"{method!r} is not a method; pass for example longreach.SelfExtend(group_size=8, window=64), or context=N alone")
        if method is None and context is None:
            raise ValueError("pass context=N, the number of tokens you want to use, or a method such as longreach.LMInfinite(n_local=512)")
        if backend not in ("auto", "reference"):
            raise ValueError(f"backend must be 'auto' or 'reference', not {backend!r}")
        self.model = model
        self.base = find_base(model)
        self._legacy = legacy.seam_of(model)
        self._alibi: Alibi | None = None
        self.config = self.base.config
        configs.refuse_unsupported(self.config)
        self.window = configs.trained_window(self.config, trained_window)
        self.choice: dial.Choice | None = None
        if method is None:
            assert context is not None
            weight = next(model.parameters())
            self.choice = dial.choose(self.window, context, dial.budget(self.config, weight.dtype, weight.device))
            method = self.choice.method
        self.method = method
        self.context = context
        if method.needs_context and context is None:
            raise ValueError(
                f"{method.name} fixes its frequencies once for a whole sequence, from the declared context; pass context=N (--context N), "
                "the prompt plus the new tokens"
            )
        self.capacity = context if method.needs_context else method.capacity(self.window.tokens)
        self._check_capacity()
        self._dense = backend == "reference"
        if self._dense and exact_device(device_of(model)) != device_of(model):
            raise ValueError(f"the dense truth is computed in fp64, which {device_of(model).type} does not have; move the model to 'cpu' or leave out backend")
        self.owner = Forwards()
        self._warned = False
        self._remark: str | None = None  # what a user should know about this method on this model
        self._ready = False  # False while the model is probed and measured
        self._configs = [(config, config._attn_implementation_internal) for config in configs_of(model)]
        registration.refuse_taken(config for config, _ in self._configs)
        self._name = f"{registration.PREFIX}{next(_numbers)}"
        self._argument_names = list(inspect.signature(self.base.forward).parameters)
        self._hooks: list[Any] = []
        self._undo: Callable[[], Any] = lambda: None
        self._attached = False
        self._attach()
        logger.info("%s", self.describe())

    # -- attaching ------------------------------------------------------------------------------------------------------------

    def _check_capacity(self) -> None:
        if self.context is not None and self.capacity is not None and self.context > self.capacity:
            raise ValueError(
                f"{self.method} reaches {self.capacity} tokens on a trained window of {self.window.tokens}, less than the declared context of "
                f"{self.context}; use extend(model, context={self.context}) to have the parameters chosen"
            )

    def _attach(self) -> None:
        if self._legacy is None:
            self._original = self.base.rotary_emb
            self._identity = IdentityRotary(self._original)
            self._identity.train(self._original.training)
        registration.register(self._name, self._attention, self._mask)
        self._unregister = weakref.finalize(self, registration.unregister, self._name, self._configs)  # for those that are dropped, not removed
        self._unregister.atexit = False
        device = device_of(self.model)
        try:
            with probe.evaluation(self.model, device):
                if self._legacy is None:
                    self._probe()
                else:
                    self._probe_legacy(self._legacy)
            self._settle()
            self._hooks = [
                self.base.register_forward_pre_hook(self._open, with_kwargs=True),
                self.base.register_forward_hook(self._close, with_kwargs=True, always_call=True),
            ]
            if (outer := _caller_of(self.model, self.base)) is not None:
                self._hooks += [
                    outer.register_forward_pre_hook(self._enter, with_kwargs=True),
                    outer.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
                ]
                self._undo = keep_in_generation(outer)
            self._attached = True
            if self._legacy is None:
                registration.uncompile(self._modules)
            with probe.evaluation(self.model, device):
                self._measure()
            self.layers = self._final_layers()
        except BaseException:
            self.remove()
            for config, implementation in self._configs:  # the probe may have stopped while another implementation was set
                config._attn_implementation_internal = implementation
            raise
        self._ready = True

    def _use_our_attention(self) -> None:
        self.model.set_attn_implementation(self._name)
        if self.config._attn_implementation != self._name:
            raise ValueError(
                f"{type(self.base).__name__} does not use Transformers' attention interface, so no method can be attached to it; "
                "use a model whose attention goes through it (Llama, Qwen, Mistral, Gemma, Phi, GPT-NeoX and most newer ones)"
            )

    def _probe(self) -> None:
        """Read and verify every layer's rotary, and which layers slide."""
        device = device_of(self.model)
        original = configs.original_window(self.config)
        positions = torch.tensor([[p for p in PROBE_POSITIONS if p < original]], device=device)
        n = positions.shape[1]
        generator = torch.Generator().manual_seed(0)
        self._probe_ids = torch.randint(0, self.config.vocab_size, (1, n), generator=generator).to(device)
        inputs = {"input_ids": self._probe_ids, "position_ids": positions, "use_cache": False}
        self.base.rotary_emb = self._identity
        self._use_our_attention()
        turned, record = self._listen(inputs, keep_original=True)
        raw, _ = self._listen(inputs, keep_original=False)
        if len(raw) != self.config.num_hidden_layers or len(raw) != len(turned):
            raise ValueError(
                f"attention was seen in {len(raw)} of {self.config.num_hidden_layers} layers of {type(self.base).__name__}; "
                "a model with other kinds of layers is not supported, use it without extend()"
            )
        tables = {key: (cos, sin) for key, cos, sin in record}
        read = {key: probe.frequencies(self._identity.probed, key, positions) for key in tables}
        dtype = self._dtype = raw[0].q.dtype
        kinds = configs.layer_types(self.config)
        self._keys: list[probe.Key] = []
        self._rotaries: list[Rotary | None] = []
        worst = 0.0
        for index, (a, b) in enumerate(zip(raw, turned, strict=True)):
            check_arguments(index, a)
            self._require_finite(f"the queries or keys of layer {index}", a.q, a.k, b.q, b.k)
            key, found, difference = probe.match(a, b, tables, read, kinds[index])
            if not difference <= (2e-2 if dtype in selfcheck.HALVES else 1e-4):
                raise ValueError(
                    f"layer {index} of {type(self.base).__name__} applies its rotary in a way we do not know (off by {difference:.1e}), "
                    "or changes q and k after it, as a norm with weights does; use the model without extend()"
                )
            worst = max(worst, difference)
            same = (r for k, r in zip(self._keys, self._rotaries) if k == key and r is not None and found is not None and r.same_as(found))
            self._keys.append(key)
            self._rotaries.append(next(same, found))
        if all(found is None for found in self._rotaries):
            raise ValueError(f"no layer of {type(self.base).__name__} rotates its keys, so there are no positions to extend; use it as it is")
        self._worst_rotary = worst
        self._modules = [seen.module for seen in raw]
        self._stock = self._stock_runs(["sdpa", "eager"] if dtype in selfcheck.HALVES and self.base._supports_sdpa else ["eager"])
        self.entries = [Entry(seen.k.shape[1], seen.k.shape[-1], seen.v.shape[-1], seen.k.dtype, seen.k.device) for seen in raw]
        self._slot_scales = layer_kinds.slot_scales(self._modules)
        self._trained = [layer_kinds.as_trained(self.config, index, seen) for index, seen in enumerate(raw)]
        uniform = all(trained.sliding_window is not None for trained in self._trained)
        self._overrides_sliding = uniform and not isinstance(self.method, Stock)
        self._methods = configs.methods_of(self._trained, self.method)

    def _settle(self) -> None:
        """Where the layers that take the method encode no positions, its distances mean nothing: choose plain attention, refuse, or say so."""
        name, covered = type(self.base).__name__, [i for i, m in enumerate(self._methods) if m is self.method]
        layer_kinds.refuse_uncovered(name, self.method, covered)
        if covered and self._alibi is None and all(self._rotaries[i] is None for i in covered):
            if self.choice is not None:
                reason = f"the layers that see everything encode no positions, so no distance of {self.context} tokens is untrained: plain attention"
                self.choice = replace(self.choice, method=Stock(), reason=reason, warning=None)
                self.method, self.capacity = self.choice.method, None
                self._methods = [self.method if i in covered else m for i, m in enumerate(self._methods)]
            elif not isinstance(self.method, Stock):
                layer_kinds.refuse_unrotated(name, self.method)
                self._remark = layer_kinds.unrotated_remark(covered)
        if self.choice is not None and self.choice.warning:
            self._remark = self.choice.warning
        if self._remark:
            warnings.warn(self._remark, stacklevel=5)

    def _probe_legacy(self, seam: legacy.LegacySeam) -> None:
        """Listen to every layer of the stock model, read how it encodes positions, and put our attention in place of its own."""
        device = device_of(self.model)
        positions = torch.arange(min(len(PROBE_POSITIONS), self.window.tokens), device=device)
        generator = torch.Generator().manual_seed(0)
        self._probe_ids = torch.randint(0, self.config.vocab_size, (1, positions.numel()), generator=generator).to(device)
        rotary, self._alibi = seam.family.encoding(self.base, seam.modules, positions)
        if rotary is None and self.method.rescales:
            raise ValueError(
                "the positions of this model are the biases of ALiBi, so there are no rotary frequencies to change; use a method of positions, such as "
                "SelfExtend or LMInfinite"
            )
        if (implementation := seam.family.definition(self.base)) is not None:
            self.config._attn_implementation_internal = implementation
        self._modules = seam.modules
        self._dtype = self.base.get_input_embeddings()(self._probe_ids[:, :1]).dtype
        self._stock = self._stock_runs([self.config._attn_implementation])
        self._keys = [None for _ in seam.modules]
        self._rotaries = [rotary for _ in seam.modules]
        heard = [seam.family.project(module, selfcheck.hidden(given)) for module, given in zip(seam.modules, self._stock.first.inputs, strict=True)]
        self.entries = [Entry(k.shape[1], k.shape[-1], v.shape[-1], k.dtype, k.device) for _, k, v in heard]
        self._slot_scales = layer_kinds.slot_scales(self._modules)
        self._trained, self._overrides_sliding = [Stock() for _ in seam.modules], False
        self._methods = [self.method for _ in seam.modules]
        for config, _ in self._configs:  # set_attn_implementation declines models of these families
            config._attn_implementation_internal = self._name
        seam.install(self._attention)

    def _listen(self, inputs: dict[str, Any], keep_original: bool) -> tuple[list[Seen], list[tuple[probe.Key, torch.Tensor, torch.Tensor]]]:
        """One forward in which every attention layer reports its q and k and returns its values."""
        seen: list[Seen] = []
        self.owner.seen = seen
        self._identity.record = [] if keep_original else None
        try:
            self.base(**inputs)
            return seen, self._identity.record or []
        finally:
            self.owner.seen = self._identity.record = None

    def _logits(self) -> torch.Tensor:
        """Of the probe. The base and the head are called, not what is around them: that may be compiled, cast, or a head that pools."""
        hidden = self.base(input_ids=self._probe_ids, use_cache=False)[0]
        head = self.model.get_output_embeddings()
        return hidden if head is None else torch.as_tensor(head(hidden))

    @contextmanager
    def _stock_attention(self, name: str) -> Iterator[None]:
        """The stock model with one of its kernels. A legacy family still has its own."""
        if self._legacy is not None:
            yield
            return
        self._identity.record = []
        self.model.set_attn_implementation(name)
        try:
            yield
        finally:
            self._identity.record = None
            self._use_our_attention()

    def _stock_runs(self, names: Sequence[str]) -> selfcheck.Stock:
        """The stock model on the probe: under eager attention, which is its definition, and in half precision under each kernel and in fp32 too."""
        kernels: dict[str, selfcheck.Run] = {}
        for name in names:
            inputs = next(iter(kernels.values())).inputs if kernels else None
            with self._stock_attention(name):
                run = selfcheck.observe(self._modules, self._logits, inputs)
            if run.finite:
                kernels[name] = run
        if not kernels:
            self._require_finite("the logits of the stock model itself", run.logits * float("nan"))
        found = selfcheck.Stock(kernels)
        if self._dtype not in selfcheck.HALVES:
            return found
        with self._stock_attention("eager"):
            return replace(found, **selfcheck.truth(self.model, self._modules, self._logits, found.first.inputs))

    def _require_finite(self, what: str, *tensors: torch.Tensor) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            name = str(self._dtype).removeprefix("torch.")
            fix = "load the model with sound weights" if self._dtype not in selfcheck.HALVES else "load the model with dtype=torch.float32"
            if self._dtype == torch.float16:
                name, fix = "float16, where values beyond 65504 overflow", "load the model with dtype=torch.bfloat16 or torch.float32"
            raise ValueError(f"{what} are NaN or infinite in {name}, so there is nothing to extend; {fix}")

    def _measure(self) -> None:
        """Logits of the engine with neutral parameters, at the frequencies the stock forward used, against the stock model."""
        self.layers = [Layer(i, t, r, alibi=self._alibi) for i, (t, r) in enumerate(zip(self._trained, self._rotaries, strict=True))]
        ours = selfcheck.observe(self._modules, self._logits, self._stock.first.inputs)
        what = "rotation" if self._legacy is None else "attention"
        if self._dtype in selfcheck.HALVES:
            errors = selfcheck.judge(ours, self._stock, torch.finfo(self._dtype).eps / 2)
            rotary, passed = self._worst_rotary if self._legacy is None else errors.layer, errors.passed
            by_layer, dtype = errors.layer, str(self._dtype).removeprefix("torch.")
            found = Exactness(rotary, errors.logits, what, errors.layer, errors.stock_logits, errors.stock_layer, dtype, self._stock.without)
        else:
            by_layer = max(relative(a, b) for a, b in zip(ours.outputs, self._stock.first.outputs, strict=True))
            rotary = self._worst_rotary if self._legacy is None else by_layer
            found = Exactness(rotary, relative(ours.logits, self._stock.first.logits), what)
            passed = found.logits < 1e-3 and by_layer < 1e-3 and rotary < 1e-4  # a fault of one layer may be small in the logits
        if not passed:
            raise Inexact(
                f"with neutral parameters {type(self.base).__name__} differs from the stock model by {found.logits:.1e} (a layer by {by_layer:.1e}); "
                "its attention does something we do not know, use it without extend()"
            )
        self.exactness = found
        del self._stock

    def _final_layers(self) -> list[Layer]:
        """Every layer with its method, and with what it rotates with while that is in force."""
        fixed: dict[tuple[int, Method], Rotary | None] = {}  # one object per kind of layer, so that layers share their tables
        for key, found, method in zip(self._keys, self._rotaries, self._methods, strict=True):
            if (id(found), method) not in fixed:
                rotary = None if found is None else frequencies.fixed(self.config, key, found, method, self.window, self.context)
                fixed[id(found), method] = rotary
        return [Layer(i, m, fixed[id(r), m], self._dense, self._alibi) for i, (r, m) in enumerate(zip(self._rotaries, self._methods, strict=True))]

    # -- one forward ----------------------------------------------------------------------------------------------------------

    def new_store(self) -> Store:
        return Store([layer.forms for layer in self.layers], self.owner)

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the model with its head runs. Assisted decoding asks for the logits of its draft tokens, and crops what they do not confirm."""
        wanted = kwargs.get("logits_to_keep")
        args, kwargs, tokens = self._marked(args, dict(kwargs))
        if tokens is not None:
            self.owner.enter(tokens, wanted - 1 if isinstance(wanted, int) and wanted > 1 else 0)
        return args, kwargs

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After it ran, head and all."""
        self._count(self.owner.leave(_tokens_of(args, kwargs)), output)

    def _marked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor | None]:
        """The tokens as an object that this call alone holds, which tells calls apart: see Forwards."""
        for name in ("input_ids", "inputs_embeds"):
            if isinstance(tokens := kwargs.get(name), torch.Tensor):
                kwargs[name] = tokens.view_as(tokens)
                return args, kwargs, kwargs[name]
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].view_as(args[0]), *args[1:])
            return args, kwargs, args[0]
        return args, kwargs, None

    @torch.compiler.disable
    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the base model runs: place the store, plan the forward."""
        if self.config._attn_implementation != self._name:
            raise ValueError(
                "the attention implementation was changed after extend(), so the method is no longer in force; call remove(), change it, extend() again"
            )
        kwargs = {**dict(zip(self._argument_names, args)), **kwargs}  # a family's second argument may be the mask or the cache
        if kwargs.get("output_attentions") or (kwargs.get("output_attentions") is None and getattr(self.config, "output_attentions", False)):
            raise ValueError("attention weights are never formed, so output_attentions=True cannot be served; drop it or call remove() first")
        _, kwargs, tokens = self._marked((), kwargs)
        if tokens is None:
            raise ValueError("pass input_ids or inputs_embeds")
        rows, columns = tokens.shape[:2]
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            raise ValueError("attention_mask must be the 2-D padding mask [batch, tokens seen so far]; 4-D, packed and prepared masks cannot be honoured")
        store, caller = None, self.owner.caller()
        use_cache = kwargs.get("use_cache")
        if kwargs.get("past_key_values") is not None or (self.config.use_cache if use_cache is None else use_cache):
            kwargs["past_key_values"], store = place(kwargs.get("past_key_values"), self.new_store())
            self.owner.refuse_nested(store)
            drafts = getattr(getattr(self.model, "generation_config", None), "num_assistant_tokens", None) or 0  # that this model makes for another
            store.open(rows, columns, max(0 if caller is None else min(columns, caller.announced), drafts + 1 if drafts >= ROLLBACK else 0))
        plan = batch.plan(rows, columns, mask, tokens.device, store)
        if plan.past is not None and any(past.hidden for past in plan.past):
            warnings.warn(
                "attention_mask hides tokens that are in the cache: they are not seen, and all others keep the distances they were read with, "
                "whatever position_ids say",
                stacklevel=2,
            )
        if (positions := kwargs.get("position_ids")) is not None:
            check_positions(positions, plan)
        layer_kinds.refuse_shifted(self._slot_scales, plan)
        if "position_ids" in self._argument_names:  # some models scale queries by them, and pads must not count
            kwargs["position_ids"] = plan.positions(rows, tokens.device)
        self._check_length(max((g.start + g.count for g in plan.groups), default=0))
        self.owner.begin(plan, tokens, caller)
        return (), kwargs

    @torch.compiler.disable
    def _close(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After it ran: the new tokens count, once the model that called it has finished too. A forward that raises, which has no output, changes nothing."""
        self._count(self.owner.end(_tokens_of(args, kwargs), output is not None), output)

    def _count(self, plan: Plan | None, output: Any) -> None:
        if output is not None and plan is not None and plan.store is not None:
            plan.require_unchanged()
            plan.store.advance(plan.real, plan.columns, plan.past)

    def _check_length(self, tokens: int) -> None:
        if not self._ready:
            return
        if self.context is not None and tokens > self.context:
            raise ValueError(
                f"a sequence of {tokens} tokens exceeds the declared context of {self.context}; shorten it, or remove() and extend(model, context={tokens})"
            )
        if self.capacity is None or tokens <= self.capacity:
            return
        sentence = f"a sequence of {tokens} tokens exceeds the capacity of {self.capacity} tokens of {self.method} on a trained window of {self.window.tokens}"
        if not self._warned:
            self._warned = True
            warnings.warn(f"{sentence}: distances beyond it were never trained. Use extend(model, context={tokens})", stacklevel=2)

    def _mask(self, *, batch_size: int, q_length: int, use_vmap: bool = False, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
        """Called by the model where it builds its masks, once per kind of layer: hands out the plan of this forward."""
        if self.owner.seen is not None:
            return None
        if (plan := self.owner.plan) is None:
            raise ValueError(
                "a mask was asked for outside a forward of the extended model; leave out cache_implementation (static caches cannot be used), call the "
                "model itself, not its parts, and give each model its own config (copy.deepcopy)"
            )
        if self._legacy is None and (use_vmap or not allow_is_causal_skip):  # Falcon asks for a mask that is always materialised
            raise ValueError("packed sequences and custom masks cannot be honoured; pass one sequence per row with a 2-D attention_mask")
        return plan

    def _attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """The attention function that every layer calls. q, k [B, H, T, D] arrive un-rotated; k, v are the new tokens only."""
        if self.owner.seen is not None:
            extra = {"softcap": softcap, "s_aux": s_aux, **kwargs}
            self.owner.seen.append(Seen(module, query.detach(), key.detach(), value.detach(), extra))
            return value.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(1, 2).contiguous(), None
        index = getattr(module, "layer_idx", None)
        if not self._attached or index is None or index >= len(self._modules) or self._modules[index] is not module:
            raise ValueError(
                "this attention layer does not belong to the model that was extended; give each model its own config (copy.deepcopy) and extend it itself"
            )
        plan = attention_mask
        if not isinstance(plan, Plan):
            raise ValueError("the attention mask is not the plan of this forward; pass a 2-D padding mask or none")
        plan.require_unchanged()
        if dropout:
            raise ValueError("attention dropout is not supported; call model.eval()")
        store = None if plan.store is None else plan.store.layers[index]
        kind, given = query.device.type, query.dtype
        autocast = torch.is_autocast_enabled(kind)
        own = self.entries[index].dtype if autocast else given
        backend = backend_for(query.device, own)
        inputs = Inputs(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, None if s_aux is None else s_aux.detach())

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if not autocast:
                return execute(self.layers[index], plan, store, backend, q, k, v, inputs)
            # A cache is of one dtype, whether its tokens were read under autocast or not, and exact: that of the weights, as stock's keys have it.
            # Attention computes in it too, for what is stored would have to be cast anew for every token; the result is what stock's kernel gives.
            with torch.autocast(kind, enabled=False):
                out = execute(self.layers[index], plan, store, backend, q.to(own), k.to(own), v.to(own), inputs)
            return out.to(torch.get_autocast_dtype(kind))

        if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
            return _ForwardOnly.apply(query, key, value, run), None
        return run(query, key, value), None

    # -- documents ----------------------------------------------------------------------------------------------------------------

    def save(self, cache: Any, file: str | Path, ids: Any = None, *, notes: Mapping[str, str] | None = None) -> None:
        """Write what `cache` has read to one safetensors file, all of it or nothing; see `documents.save`."""
        documents.save(self, cache, Path(file), ids, notes or {})

    def load(self, file: str | Path, *, max_bytes: int = documents.LARGEST_FILE) -> Document:
        """What was saved: its cache, ids and mask. Raises ValueError, with the fix, if the file does not belong to this extension."""
        return documents.load(self, Path(file), max_bytes)

    def fork(self, cache: Any) -> DynamicCache:
        """A second cache that goes on from the same place, independently. Memory is shared until one of the two writes; it then copies."""
        return documents.fork(self, cache)

    def device_of_layer(self, index: int) -> torch.device:
        """Where a layer computes, and so keeps its keys and values."""
        weight = next(self._modules[index].parameters())
        return self.entries[index].device if weight.is_meta else weight.device

    # -- people -----------------------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """What was attached, as plain data."""
        weight = self.model.get_input_embeddings().weight
        dtype = weight.dtype if weight.is_floating_point() else self.entries[0].dtype
        ours = [i for i, m in enumerate(self._methods) if m is self.method]
        rescaled = [i for i in ours if self.method.rescales and self._rotaries[i] is not None]
        before, after = (self._rotaries[rescaled[0]], self.layers[rescaled[0]].rotary) if rescaled else (None, None)
        return {
            "method": self.method.to_json(),
            "frequencies": None if before is None or after is None else frequencies.change(before, after),
            "context": self.context,
            "capacity": self.capacity,
            "trained_window": self.window.tokens,
            "trained_window_reason": self.window.reason,
            "reason": self.choice.reason if self.choice else "given",
            "warning": self._remark,
            "recalls": self.method.recalls,
            "layers": len(self._methods),
            "layers_with_method": ours,
            "encoding": "rotary" if self._alibi is None else "alibi",
            "layers_in_chunks": [i for i, m in enumerate(self._methods) if isinstance(m, Stock) and m is not self.method and m.attention_chunk],
            "layers_without_positions": [i for i, r in enumerate(self._rotaries) if r is None and self._alibi is None],
            "sliding_window_overridden": self._overrides_sliding,
            "backend": "dense reference" if self._dense else backend_for(device_of(self.model), dtype).name,
            "dtype": str(dtype).removeprefix("torch."),
            "exactness": {name: getattr(self.exactness, name) for name in ("rotary", "logits", "layers", "stock_logits", "stock_layers")},
        }

    def describe(self) -> str:
        """Method, parameters, layers, capacity, backend and measured exactness, in words."""
        r = self.report()
        ours = r["layers_with_method"]
        others = "sliding" if not r["layers_in_chunks"] else "chunked" if len(ours) + len(r["layers_in_chunks"]) == r["layers"] else "sliding and chunked"
        layers = f"all {r['layers']}" if len(ours) == r["layers"] else f"{len(ours)} of {r['layers']} ({ours}); the {others} ones as trained"
        if r["sliding_window_overridden"]:
            layers += f"; their sliding window of {self._trained[0].sliding_window} is replaced by the method"
        if r["layers_without_positions"]:
            layers += f"; layers without positions: {r['layers_without_positions']}"
        lines = [
            f"method      {self.method}",
            f"recalls     {r['recalls']}",
            f"window      {self.window.tokens} trained ({self.window.reason})",
            f"context     {'not declared' if self.context is None else counted(self.context, 'token') + ' declared'}",
            f"capacity    {'unlimited' if self.capacity is None else counted(self.capacity, 'token')}",
            f"layers      {layers}",
            f"backend     {r['backend']}, {r['dtype']}",
            f"exactness   {self.exactness}",
            f"reason      {r['reason']}",
        ]
        if r["frequencies"]:
            fastest, slowest = r["frequencies"]["divided_by"]
            factor = r["frequencies"]["attention_factor"]
            lines.insert(2, f"frequencies divided by {fastest:.4g} (fastest pair) to {slowest:.4g} (slowest pair), cos and sin times {factor:.5g}")
        if self._alibi is not None:
            lines.insert(2, f"encoding    ALiBi, slopes from {self._alibi.slopes.max():.4g} to {self._alibi.slopes.min():.4g}")
        if r["warning"]:
            lines.append(f"warning     {r['warning']}")
        return "\n".join(lines)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy of an extended model would share the extension, or be without."""
        raise ValueError(
            "an extended model cannot be copied, pickled or saved with torch.save; call remove() on its extension first and extend() the copy, or write the "
            "weights alone with save_pretrained"
        )

    def __repr__(self) -> str:
        return f"Extension({self.method}, {'attached' if self._attached else 'removed'})"

    def remove(self) -> None:
        """Take the method off; the model is bit-identical to before. Safe to call twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._undo()
        if self._legacy is not None:
            self._legacy.remove()
        else:
            registration.restore(getattr(self, "_modules", ()))
            if self.base.rotary_emb is self._identity:
                self.base.rotary_emb = self._original
        self._unregister()
        self._attached = self._ready = False
        self.owner.open, self.owner.calls = [], []

    def __enter__(self) -> Extension:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    found = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), args[0] if args else None)
    return found if isinstance(found, torch.Tensor) else None


def _caller_of(model: nn.Module, base: nn.Module) -> nn.Module | None:
    """The model that calls the base model and puts a head on it; None of a bare base model."""
    around = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not base and any(inner is base for inner in m.modules())]
    return around[-1] if around else None


class _ForwardOnly(torch.autograd.Function):
    """Lets a forward run with gradients on; a backward pass raises, for the gradient through the merge would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Callable[..., torch.Tensor]) -> torch.Tensor:
        return run(q, k, v)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("Longreach extends models at inference; call extension.remove() before training, or wrap the forward in torch.no_grad()")
