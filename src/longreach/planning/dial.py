"""The single dial: a declared context and a model's configuration -> a method and its parameters, with the reason.

Knows the published rules, what a profile says and how much memory is free; touches no weights. The decision is made once, at `extend()`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch

from longreach.configs import Window, decoder
from longreach.memory.budgets import Tiered, size_text
from longreach.methods.base import Method
from longreach.methods.dual_chunk import DualChunk
from longreach.methods.infinitehip import InfiniteHiP
from longreach.methods.infllm import InfLLM
from longreach.methods.lm_infinite import LMInfinite
from longreach.methods.selfextend import SelfExtend
from longreach.methods.stock import Stock
from longreach.planning import offers
from longreach.planning.machine import free_memory
from longreach.planning.memory import Budget, Schedule, gigabytes, kv_bytes, largest
from longreach.planning.profile import Profile, Tuned
from longreach.planning.tiers import InTiers
from longreach.quantities import counted

ORIGINAL_BASE = 10_000  # of rotary frequencies; the authors' models and nano have it
LARGEST_GROUP = 64  # the authors' range for group sizes ends here
SHARPENED = "the log scale keeps attention sharp among more keys than in training"
MEASURE = "a rule, not a measurement: `longreach tune` measures what this model finds"


def neighbours(length: int, divisor: int, group: int) -> int:
    """About length / divisor, as a multiple of the group size, so that the far zone begins at distance w for every query."""
    return max(1, round(length / divisor / group)) * group


@dataclass(frozen=True)
class Shares:
    """Of the trained window L: the neighbour window is L / near, and the largest distance at most the share `far` of L. Groups have at most `group` tokens."""

    near: int
    far: Fraction
    group: int

    def largest(self, length: int) -> int:
        return int(self.far * length)

    def neighbours(self, length: int, group: int) -> int:
        return neighbours(length, self.near, group)

    def furthest(self, length: int) -> int:
        """The largest context whose distances stay within the share."""
        most = self.largest(length)
        windows = ((group, self.neighbours(length, group)) for group in range(2, self.group + 1))
        return max([length, *((most - near) * group + near for group, near in windows if near < most)])


WHOLE = Shares(8, Fraction(2, 3), LARGEST_GROUP)  # the authors' empirical rule: only the lower two thirds are well trained; for L/8 see docs/nano.md
STRETCHED = Shares(32, Fraction(1, 8), 4 * LARGEST_GROUP)  # where the window was stretched late in training, up to NOT_FAR windows: docs/real-models.md
STRETCHED_FAR = Shares(16, Fraction(1, 2), LARGEST_GROUP)  # and beyond
NOT_FAR = Fraction(3, 2)  # measured at one and a half windows and at two, not between


@dataclass(frozen=True)
class Choice:
    """What the dial chose. `warning` is set when only the loose rule holds, `profile` when the method is from there.

    context  to be declared: the one asked for, or the tuned one where the frequencies of a method are fixed from it.
    offer    in words: what would keep all and read less of it for a token, and what is known of its recall. It is not chosen: that is for the user to accept.
    """

    method: Method
    context: int
    window: Window
    reason: str
    warning: str | None = None
    profile: Profile | None = None
    offer: str | None = None


def limit(method: Method | None, window: int) -> int | None:
    """The most tokens that a method may be given; None: any number, as where the dial chooses, and of plain attention, whose limit `declare` warns of.

    Raises ValueError for parameters that reach no text at all.
    """
    reach = None if method is None or isinstance(method, Stock) else method.capacity(window)
    if reach == 0:
        raise ValueError(f"{method} uses distances beyond the trained window of {window} tokens for any text; choose parameters of at most {window}")
    return reach


def combined(method: Method | None, window: int, context: int) -> str:
    """What else to do with a method that keeps true distances and shall read more than the window, to be added to a sentence; "" for others."""
    if method is None or isinstance(method, Stock) or method.rescales or method.capacity(window) != window:
        return ""
    return (
        f", or combine it with frequencies that reach so far: Combined(YaRN({-(-context // window)}), {type(method).__name__}(...)) "
        f"(--method combined --encoding 'yarn --factor {-(-context // window)}' --positions '{method.name} ...')"
    )


def declare(method: Method | None, window: int, context: int | None) -> tuple[int | None, str | None]:
    """-> (the context to declare to `extend`, what to warn of). Plain attention may go beyond its window, for comparison; declared, it would be refused."""
    if context is None or not isinstance(method, Stock) or context <= window:
        return context, None
    return None, f"plain attention on {context} tokens, beyond the trained window of {window}: distances that were never trained, for comparison only"


def choose(window: Window, context: int, budget: Budget | None = None, profile: Profile | None = None) -> Choice:
    """The method for a context; if memory is what binds, the first that fits into the budget, with a warning of what that loses.

    budget   free memory for keys and values; None: memory is not looked at.
    profile  what was tuned for this model: beyond the trained window it takes the place of the rule.

    Raises ValueError, with the fix, where the rule or the profile does not reach the context, or the profile is of another trained window.
    """
    choice = preferred(window, context, profile)
    if budget is not None and not budget.fits(choice.method, context):
        return frugal(choice, budget, profile)
    return choice if not isinstance(budget, InTiers) else replace(choice, offer=cheaper(choice, budget))


def preferred(window: Window, context: int, profile: Profile | None) -> Choice:
    """By the profile if there is one, else by the rule; memory is not looked at."""
    if profile is None:
        return by_length(window, context)
    if profile.window != window.tokens:
        raise ValueError(
            f"the profile of {profile.model} was tuned with a trained window of {profile.window} tokens, and {window.tokens} is in force ({window.reason}); "
            f"pass trained_window={profile.window} (--trained-window {profile.window}), tune again, or leave the profile out"
        )
    entry = profile.choose(context)
    if entry is None:
        return by_length(window, context)
    exceeds = f"{context} tokens exceed the trained window of {window.tokens} ({window.reason})"
    tuned = f"tuned at {entry.context} tokens" + (f" on {entry.date}" if entry.date else "")
    reason = f"{exceeds}: from the profile of {profile.model}, {tuned}: {entry.reason}"
    declared = entry.context if entry.method.needs_context else context  # other frequencies would not be those that were measured
    return Choice(entry.method, declared, window, reason + _revised(entry, window), far_below(entry, profile, context), profile)


def far_below(entry: Tuned, profile: Profile, context: int) -> str | None:
    """What to warn of where an entry serves a context of less than half of its own: on nano, settings tuned at 8192 tokens cost 0.04 to 0.15 nats at 640."""
    if 2 * context >= entry.context:
        return None
    return (
        f"the profile was tuned at {entry.context} tokens and is used at {context}, where it was not measured and a setting for less may be better; "
        f"{profile.command(context, *profile.user or ())} measures that"
    )


def _revised(entry: Tuned, window: Window) -> str:
    """What to say where the entry was compared with a rule that has changed since."""
    try:
        today = by_length(window, entry.context).method
    except ValueError:  # it does not reach so far any more
        return ""
    if entry.dial is None or entry.dial == today:
        return ""
    return f"; at {entry.context} tokens the dial's rule was {entry.dial.brief()} then, with which it was compared, and is {today.brief()} now"


def budget(config: Any, dtype: torch.dtype, device: torch.device, memory: Tiered | None = None) -> Budget | None:
    """What is free now, after the weights were loaded, and over `memory` its tiers; None where the system or the configuration does not tell."""
    free = free_memory(device)
    try:
        if free is None:
            return None
        return Budget(decoder(config, dtype), free) if memory is None else InTiers(decoder(config, dtype), free, memory, device.type == "cpu")
    except ValueError:  # layers whose bytes we cannot count: then memory is no argument
        return None


def too_large(method: Method, context: int, budget: Budget | None) -> str | None:
    """What to warn of where a method was asked for and its tiers cannot keep a declared context: else that is found in the middle of the text."""
    if not isinstance(budget, InTiers) or budget.spread(method, context).fits():
        return None
    most = largest(lambda n: budget.spread(method, n).fits(), context)
    fewer = f"; at most {counted(most, 'token')} can be read with these" if most else ""
    return f"{method.brief()} {budget.short(method, context)}{fewer}; {budget.fix(method, context)}"


def frugal(choice: Choice, budget: Budget, profile: Profile | None = None) -> Choice:
    """The first of the methods that need less memory and fit, or an error with the largest context that the dial's own choice could have."""
    wanted, context, window = choice.method, choice.context, choice.window
    most = largest(lambda n: budget.fits(preferred(window, n, profile).method, n), context)
    needs, tiered = f"{wanted.brief()} {budget.short(wanted, context)}", in_tiers(wanted, context, budget)
    for kind in (DualChunk, LMInfinite):
        method = kind.suggest(window.tokens, context)
        if method is None or not budget.fits(method, context):
            continue
        warning = f"memory binds: {needs}; {method.brief()} fits and recalls {method.sees}"
        fix = f"; a context of at most {most} fits without it" if most else ""
        fix += f"; {tiered}" if method.bounded else ""
        return Choice(method, context, window, f"{choice.reason}; but {needs}: the first method that fits", warning + fix)
    fix = f"declare a context of at most {most}" if most else "load the model in bfloat16 or on a device with more memory"
    raise ValueError(f"memory binds: {needs}, and no method that keeps less fits either; {fix}, or {tiered}")


