"""What the questions of some prompts pay to their texts, in one forward of each. Knows extensions and prompts; not what is made of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from longreach.apps.infiniretri.prompt import Prompt
from longreach.hf.extension import Extension
from longreach.hf.placement import device_of

TOKENS_AT_ONCE = 2**14  # of the prompts that are read in one forward


def paid_by(extension: Extension, layers: Collection[int], asked: Sequence[Prompt], pad: int) -> Iterator[dict[int, torch.Tensor]]:
    """Of each prompt, layer -> [T, N]: what its tokens from the first of the question on pay, heads added up. Some are read together, with pads behind.

    No layer behind the last of these is computed.
    """
    together = max(1, TOKENS_AT_ONCE // max(len(prompt.ids) for prompt in asked))
    device = device_of(extension.model)
    for first in range(0, len(asked), together):
        some = asked[first : first + together]
        longest = max(len(prompt.ids) for prompt in some)
        ids = torch.tensor([prompt.ids + [pad] * (longest - len(prompt.ids)) for prompt in some], device=device)
        mask = torch.tensor([[1] * len(prompt.ids) + [0] * (longest - len(prompt.ids)) for prompt in some], device=device)
        with torch.no_grad(), extension.watching_probabilities([prompt.question.start for prompt in some], layers, ends=True) as watch:
            extension.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        for row, prompt in enumerate(some):
            tokens = len(prompt.ids)
            yield {layer: paid[row, : tokens - prompt.question.start, :tokens] for layer, paid in watch.paid.items()}
