"""The profile that chooses the method where none was given: the one of --profile, or the model's own in the user's cache, which is said aloud.

Knows options, the cache and what is said; what a profile is and whether it is this model's is decided elsewhere. Python's `extend` looks nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longreach.cli.console import Output

if TYPE_CHECKING:
    from longreach.methods.base import Method
    from longreach.planning.profile import Profile

CACHE = "cache"  # what results say of a profile that was found there
RULE = "the dial's rule chooses"


@dataclass(frozen=True)
class Asked:
    """What the options say: `given` is of --profile, `ignored` of --no-profile, `model` of --model; by default the cache is looked at."""

    given: Profile | None = None
    ignored: bool = False
    model: str | None = None


BY_DEFAULT = Asked()


@dataclass(frozen=True)
class Found:
    """The profile to hand to `extend`, or None; and what there is to say about it. `serious`: even where only warnings are wanted."""

    profile: Profile | None = None
    said: str | None = None
    serious: bool = False

    def say(self, out: Output) -> Profile | None:
        """Say it -> the profile."""
        if self.said is not None:
            (out.warn if self.serious else out.note)(self.said)
        return self.profile


def asked(file: Path | None, ignored: bool, method: Method | None, document: Path | None = None, model: str | None = None) -> Asked:
    """The options, checked before a model is loaded. Raises ValueError for a file that is no profile, and beside what chooses the method otherwise."""
    if file is None:
        return Asked(None, ignored, model)
    if ignored:
        raise ValueError("--profile and --no-profile contradict each other; leave out one")
    if method is not None:
        raise ValueError("a profile chooses the method; leave out --profile, or --method and its parameters")
    if document is not None:
        raise ValueError("--document says what it was read with, so a profile cannot choose; leave out --profile, or read the text anew")
    from longreach.planning.profile import Profile

    return Asked(Profile.read(file), model=model)


def find(out: Output, asked: Asked, model: Any, method: Method | None, context: int | None, trained_window: int | None) -> Profile | None:
    """What `extend` is to be given as its profile, after it was said which one that is."""
    from longreach.hf.checks import find_base

    if method is not None or context is None:  # a method of the user's own is refused beside a profile
        if asked.given is not None:
            out.note(f"the profile {asked.given.source} is not used, because no context is declared; pass --context N beyond the trained window")
        return None
    return look(asked, find_base(model), context, trained_window).say(out)


def look(asked: Asked, base: Any, context: int, trained_window: int | None) -> Found:
    """The profile for a context. One that was given is used or refused by `extend`; one in the cache is used if it fits, and what is wrong is said.

    Inside the trained window nothing is looked for, and one that was given has nothing to choose, which is said. `base` is the text model, which may be
    extended by now.
    """
    from longreach import configs
    from longreach.hf.fingerprint import checkpoint_fingerprint
    from longreach.planning.profile import Profile, default_path

    window = configs.trained_window(base.config, trained_window).tokens
    if asked.given is not None:
        given = asked.given if asked.model is None else replace(asked.given, user=(asked.model, trained_window))
        if window != given.window or not given.reaches(context) or given.fingerprint != checkpoint_fingerprint(base):
            return Found(given)
        if context <= window:
            return Found(
                given, f"the profile {given.source} is not used: {context} tokens fit the trained window of {window}, where plain attention reads them"
            )
        return Found(given, used(given, str(given.source), context))
    if asked.ignored or context <= window:
        return Found()
    fingerprint = checkpoint_fingerprint(base)
    path = default_path(fingerprint)
    if not path.exists():
        return Found()
    try:
        profile = replace(Profile.read(path), source=CACHE)
    except ValueError as error:
        return Found(None, f"{error}; {RULE} until the file is deleted or replaced", serious=True)
    if profile.fingerprint != fingerprint:
        return Found(None, f"the profile {str(path)!r} is of another model (fingerprint {profile.fingerprint[:16]}); {RULE}, delete the file", serious=True)
    if profile.window != window:
        why = f"was tuned with a trained window of {profile.window} tokens, and {window} is in force"
        return Found(None, f"the profile {path} is not used: it {why}; {RULE}; {profile.command(context, asked.model, window)} tunes for that")
    if not profile.reaches(context):
        again = profile.command(context, asked.model, trained_window)
        return Found(None, f"the profile {path} was tuned for {profile.contexts}, not for {context} tokens; {RULE}; {again} tunes for that")
    return Found(profile, used(profile, str(path), context) + "; --no-profile ignores it")


def used(profile: Profile, place: str, context: int) -> str:
    entry = profile.choose(context)
    assert entry is not None
    when = f" on {entry.date}" if entry.date else ""
    return f"profile: {entry.method.brief()} from {place}, tuned at {entry.context} tokens{when}"
