"""A profile: what `longreach tune` found for one model. For each tuned context a method, why it was chosen, and the evidence.

Knows the data, its JSON form and where the user's own profiles lie; measures nothing and touches no weights. A file is hostile until it is checked.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from longreach import files
from longreach.methods import from_json as method_from_json
from longreach.methods import registry
from longreach.methods.base import Method
from longreach.planning.machine import cache_folder
from longreach.quantities import MOST_TOKENS, counted

KIND = "longreach profile"
VERSION = 1
LARGEST = 2**20  # bytes of a file
LARGEST_EVIDENCE = 2**18  # bytes of the evidence of one entry, as JSON
MOST_ENTRIES = 64
DEEPEST = 12  # lists and objects inside each other
LONGEST = 1000  # characters of a sentence or a name
TUNE = "longreach tune --model MODEL --context N --out FILE"
AGAIN = "tune again with longreach tune --model MODEL --context N"


@dataclass(frozen=True)
class Tuned:
    """What was found for one context.

    context   tokens of a whole sequence that it was measured at.
    method    reaches that context.
    reason    one sentence a person reads: what the method was chosen by.
    evidence  plain JSON data: candidates with recall and loss, the ceiling inside the window, settings, versions; "date" is shown to people, and "dial" is
              the method of the dial's rule that it was compared with.

    Raises ValueError for what is none of that, or too large.
    """

    context: int
    method: Method
    reason: str
    evidence: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        require_tokens("the context of an entry", self.context)
        if not isinstance(self.method, Method):
            raise ValueError(f"the method of an entry must be a method such as longreach.SelfExtend(group_size=8, window=64), not {self.method!r}")
        require_line("the reason of an entry", self.reason)
        plain = require_plain(self.evidence, f"the evidence for {counted(self.context, 'token')}")
        if not isinstance(plain, dict):
            raise ValueError(f"the evidence for {counted(self.context, 'token')} must be an object with named values, not {type(self.evidence).__name__}")
        if len(json.dumps(plain)) > LARGEST_EVIDENCE:
            raise ValueError(f"the evidence for {counted(self.context, 'token')} exceeds {LARGEST_EVIDENCE} bytes; keep summaries, not every sample")
        object.__setattr__(self, "evidence", plain)  # a copy that nobody else changes, with lists as JSON has them

    @property
    def date(self) -> str | None:
        """When it was measured, for people; None where the evidence does not say."""
        found = self.evidence.get("date")
        return found if isinstance(found, str) and 0 < len(found) <= 40 and found.isprintable() else None

    @property
    def dial(self) -> Method | None:
        """What the dial's rule chose for the context when it was tuned; None where the evidence does not say."""
        try:
            return read_method(self.evidence["dial"])
        except (KeyError, ValueError):
            return None

    def to_json(self) -> dict[str, Any]:
        return {"context": self.context, "method": plain_method(self.method), "reason": self.reason, "evidence": dict(self.evidence)}

    @classmethod
    def from_json(cls, data: object) -> Tuned:
        """The inverse of `to_json`. Raises ValueError for anything else."""
        fields = require_fields(data, "an entry", {"context", "method", "reason", "evidence"})
        return cls(fields["context"], read_method(fields["method"]), fields["reason"], fields["evidence"])


