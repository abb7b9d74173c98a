"""A conversation at work: which method is attached for it and up to how many tokens, and when that changes.

Knows the dial, conversations and documents on disk; not the terminal's commands. A method is fixed for a whole sequence, because keys were computed
under it: whatever changes the method costs one reading of everything so far, which is said aloud.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longreach.cli import profiles, stored, targets
from longreach.cli.console import Output, progress_bar
from longreach.quantities import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from longreach.configs import Window
    from longreach.hf.extension import Extension
    from longreach.hf.interfaces import CausalLM, Tokenizer
    from longreach.methods.base import Method
    from longreach.planning.dial import Choice as DialChoice
    from longreach.running.conversation import Conversation
    from longreach.running.generation import Answer
    from longreach.running.sampling import Sampling

ROOM = 1024  # tokens for questions and answers where no context is declared
FIRST = 8  # an eighth of the trained window is left for the first question where plain attention is to begin


@dataclass
class Session:
    """`choice` is what the options say: a method or a declared context that is in force from the start and to the end. Without them plain attention
    reads what fits the trained window; a conversation that leaves it, or what the dial chose afterwards, goes on with what the dial chooses next."""

    out: Output
    model: CausalLM
    tokenizer: Tokenizer
    choice: stored.Choice
    max_new_tokens: int
    talk: Conversation = field(init=False)
    base: Any = field(init=False)  # the text model
    window: Window = field(init=False)
    saved: Path | None = None  # where all of the conversation is kept

    def begin(self, document: str, system: str | None) -> None:
        """Attach what suits the text, which is not read yet."""
        from longreach import configs
        from longreach.hf.checks import find_base
        from longreach.running.conversation import Conversation

        given = self.choice.trained_window
        self.base = find_base(self.model)
        self.window = configs.trained_window(self.base.config, given)
        context, limit = self._first(document)
        extension = self._extend(self.choice.method, context)
        try:
            self.talk = Conversation(self.model, self.tokenizer, document, system, limit, extension, self.choice.chunk_size)
        except BaseException:
            extension.remove()
            raise
        stored.announce(self.out, extension)

    def end(self) -> None:
        self.extension.remove()

    @property
    def extension(self) -> Extension:
        assert self.talk.extension is not None
        return self.talk.extension

    @property
    def grows(self) -> bool:
        """Whether the context may change: neither it nor a method with a length of its own was asked for."""
        return self.choice.context is None and (self.choice.method is None or self.choice.method.needs_context)

    def _first(self, document: str) -> tuple[int | None, int | None]:
        """What to declare, and the limit of the conversation."""
        from longreach.methods.stock import Stock

        window = self.window
        method, declared, tokens = self.choice.method, self.choice.context, len(self.tokenizer(document)["input_ids"])
        if declared is not None:
            return declared, declared
        if method is not None and not self.grows:
            limit = method.capacity(window.tokens)
            if limit is not None and tokens >= limit:
                raise ValueError(
                    f"the text has {counted(tokens, 'token')}, and {method.brief()} reaches {limit} on a trained window of {window.tokens}; choose other "
                    "parameters, leave out --method to have them chosen, or pass a shorter text"
                )
            return None, limit
        context = tokens + ROOM
        first = tokens + window.tokens // FIRST + self.max_new_tokens
        if method is None and first <= window.tokens and isinstance(self._dial(window.tokens).method, Stock):
            context = window.tokens
        return context, context

    def _dial(self, context: int) -> DialChoice:
        """The dial's choice, which `extend` will make again."""
        from longreach.planning import dial

        profile = profiles.look(self.choice.profile, self.base, context, self.choice.trained_window).profile
        weight = next(self.model.parameters())
        return dial.choose(self.window, context, dial.budget(self.base.config, weight.dtype, weight.device, self.choice.memory), profile)

    def _extend(self, method: Method | None, context: int | None) -> Extension:
        import longreach

        profile = profiles.find(self.out, self.choice.profile, self.model, method, context, self.choice.trained_window)
        return longreach.extend(self.model, method, context=context, trained_window=self.choice.trained_window, profile=profile, memory=self.choice.memory)

    @contextmanager
    def _taken_off(self) -> Iterator[None]:
        """Inside, no method is attached. If what is to take its place fails, the one before comes back, and reads everything again."""
        talk, before, limit = self.talk, self.extension, self.talk.limit
        before.remove()
        try:
            yield
        except BaseException:
            talk.attach(self._extend(before.method, before.context), limit)
            raise

    def _attach(self, method: Method | None, context: int | None, limit: int | None) -> None:
        """Put another method in place of the one in force. The new one reads everything again."""
        with self._taken_off():
            self.talk.attach(self._extend(method, context), limit)

    def read(self) -> int:
        with progress_bar(self.out, len(self.talk.sequence("?"))) as progress:
            return self.talk.read(progress)

    def ask(self, question: str, sampling: Sampling, stopped: Callable[[], bool] | None) -> Answer:
        self._make_room(question)
        self.saved = None
        with progress_bar(self.out, len(self.talk.sequence(question)) - self.talk.known) as progress:
            known = self.talk.known
            return self.talk.ask(
                question, self.max_new_tokens, sampling=sampling, write=self.out.write, progress=lambda done: progress(max(0, done - known)), stopped=stopped
            )

    def _make_room(self, question: str) -> None:
        """A larger context where the next turn leaves the one in force. Raises ValueError, with everything as it was, where there is none."""
        needed, limit = self.talk.needs(question, self.max_new_tokens), self.talk.limit
        if not self.grows or limit is None or needed <= limit:
            return
        context = self._larger(needed, limit)
        window = self.window.tokens
        self._attach(self.choice.method, context, context)
        left = f"the trained window of {counted(window, 'token')}" if limit == window else f"its context of {counted(limit, 'token')}"
        self.out.note(f"the conversation leaves {left}: reading it again with {self.extension.method}")
        if warning := self.extension.report()["warning"]:
            self.out.warn(warning)

    def _larger(self, needed: int, limit: int) -> int:
        """Twice the limit if the dial has a choice for that without a warning, else less; but so much more that few turns are read again."""
        if self.choice.method is not None:
            return max(2 * limit, needed + ROOM)
        from longreach.planning import dial

        most, _ = dial.reach(self.window.tokens)
        profile = profiles.look(self.choice.profile, self.base, needed, self.choice.trained_window).profile
        if profile is not None and profile.entries and profile.reaches(needed):
            most = profile.entries[-1].context  # beyond it the profile says nothing
        refused: ValueError | None = None
        warned: int | None = None
        for times in (2.0, 1.5, 1.25, 1.0):
            context = max(needed, min(int(times * limit), most))
            if times == 1.0 and warned is not None:
                break
            try:
                if self._dial(context).warning is None:
                    return context
                warned = warned or context
            except ValueError as error:
                refused = error
        if warned is None:
            raise ValueError(f"{refused}" + ("; or forget the turns with /reset" if self.talk.turns else "")) from refused
        return warned

    def reset(self) -> None:
        """Forget the turns. With them goes what was attached for their length."""
        self.talk.reset()
        self.saved = None
        if self.grows:
            context, limit = self._first(self.talk.document)
            if context != self.extension.context:
                self._attach(self.choice.method, context, limit)
                stored.announce(self.out, self.extension)

    def save(self, file: Path) -> None:
        targets.check(self.out, file, targets.DOCUMENT, force=None)
        self.talk.save(file)
        self.saved = file

    def load(self, file: Path) -> None:
        """Take up another conversation, under what it was read with and not under what the options say. If that fails, the one before goes on."""
        from longreach.hf import documents

        documents.facts(file)  # what is no document at all is refused before anything is changed
        before = self.talk
        own = stored.Choice(None, None, self.choice.trained_window, self.choice.chunk_size, memory=self.choice.memory)
        with self._taken_off():
            self.talk = stored.reopen(self.out, self.model, self.tokenizer, own, file)
        self.saved = file
        asked = (("--context", self.choice.context, self.extension.context), ("--method", self.choice.method, self.extension.method))
        gone = [name for name, before_it, now in (*asked, ("the text before", before.document or None, self.talk.document)) if before_it not in (None, now)]
        if gone:
            self.out.warn(f"no longer in force: {', '.join(gone)}; the conversation goes on with the text, method and context that {file} was read with")
