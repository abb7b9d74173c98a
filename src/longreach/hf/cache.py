"""Our store in the shape of a Transformers cache: placed into an empty `DynamicCache`, so that `generate` works unchanged.

Knows Transformers' cache contract and the store; nothing about attention. `update` hands back the new keys and values as they are:
the executor stores them, because only it knows which of them are real tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from longreach.hf.calls import Calls
from longreach.memory.store import Store, nbytes_of


class StoreLayer(CacheLayerMixin):
    """One layer of the store. Layer 0 does what concerns all layers, for Transformers calls every layer in turn.

    What a forward asks of it changes with every token, so torch.compile must not look inside: it would compile anew each time. `update` is called by modules
    that are not compiled anyway.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, store: Store, index: int, calls: Calls) -> None:
        self.store = store
        self.calls = calls  # of the extension that may write to it
        self.index = index
        self.is_initialized = True

    @property
    def keys(self) -> Any:
        raise ValueError(
            "a Longreach cache has no tensor of all keys: it keeps what the method needs, in several forms; write it with extension.save(cache, file), "
            "copy it with extension.fork(cache), or call remove() for a stock cache"
        )

    values = keys

    @property
    def record_past(self) -> bool:
        return self.store.record_past

    @record_past.setter
    def record_past(self, active: bool) -> None:
        self.store.record_past = active

    def activate_past_recording(self) -> None:
        """Transformers announces that it may crop whatever the next forwards read."""
        self.record_past = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Buffers are allocated by the store when the first tokens arrive."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.calls.expects(self.store):
            raise ValueError("this cache belongs to a Longreach extension that is not in force here; pass a new DynamicCache() and the whole text")
        return key_states, value_states

    @torch.compiler.disable
    def get_seq_length(self) -> int:
        """Slots seen (pads included), not tokens stored: Transformers derives positions and slices from it."""
        return self.store.seen

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in older releases

    @property
    def batch_size(self) -> int:
        return self.store.rows or -1

    def crop(self, tokens_to_remove: int) -> None:
        """Negative: forget that many slots. Positive: the number of slots to keep, as older releases call it."""
        if self.index == 0:
            self.store.crop(-tokens_to_remove if tokens_to_remove <= 0 else max(0, self.store.seen - tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.index == 0 and self.store.rows:
            self.store.select(torch.arange(self.store.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.index == 0 and self.store.rows:
            self.store.select(indices if indices.dtype != torch.bool else indices.nonzero()[:, 0])

    def reset(self) -> None:
        if self.index == 0:
            self.store.reset()

    def offload(self) -> None:
        raise ValueError("a Longreach cache cannot be offloaded; create the DynamicCache without offloading=True")

    prefetch = offload


def keep_in_generation(model: Any) -> Callable[[], None]:
    """A few families drop the cache within `generate` at the length where their own frequencies switch. Ours are fixed for a sequence, so the cache stays.

    -> what undoes it.
    """
    own = getattr(model, "prepare_inputs_for_generation", None)
    if own is None or "prepare_inputs_for_generation" in vars(model):
        return lambda: None

    @functools.wraps(own)
    def prepare(input_ids: torch.Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        found = own(input_ids, *args, past_key_values=past_key_values, **kwargs)
        if store_of(past_key_values) is not None and found.get("past_key_values") is None:
            return GenerationMixin.prepare_inputs_for_generation(model, input_ids, *args, past_key_values=past_key_values, **kwargs)
        return found

    model.prepare_inputs_for_generation = prepare
    return lambda: vars(model).pop("prepare_inputs_for_generation", None)


def store_of(cache: object) -> Store | None:
    """The store in a cache, if it is one of ours."""
    layers = getattr(cache, "layers", None)
    return layers[0].store if layers and isinstance(layers[0], StoreLayer) else None


def take_back(cache: Any, slots: int) -> bool:
    """Forget the last `slots` columns. False, and nothing has changed, where the cache cannot go back so far: then read the text again."""
    store = store_of(cache)
    try:
        if store is not None:
            store.crop(slots, warn=False)
        else:
            cache.crop(-slots)
    except (ValueError, RuntimeError):  # as stock layers that slide or have a state say it
        return False
    return True


def cache_bytes(cache: Any, *forks: Any) -> int:
    """Bytes allocated for keys and values, in our store or in a stock cache. What several caches share counts once: `cache_bytes(document, *forks)`."""
    stores = [store_of(each) for each in (cache, *forks)]
    if None not in stores:
        return nbytes_of(store for store in stores if store is not None)
    if forks:
        return sum(map(cache_bytes, (cache, *forks)))
    tensors = (t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None)
    return sum(t.numel() * t.element_size() for t in tensors)


def place(cache: Cache | None, fresh: Store, calls: Calls) -> tuple[Cache, Store]:
    """A cache with our layers: ours as it is, an absent or empty `DynamicCache` filled in place. Raises for every other."""
    if cache is None:
        cache = DynamicCache()
    if (store := store_of(cache)) is not None:
        if cache.layers[0].calls is not calls:
            raise ValueError("this cache was filled under another extension; pass a new DynamicCache() or past_key_values=None")
        return cache, store
    if type(cache) is not DynamicCache:
        raise ValueError(f"a {type(cache).__name__} cannot hold un-rotated keys; pass past_key_values=None or an empty DynamicCache()")
    if cache.offloading:
        raise ValueError("a Longreach cache cannot be offloaded; create the DynamicCache without offloading=True")
    if any(getattr(layer, "is_initialized", False) and layer.get_seq_length() for layer in cache.layers):
        raise ValueError("this cache was filled without Longreach, so its keys are already rotated; pass a new DynamicCache() and the whole text")
    cache.layer_class_to_replicate = None
    cache.layers = [StoreLayer(fresh, index, calls) for index in range(len(fresh.forms))]
    return cache, fresh