@dataclass(frozen=True)
class Profile:
    """What was found for one model.

    model        the name that it was given, for people.
    fingerprint  of its weights: `longreach.hf.fingerprint.checkpoint_fingerprint` of `find_base(model)`, the same in float32 and bfloat16.
    window       the trained window in force when it was tuned, in tokens.
    entries      ascending contexts beyond the window, each once.
    source       where it was read from, for people; no part of what it says.
    user         how its user names the model and the trained window (None: not stated), for commands to copy: `model` is whatever the file's author wrote.

    Raises ValueError for anything else.
    """

    model: str
    fingerprint: str
    window: int
    entries: tuple[Tuned, ...] = ()
    source: str | None = field(default=None, compare=False)
    user: tuple[str, int | None] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        require_line("the model of a profile", self.model)
        if not isinstance(self.fingerprint, str) or not re.fullmatch("[0-9a-f]{64}", self.fingerprint):
            raise ValueError(f"the fingerprint of a profile must be 64 hexadecimal digits, not {str(self.fingerprint)[:80]!r}; {AGAIN}")
        require_tokens("the window of a profile", self.window)
        object.__setattr__(self, "entries", tuple(self.entries))
        if not all(isinstance(entry, Tuned) for entry in self.entries):
            raise ValueError("the entries of a profile must be longreach.planning.profile.Tuned")
        contexts = [entry.context for entry in self.entries]
        if contexts != sorted(set(contexts)) or len(contexts) > MOST_ENTRIES:
            raise ValueError(f"the contexts of a profile must ascend, each once, and be at most {MOST_ENTRIES}, not {contexts[:MOST_ENTRIES]}; {AGAIN}")
        for entry in self.entries:
            if entry.context <= self.window:
                raise ValueError(f"an entry for {entry.context} tokens is inside the trained window of {self.window}, where nothing is chosen; leave it out")
            if not reaches(entry.method, self.window, entry.context):
                raise ValueError(f"{entry.method.brief()} does not reach the {entry.context} tokens of its entry on a trained window of {self.window}; {AGAIN}")

    @property
    def contexts(self) -> str:
        """The tuned contexts, for people."""
        return ", ".join(str(entry.context) for entry in self.entries) or "no context"

    def choose(self, context: int) -> Tuned | None:
        """The entry of the smallest tuned context >= `context`; None inside the trained window, where plain attention needs no entry.

        Raises ValueError, with what it was tuned for and the fix, where no entry reaches so far.
        """
        require_tokens("context", context, "count the prompt and the new tokens")
        if context <= self.window:
            return None
        for entry in self.entries:
            if entry.context >= context:
                return entry
        raise ValueError(
            f"the profile of {self.model} was tuned for {self.contexts}, not for {context} tokens; run {self.command(context, *self.user or ())}, "
            "or leave the profile out (--no-profile, profile=None) to have the dial's rule choose"
        )

    def reaches(self, context: int) -> bool:
        """Whether `choose` has an answer."""
        return context <= max([self.window, *(entry.context for entry in self.entries)])

    def command(self, context: int, model: str | None = None, trained_window: int | None = None) -> str:
        """What to type to have it tuned for a context; `model` as the user gave it, `trained_window` where one is to be stated."""
        return f"longreach tune {shlex.join(options(model or self.model, context, trained_window))}"

    def with_entry(self, entry: Tuned) -> Profile:
        """This profile with one more entry, or another one for its context."""
        others = [known for known in self.entries if known.context != entry.context]
        return replace(self, entries=tuple(sorted([*others, entry], key=lambda e: e.context)))

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "version": VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "window": self.window,
            "entries": [entry.to_json() for entry in self.entries],
        }

    @classmethod
    def from_json(cls, data: object) -> Profile:
        """The inverse of `to_json`. Raises ValueError for unknown fields, another version, and values of a wrong type or size."""
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise ValueError(f"this is no profile of longreach; {AGAIN}")
        if data.get("version") != VERSION or type(data["version"]) is not int:  # true and 1.0 equal 1
            raise ValueError(f"it is a profile of version {str(data.get('version'))[:40]}, and this longreach reads version {VERSION}; {AGAIN}")
        fields = require_fields(data, "a profile", {"kind", "version", "model", "fingerprint", "window", "entries"})
        if not isinstance(fields["entries"], list) or len(fields["entries"]) > MOST_ENTRIES:
            raise ValueError(f"the entries of a profile must be a list of at most {MOST_ENTRIES}; {AGAIN}")
        return cls(fields["model"], fields["fingerprint"], fields["window"], tuple(Tuned.from_json(entry) for entry in fields["entries"]))

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """A profile from a file. Raises ValueError, with the path, if it is none, or larger than 1 MiB."""
        file = Path(path).expanduser()
        try:
            if not file.is_file():
                raise ValueError(f"{'there is no such file' if not file.exists() else 'it is no ordinary file'}; name another, or make one with {TUNE}")
            with open(file, "rb") as opened:
                content = opened.read(LARGEST + 1)
            if len(content) > LARGEST:
                raise ValueError(f"it has more than {LARGEST} bytes, which no profile has; {AGAIN}")
            return replace(cls.from_json(decode(content)), source=str(path))
        except OSError as error:
            raise ValueError(f"the profile {str(path)!r} cannot be read: {(error.strerror or str(error)).lower()}; name another file") from error
        except ValueError as error:
            raise ValueError(f"the profile {str(path)!r} cannot be used: {error}") from error

    def write(self, path: str | Path) -> None:
        """All of it, or the file stays as it was. Raises ValueError where it cannot be written or exceeds 1 MiB."""
        content = json.dumps(self.to_json(), indent=1, allow_nan=False)
        if len(content) > LARGEST:
            raise ValueError(f"the profile exceeds {LARGEST} bytes; keep less evidence, or tune fewer contexts")
        files.write(Path(path).expanduser(), content + "\n", "profile")

    def keep(self) -> Path:
        """Write it to the user's cache, where the command line finds it -> the file."""
        path = default_path(self.fingerprint)
        with files.said(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.write(path)
        return path


def options(model: str, context: int, trained_window: int | None) -> list[str]:
    """What commands about a model at a context are to be given."""
    return ["--model", model, "--context", str(context), *([] if trained_window is None else ["--trained-window", str(trained_window)])]


def default_path(fingerprint: str) -> Path:
    """Where the profile of a model lies in the user's cache."""
    return cache_folder() / "profiles" / f"{fingerprint[:16]}.json"


def reaches(method: Method, window: int, context: int) -> bool:
    """Whether a method may be given so many tokens. A method whose frequencies are fixed from the declared context reaches that."""
    if method.needs_context:
        return True
    try:
        reach = method.capacity(window)
    except OverflowError:  # parameters that no text needs
        return False
    return reach is None or reach >= context


# -- what is checked -------------------------------------------------------------------------------------------------------------------


def decode(content: bytes) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"it holds {name}, which no profile has; {AGAIN}")

    def whole(digits: str) -> int:
        if len(digits) > 20:  # no count has so many, and Python refuses thousands of them in words of its own
            refuse(f"a whole number of {len(digits)} digits")
        return int(digits)

    try:
        return json.loads(content.decode("utf-8"), parse_constant=refuse, parse_int=whole)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({str(error)[:120]}); {AGAIN}") from error


