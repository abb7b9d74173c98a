"""Whether a prompt and its answer fit, and the method that is attached for them; if not, the numbers and the fix.

Knows options, the dial and counts of tokens; not texts or conversations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longreach.cli import profiles, stored
from longreach.cli.common import Output
from longreach.quantities import counted

if TYPE_CHECKING:
    from longreach.hf.extension import Extension
    from longreach.hf.interfaces import CausalLM
    from longreach.methods.base import Method


def limits(model: CausalLM, choice: stored.Choice) -> tuple[int, int | None]:
    """The trained window, and the tokens that a prompt and its answer may have; None: any number."""
    from longreach import configs
    from longreach.hf.checks import find_base
    from longreach.planning import dial

    base = find_base(model)
    configs.refuse_unsupported(base.config)
    method, declared = choice.method, choice.context
    window = configs.trained_window(base.config, choice.trained_window).tokens
    capacity = dial.limit(method, window)
    if capacity is not None and declared is not None and declared > capacity:
        raise ValueError(
            f"the declared context of {declared} tokens exceeds the capacity of {capacity} of {method} on a trained window of {window}; "
            f"pass --context {capacity}, other parameters, or leave out --method to have them chosen{dial.combined(method, window, declared)}"
        )
    return window, declared or capacity


def attached(
    out: Output, model: CausalLM, choice: stored.Choice, window: int, tokens: int, largest: int, max_new_tokens: int, kept: bool = False
) -> tuple[Extension, int, str | None]:
    """For a prompt of so many tokens, the largest of which is `largest` -> the extension, the tokens that the whole may have, and what to say where plain
    attention goes beyond its window. `kept`: what is read will be used with other questions, so no context is declared that was not asked for."""
    import longreach
    from longreach.planning import dial

    if largest >= (known := model.get_input_embeddings().weight.shape[0]):
        raise ValueError(f"the tokenizer makes token {largest} but the model knows {known} only; they do not belong together, reload the checkpoint's files")
    method = choice.method
    total = choice.context or tokens + max_new_tokens
    context, beyond = dial.declare(method, window, total)
    if kept and choice.context is None:
        if method is None or method.needs_context:
            raise ValueError("--resume needs the length that the text, its questions and answers may have; pass --context N")
        context = None
    profile = profiles.find(out, choice.profile, model, method, context, choice.trained_window)
    extension = longreach.extend(model, method, context=context, trained_window=choice.trained_window, profile=profile, memory=choice.memory)
    return extension, total, beyond


def too_long(prompt: int, new: int, limit: int, declared: bool, method: Method | None, window: int, truncate: str = ", or --truncate middle") -> str:
    """`truncate`: what else helps."""
    total = prompt + new
    sentence = f"the prompt has {counted(prompt, 'token')} and with {new} new ones needs {total}, more than "
    if declared:
        return f"{sentence}the declared context of {limit}; pass --context {total}, a shorter text{truncate}"
    return (
        f"{sentence}the capacity of {limit} tokens of {method} on a trained window of {window}; leave out --method and pass --context {total} to have "
        f"parameters chosen, read any length with --method lm-infinite --n-local {window}, or pass {truncate.removeprefix(', or ') or 'a shorter text'}"
    )
