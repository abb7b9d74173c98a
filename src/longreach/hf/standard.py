"""Families whose attention goes through Transformers' attention interface: nearly all with rotary positions.

The identity stands in for their rotary module, so that q and k reach us un-rotated, and our attention function is set by its name. What their
layers do is read from two short forwards. Knows Transformers' interface and rotary modules; nothing about methods, stores or caches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from longreach import configs
from longreach.core.encodings import Rotary
from longreach.hf import layer_kinds, registration, rotary, selfcheck
from longreach.hf.checks import check_arguments
from longreach.hf.facts import PROBE_POSITIONS, Entry, Reading
from longreach.hf.rotary import IdentityRotary, Key, Seen


class Listener:
    """The attention and mask functions of a forward in which every layer reports its q, k, v and returns its values."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def mask(self, **kwargs: Any) -> None:
        return None

    def attention(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: Any = None, dropout: float = 0.0, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        self.seen.append(Seen(module, q.detach(), k.detach(), v.detach(), kwargs))
        return v.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(1, 2).contiguous(), None


class StandardSeam:
    legacy: ClassVar[bool] = False

    def __init__(self, model: Any, base: Any, name: str, before: registration.Configs) -> None:
        self.model, self.base, self.name, self.before = model, base, name, before
        self.original: nn.Module = base.rotary_emb
        self.identity = IdentityRotary(self.original)
        self.identity.train(self.original.training)
        self._uncompiled: Sequence[Any] = ()

    def probe(self, window: int) -> torch.Tensor:
        original = configs.original_window(self.base.config, otherwise=window)
        return torch.tensor([p for p in PROBE_POSITIONS if p < original])

    def read(self, ids: torch.Tensor, positions: torch.Tensor) -> Reading:
        """Verify every layer's rotary, and see which layers slide."""
        config, name, identity = self.base.config, type(self.base).__name__, self.identity
        inputs = {"input_ids": ids, "position_ids": positions[None], "use_cache": False}
        turned, tables = self._listen(inputs, keep_original=True)
        raw, _ = self._listen(inputs, keep_original=False)
        if len(raw) != config.num_hidden_layers or len(raw) != len(turned):
            raise ValueError(
                f"attention was seen in {len(raw)} of {config.num_hidden_layers} layers of {name}; "
                "a model with other kinds of layers is not supported, use it without extend()"
            )
        encodings = {key: rotary.frequencies(identity.probed, key, positions[None]) for key in tables}
        dtype = raw[0].q.dtype
        kinds = configs.layer_types(config)
        keys: list[Key] = []
        rotaries: list[Rotary | None] = []
        worst = 0.0
        for index, (a, b) in enumerate(zip(raw, turned, strict=True)):
            check_arguments(index, a)
            selfcheck.require_finite(f"the queries or keys of layer {index}", dtype, a.q, a.k, b.q, b.k)
            key, found, difference = rotary.match(a, b, tables, encodings, kinds[index])
            if not difference <= (2e-2 if dtype in selfcheck.HALVES else 1e-4):
                raise ValueError(
                    f"layer {index} of {name} applies its rotary in a way we do not know (off by {difference:.1e}), "
                    "or changes q and k after it, as a norm with weights does; use the model without extend()"
                )
            worst = max(worst, difference)
            same = (r for k, r in zip(keys, rotaries) if k == key and r is not None and found is not None and r.same_as(found))
            keys.append(key)
            rotaries.append(next(same, found))
        if all(found is None for found in rotaries):
            raise ValueError(f"no layer of {name} rotates its keys, so there are no positions to extend; use it as it is")
        trained = [layer_kinds.as_trained(config, index, seen) for index, seen in enumerate(raw)]
        entries = [Entry(seen.k.shape[1], seen.k.shape[-1], seen.v.shape[-1], seen.k.dtype, seen.k.device, seen.q.shape[1]) for seen in raw]
        return Reading([seen.module for seen in raw], keys, rotaries, None, trained, entries, dtype, worst)

    def _listen(self, inputs: dict[str, Any], keep_original: bool) -> tuple[list[Seen], dict[Key, tuple[torch.Tensor, torch.Tensor]]]:
        """-> what the layers reported, and the cos and sin that the rotary module made for them."""
        listener = Listener()
        registration.register(self.name, listener)
        self.identity.record = [] if keep_original else None
        try:
            self._take()
            self.base(**inputs)
            return listener.seen, {key: (cos, sin) for key, cos, sin in self.identity.record or []}
        finally:
            self.identity.record = None
            self.remove()
            registration.unregister(self.name)

    def kernels(self, reading: Reading) -> Sequence[str]:
        return ["sdpa", "eager"] if reading.dtype in selfcheck.HALVES and self.base._supports_sdpa else ["eager"]

    @contextmanager
    def stock(self, kernel: str) -> Iterator[None]:
        self.base.rotary_emb = copy.deepcopy(self.original)  # some rotary modules change with what they see
        try:
            self.model.set_attn_implementation(kernel)
            yield
        finally:
            self.base.rotary_emb = self.original
            registration.set_back(self.before)

    def install(self, attend: Any, modules: Sequence[Any]) -> None:
        self._take()
        self._uncompiled = modules
        registration.uncompile(modules)

    def _take(self) -> None:
        """The identity in place of the rotary module, and our function in that of attention."""
        self.base.rotary_emb = self.identity
        self.model.set_attn_implementation(self.name)
        if self.base.config._attn_implementation != self.name:
            raise ValueError(
                f"{type(self.base).__name__} does not use Transformers' attention interface, so no method can be attached to it; "
                "use a model whose attention goes through it (Llama, Qwen, Mistral, Gemma, Phi, GPT-NeoX and most newer ones)"
            )

    def remove(self) -> None:
        registration.restore(self._uncompiled)
        self._uncompiled = ()
        if self.base.rotary_emb is self.identity:
            self.base.rotary_emb = self.original
        registration.set_back(self.before, self.name)