def read_method(data: object) -> Method:
    """A method from JSON that anybody may have written: no file names, which LongRoPE would open."""
    plain = require_plain(data, "the method of an entry")
    if not isinstance(plain, dict) or not isinstance(plain.get("method"), str):
        raise ValueError(f"the method of an entry must be an object with its name as 'method'; {AGAIN}")
    for values in (plain, *(value for value in plain.values() if isinstance(value, dict))):
        kind = registry().get(str(values.get("method")))
        hints = get_type_hints(kind) if kind is not None else {}
        for name, value in values.items():
            words = get_args(hints.get(name)) if get_origin(hints.get(name)) is Literal else ()
            if name != "method" and isinstance(value, str) and value not in words:
                if words:
                    raise ValueError(f"{name} must be {' or '.join(map(repr, words))}, not {value[:80]!r}; write one of these into it")
                raise ValueError(f"{name} must be numbers in a profile, not a name such as {value[:80]!r}; write the numbers into it")
    try:
        return method_from_json(plain)
    except (TypeError, OverflowError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"the parameters of {plain['method'][:80]} cannot be used ({str(error)[:120]}); {AGAIN}") from error


def plain_method(method: Method) -> Any:
    return require_plain(method.to_json(), "the method of an entry")


def require_fields(data: object, what: str, names: set[str]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{what} must be an object with the fields {', '.join(sorted(names))}; {AGAIN}")
    if wrong := sorted(map(str, set(data) ^ names)):
        said = "unknown" if wrong[0] in data else "missing"
        raise ValueError(f"{what} has the fields {', '.join(sorted(names))}, and {wrong[0][:80]!r} is {said}; {AGAIN}")
    return data


def require_tokens(what: str, value: object, fix: str = AGAIN) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_TOKENS:
        raise ValueError(f"{what} must be a positive number of tokens, not {str(value)[:80]!r}; {fix}")


def require_line(what: str, value: object) -> None:
    """It is printed at a terminal, so it may not hold control characters."""
    if not isinstance(value, str) or not value.strip() or len(value) > LONGEST or not value.isprintable():
        raise ValueError(f"{what} must be one line of at most {LONGEST} printable characters, not {str(value)[:80]!r}")


def require_plain(value: object, what: str, depth: int = 0) -> Any:
    """-> the same as JSON has it: objects with names, lists, texts, finite numbers, true, false and null."""
    if depth > DEEPEST:
        raise ValueError(f"{what} is nested more than {DEEPEST} deep; keep it flat")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return [require_plain(each, what, depth + 1) for each in value]
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: require_plain(each, what, depth + 1) for name, each in value.items()}
    raise ValueError(f"{what} must be plain JSON data, and holds {type(value).__name__} {str(value)[:40]!r}; convert it, and leave out what is not finite")