def in_tiers(wanted: Method, context: int, budget: Budget) -> str:
    """How everything could be kept nevertheless."""
    if isinstance(budget, InTiers):
        return f"to remember everything, {budget.fix(wanted, context)}"
    kept = kv_bytes(budget.architecture, wanted, Schedule.of(wanted, max(2, context), 1))
    return (
        f"to remember everything, keep its {gigabytes(kept)} in tiers: memory=Tiered(device=..., host=..., disk=...), --memory device=...,host=...,disk=...; "
        "longreach plan --memory says what each token then brings to the device, and which methods that choose bring less"
    )


def cheaper(choice: Choice, budget: InTiers) -> str | None:
    """What to say where every token has to wait for what lies below the device: the method that chooses and brings least."""
    brings = budget.spread(choice.method, choice.context)
    found = offers.cheapest(budget, choice.window.tokens, choice.context, brings.moved)
    if found is None:
        return None
    below = " and ".join(f"{size_text(size)} from {'the host' if name == 'host' else name}" for name, size in brings.token.items() if size)
    return f"under {choice.method.brief()} every token brings {below} to the device; {found} (--method {' '.join(found.method.options())})"


def by_length(window: Window, context: int) -> Choice:
    """SelfExtend with the smallest group size that the rules allow; stock when the context fits anyway.

    The rule of the authors: w + (N - w) / g <= 2/3 L, for only well-trained positions should be used, with w = L/8 rounded to a multiple of g, and the log
    scale of the official code with base L. Where the window was stretched (see `stretched`), there is no log scale, and w = L/32 with distances of at most L/8
    comes first for N up to 3/2 L, then w = L/16 with at most L/2; what needs more is warned of. The loose rule: every distance is below L.
    """
    if not isinstance(context, int) or isinstance(context, bool) or context < 1:
        raise ValueError(f"context must be a positive number of tokens, not {context!r}; count the prompt and the new tokens")
    length = window.tokens
    if context <= length:
        fit = "1 token fits" if context == 1 else f"{context} tokens fit"
        return Choice(Stock(), context, window, f"{fit} the trained window of {length} ({window.reason}): plain attention")
    exceeds = f"{context} tokens exceed the trained window of {length} ({window.reason})"
    rules = shares_of(window, context)
    for shares in rules:
        if (method := smallest(window, shares, context)) is not None:
            because = f", whose frequency base was raised to {window.base:g}" if shares in (STRETCHED, STRETCHED_FAR) else ""
            reason = (
                f"{exceeds}: smallest group size whose largest distance, {method.window + (context - method.window) // method.group_size}, "
                f"stays within {shares.far} of it ({shares.largest(length)}){because}; {why(window)}"
            )
            return Choice(method, context, window, reason, None if shares == rules[0] else poorly(window, context))
    for group in (LARGEST_GROUP, *range(2, LARGEST_GROUP)):
        method = usual(window, WHOLE, group)
        if method.window < length and (method.capacity(length) or 0) >= context:
            which = "largest" if group == LARGEST_GROUP else "smallest"
            reason = f"{exceeds}: {which} usual group size; all distances are trained ones; {why(window)}"
            return Choice(method, context, window, reason, poorly(window, context))
    most, group = reach(length)
    raise ValueError(
        f"no usual parameters reach a context of {context} tokens from a trained window of {length} ({window.reason}): SelfExtend reaches {most} with "
        f"group size {group}; declare at most that, choose a larger group with SelfExtend(group_size=...), or read a text of any length "
        f"with LMInfinite(n_local={length}) (--method lm-infinite --n-local {length}), which remembers only the last {length} tokens{beyond(length, context)}"
    )


