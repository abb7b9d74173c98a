"""What a user asks an engine for, and the method that follows: the same words as everywhere, as JSON. Knows configurations and the dial; nothing of vLLM."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longreach import configs
from longreach.methods import from_json
from longreach.methods.base import Method
from longreach.methods.stock import Stock
from longreach.planning import dial
from longreach.planning.profile import Profile
from longreach.quantities import token_count

KEY = "longreach"  # of --additional-config
VARIABLE = "LONGREACH_VLLM"  # the same, for those who start an engine by other means
LARGEST = 2**16  # characters of the JSON
OTHERS = ("context", "trained_window", "profile", "pages")  # settings that are no parameters of a method


@dataclass(frozen=True)
class Settings:
    """What was asked for: a method, or a context for which the dial or a profile chooses one.

    context  tokens of a whole sequence; None: the engine's max_model_len.
    pages    whether those that a bounded method does not see again are freed while a request goes on; None: they are.
    """

    method: Method | None = None
    context: int | None = None
    trained_window: int | None = None
    profile: Path | None = None
    pages: Literal["free", "keep"] | None = None

    def __post_init__(self) -> None:
        if self.profile is not None and self.method is not None:
            raise ValueError("a profile chooses the method; leave out the profile, or the method and its parameters")


@dataclass(frozen=True)
class Decided:
    """What is in force for an engine. `said`: what a user should know of it; `warning`: of the reach of the method.

    plain  there is nothing to do: plain attention was chosen, and the configuration itself declares so long a context. An engine's rotary tables end there.
    frees  pages that no query sees again are freed, so that nobody else finds them by their text.
    """

    method: Method
    window: configs.Window
    context: int
    said: str
    warning: str | None = None
    plain: bool = False
    frees: bool = False

    def to_json(self) -> dict[str, Any]:
        """Settings that decide the same."""
        pages = {"pages": "free" if self.frees else "keep"} if self.method.bounded else {}
        return {**self.method.to_json(), "context": self.context, "trained_window": self.window.tokens, **pages}

    @property
    def memory(self) -> str | None:
        """What becomes of pages under a method that sees the first tokens and the last ones only; None: it sees all."""
        if not self.method.bounded:
            return None
        if self.frees:
            return f'pages between the first and the last tokens that {self.method.name} sees are freed, and prefix caching is off ("pages": "keep" keeps both)'
        return f'pages between the first and the last tokens that {self.method.name} sees are kept ("pages": "free" frees them, without prefix caching)'


def salt_of(given: Mapping[str, Any]) -> str:
    """A name for keys and values that were computed under these settings: whoever has others must not read them."""
    return f"{KEY}:{hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:32]}"


def asked(additional: Any, environment: Mapping[str, str]) -> Settings | None:
    """The settings of --additional-config, or those of the environment; None: there are none. Raises ValueError for what is none of that."""
    given = additional.get(KEY) if isinstance(additional, dict) else None
    text = environment.get(VARIABLE)
    if text is None:
        return None if given is None else parse(given)
    if len(text) > LARGEST:
        raise ValueError(f"{VARIABLE} has {len(text)} characters, more than {LARGEST}; pass the settings of a method and nothing else")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"""{VARIABLE} is not JSON ({error}); pass for example {VARIABLE}='{{"context": 4096}}'""") from None
    if given is not None and given != found:
        raise ValueError(f"{VARIABLE} and --additional-config ask for different methods; unset the variable, or leave {KEY!r} out of --additional-config")
    return parse(found)


def parse(given: Any) -> Settings:
    """{"method": "selfextend", "group_size": 8, "window": 64, "context": 4096}: a method by its name with its parameters, as in JSON everywhere, and beside
    them "context", "trained_window" or "profile". Raises ValueError, with the fix, for anything else."""
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ValueError(f"""{KEY!r} must be an object such as {{"context": 4096}} or {{"method": "lm-infinite", "n_local": 512}}, not {_brief(given)}""")
    method = {key: value for key, value in given.items() if key not in OTHERS}
    if method and "method" not in method:
        raise ValueError(f"{KEY!r} has {', '.join(sorted(method))} but no method; name it too, such as \"method\": \"selfextend\"")
    if method and not isinstance(method["method"], str):
        raise ValueError(f'"method" must be the name of a method, such as "selfextend", not {_brief(method["method"])}')
    lengths = {name: None if given.get(name) is None else token_count(given[name], name) for name in ("context", "trained_window")}
    profile = given.get("profile")
    if profile is not None and not isinstance(profile, str):
        raise ValueError(f'"profile" must be the path of a file that longreach tune wrote, not {_brief(profile)}')
    pages = given.get("pages")
    if pages not in (None, "free", "keep"):
        raise ValueError(f'"pages" must be "free" or "keep", not {_brief(pages)}')
    try:
        chosen = from_json(method) if method else None
    except TypeError as error:  # a parameter without a default, or one that is no plain value
        raise ValueError(f"{method['method']}: {str(error).partition(') ')[2] or error}; `longreach methods {method['method']}` lists them") from None
    return Settings(chosen, lengths["context"], lengths["trained_window"], None if profile is None else Path(profile), pages)


def decide(settings: Settings, config: Any, longest: int) -> Decided:
    """The method of an engine that reads sequences of at most `longest` tokens with a model of this (text) configuration.

    Raises ValueError, with the fix, where the method does not reach so far, or pages cannot hold what it needs.
    """
    configs.refuse_unsupported(config)
    window = configs.trained_window(config, settings.trained_window)
    context = settings.context or longest
    if longest > context:
        raise ValueError(f"max_model_len is {longest}, beyond the declared context of {context}; pass --max-model-len {context}, or declare {longest}")
    if settings.method is None:
        profile = None if settings.profile is None else Profile.read(settings.profile)
        choice = dial.choose(window, context, None, profile)
        method, context, said, warning = choice.method, choice.context, f"{choice.method} ({choice.reason})", choice.warning
        if profile is not None and choice.profile is not None:
            unchecked = f"whether the profile of {profile.model} was made for these weights cannot be checked here (longreach run checks it)"
            warning = unchecked if warning is None else f"{warning}; {unchecked}"
    else:
        method, said, warning = settings.method, f"{settings.method} (asked for)", None
        refuse(method)
        reach = dial.limit(method, window.tokens)
        if reach is not None and context > reach and not method.needs_context:
            raise ValueError(
                f"{method} reaches {reach} tokens on a trained window of {window.tokens}, less than the {context} of max_model_len or the declared context; "
                f"leave the method out to have it chosen, or pass --max-model-len {reach}{dial.combined(method, window.tokens, context)}"
            )
        if isinstance(method, Stock) and context > window.tokens:
            warning = f"plain attention on {context} tokens, beyond the trained window of {window.tokens}: distances that were never trained"
    refuse(method)
    plain = isinstance(method, Stock) and settings.method is None and longest <= configs.stated_window(config, 0)[1]
    if settings.pages == "free" and not method.bounded:
        raise ValueError(f'{method.name} may see any key of a text, so that no page of it can be freed; leave out "pages": "free", or use LM-Infinite')
    return Decided(method, window, context, said, warning, plain, method.bounded and settings.pages != "keep")


def refuse(method: Method) -> None:
    """What pages cannot hold. Raises ValueError with what to use instead."""
    instead = "use longreach serve for it, or SelfExtend or DualChunk here, which see every key"
    if method.choice is not None:
        raise ValueError(f"{method.name} chooses keys by their content, and what it keeps of their blocks has no place on vLLM's pages; {instead}")
    if method.eviction is not None:
        raise ValueError(f"{method.name} evicts tokens by their content and renumbers the others, which vLLM's scheduler does not know of; {instead}")
    if method.cut != 1:
        raise ValueError(f"what {method.name} computes depends on how a prompt is cut, and vLLM cuts it where its budget ends; {instead}")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