def beyond(length: int, context: int) -> str:
    """The methods that keep all of a text of any length, to be added to a sentence; "" where the window is too small for them."""
    found = [(kind.__name__, offers.retrieving(kind, length, context)) for kind in (InfLLM, InfiniteHiP)]
    known = [f"{name} (--method {' '.join(method.options())}; {method.evidence})" for name, method in found if method is not None]
    return f", or with what keeps everything and shows each token blocks of it that it chooses: {' or '.join(known)}" if known else ""


def recommended(method: type[Method], window: Window, context: int) -> Method:
    """The setting of a method for a declared context: the dial's for SelfExtend (which is Stock where the text fits), else the method's own.

    Raises ValueError where there is none.
    """
    return choose(window, context).method if method is SelfExtend else method.recommended(window.tokens, context)


def reach(length: int) -> tuple[int, int]:
    """The largest context that the usual parameters reach on a trained window, and the group size that does."""
    return max((SelfExtend(g, WHOLE.neighbours(length, g)).capacity(length) or 0, g) for g in range(1, LARGEST_GROUP + 1))


def stretched(window: Window) -> bool:
    """Whether the base of its frequencies was raised: the sign of a window that was stretched late in training, most of which was on shorter texts.

    The models of SelfExtend's authors and nano have the original base. A window that was given is believed.
    """
    return window.base is not None and window.base > ORIGINAL_BASE


def shares_of(window: Window, context: int) -> tuple[Shares, ...]:
    """The rules for a window, the preferred one first. SmolLM2-135M (base 100000) finds more where keys are brought near, and at two windows loses more by
    groups that are that large: docs/real-models.md."""
    if not stretched(window):
        return (WHOLE,)
    return (STRETCHED_FAR, WHOLE) if context > NOT_FAR * window.tokens else (STRETCHED, STRETCHED_FAR, WHOLE)


def smallest(window: Window, shares: Shares, context: int) -> SelfExtend | None:
    """The smallest group size whose largest distance stays within the share."""
    for group in range(2, shares.group + 1):
        method = usual(window, shares, group)
        if method.window + (context - method.window) / group <= shares.largest(window.tokens):
            return method
    return None


def poorly(window: Window, context: int) -> str:
    """What to warn of."""
    shares, length = shares_of(window, context)[0], window.tokens
    return (
        f"context {context} needs distances beyond {shares.far} of the trained window of {length}, where positions are poorly trained; "
        f"a context of at most {shares.furthest(length)} keeps within them"
    )


def usual(window: Window, shares: Shares, group: int) -> SelfExtend:
    """The method that the dial considers for a group size.

    The log scale keeps attention as sharp among many keys as among the trained number of them: nano's softmax is diluted without it (docs/nano.md). Texts
    inside the window are as without it. Where the window was stretched it is left out: on SmolLM2 it loses keys (docs/real-models.md).
    """
    sharp = not stretched(window) and window.tokens > 1
    return SelfExtend(group, shares.neighbours(window.tokens, group), log_scale=window.tokens if sharp else None)


def why(window: Window) -> str:
    return MEASURE if stretched(window) else f"{SHARPENED}; {MEASURE}"
