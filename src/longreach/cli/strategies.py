"""`--strategy`: a text is not read whole into a cache, but worked on by the model. Here: InfiniRetri, for `run` and `eval run`.

Knows options and reports; how a text is read and what is kept of it is in apps/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longreach.cli import common, profiles, stored, text
from longreach.cli.common import Output
from longreach.cli.console import Pace
from longreach.quantities import CHUNK_SIZE, counted

if TYPE_CHECKING:
    from longreach.apps.infiniretri.evaluation import RetrievalEngine
    from longreach.apps.infiniretri.reading import InfiniRetri, Retrieved
    from longreach.evals.harness.model_engine import ModelEngine
    from longreach.hf.extension import Extension
    from longreach.hf.interfaces import CausalLM, Tokenizer
    from longreach.running.sampling import Sampling

def _layer(given: str | int) -> int | str:
    """ "18" -> 18; words stay."""
    try:
        return given if given in ("auto", "last") else int(given)
    except ValueError:
        raise typer.BadParameter(f"it must be the number of a layer, last or auto, not {given!r}") from None


Name = Literal["infiniretri"]
Strategy = Annotated[
    Name | None, typer.Option("--strategy", help="infiniretri: read a text of any length in chunks and keep the sentences that the question attends to.")
]
ChunkTokens = Annotated[
    int | None, typer.Option("--chunk-tokens", parser=common.tokens, metavar="TOKENS", help="With --strategy: of the text in one forward; 1024, if they fit.")
]
MemoryTokens = Annotated[
    int | None, typer.Option("--memory-tokens", parser=common.tokens, metavar="TOKENS", help="With --strategy: kept of the text; half of a chunk if not given.")
]


Layer = Annotated[
    Any,
    typer.Option("--layer", parser=_layer, metavar="NUMBER", help="With --strategy: whose attention is looked at; or last; or auto, which tests them."),
]


@dataclass(frozen=True)
class Given:
    """What the options say of a strategy."""

    name: Name | None
    chunk_tokens: int | None
    memory_tokens: int | None
    layer: Any  # a number, "last", "auto" or None

    def check(self, chunk_size: int, **others: Any) -> None:
        """`chunk_size` and `others`: options that do not go with a strategy, by their names. Raises ValueError where something does not agree."""
        others["chunk_size"] = None if chunk_size == CHUNK_SIZE else chunk_size
        own = {"--chunk-tokens": self.chunk_tokens, "--memory-tokens": self.memory_tokens, "--layer": self.layer}
        if self.name is None and (idle := [option for option, value in own.items() if value is not None]):
            says = "says" if len(idle) == 1 else "say"
            raise ValueError(f"{' and '.join(idle)} {says} how a strategy reads; pass --strategy infiniretri too, or leave it out")
        if self.name is not None and (wrong := [f"--{name.replace('_', '-')}" for name, value in others.items() if value is not None]):
            both = " and ".join(wrong)
            raise ValueError(f"--strategy {self.name} keeps sentences and no cache, so {both} cannot be used with it; leave out one or the other")

    def asking(self, out: Output, extension: Extension, tokenizer: Tokenizer, system: str | None = None) -> InfiniRetri:
        from longreach.apps.infiniretri.reading import InfiniRetri
        from longreach.apps.infiniretri.sizes import whole

        asking = InfiniRetri(extension, tokenizer, self.chunk_tokens, self.memory_tokens, layer="auto" if self.layer is None else self.layer, system=system)
        if asking.layer != "auto" or len(whole(extension)) < 2:  # one layer is not compared
            return asking
        found = asking.calibrate()
        out.note(f"layer {found.layer} is looked at: the sentence that answers is on average among the best {found.needed[found.layer]:.0f} tokens of a chunk")
        return replace(asking, layer=found.layer)

    def engine(self, out: Output, found: ModelEngine) -> tuple[RetrievalEngine, dict[str, Any]]:
        """What answers the samples of an evaluation, and what decides its answers."""
        from longreach.apps.infiniretri.evaluation import RetrievalEngine

        assert found.extension is not None
        asking = self.asking(out, found.extension, found.tokenizer)
        return RetrievalEngine(asking), asking.to_json()


def source(file: str | None, max_bytes: int | None, request: text.Request, out: Output, encoding: str | None) -> Iterable[str]:
    """The text in pieces. A file is not held in memory, unless a sentence is to be hidden in it. What is no text is said before the work begins."""
    if file is None or file == text.STDIN or request.hidden is not None:
        whole = text.Request(text.read(file, max_bytes or text.LARGEST_FILE, out.note, encoding), request.prompt, None, request.hidden, request.depth)
        return [whole.text]
    pieces = text.pieces(file, max_bytes, out.note, encoding)
    return chain([*islice(pieces, 1)], pieces)


def run(
    out: Output, name: str, model: CausalLM, tokenizer: Tokenizer, choice: stored.Choice, pieces: Iterable[str], request: text.Request, max_new_tokens: int,
    sampling: Sampling, given: Given,
) -> None:  # fmt: skip
    """Read, answer, report."""
    import longreach
    from longreach.planning.machine import peak_memory

    method = choice.method or (longreach.Stock() if choice.context is None else None)
    profile = profiles.find(out, choice.profile, model, method, choice.context, choice.trained_window)
    with longreach.extend(
        model, method, context=choice.context, trained_window=choice.trained_window, profile=profile, memory=choice.memory
    ) as extension:
        stored.announce(out, extension)
        ask = given.asking(out, extension, tokenizer, request.system).ask
        found = ask(pieces, request.prompt, max_new_tokens=max_new_tokens, sampling=sampling, write=out.write, progress=_progress(out))
        facts = extension.report()
    result = {"model": name, "strategy": given.name, **found.to_json(), "method": facts["method"], "peak_memory_bytes": peak_memory(), "extension": facts}
    if not out.as_json:
        out.write("\n")
        out.aside(table(found))
    out.finish(result, lambda console: None)


def table(found: Retrieved) -> Any:
    rows = [
        ("read", f"{counted(found.tokens, 'token')} in {counted(found.chunks, 'chunk')} of at most {found.sizes.chunk}, {found.reading_seconds:.1f} s"),
        ("answer", f"{counted(found.new_tokens, 'token')}, {found.answer_seconds:.1f} s"),
        ("looked at", f"layer {found.layer}, prompts of at most {counted(found.sizes.limit, 'token')}"),
        ("kept", f"{counted(len(found.sentences), 'sentence')}, at most {counted(found.sizes.memory, 'token')}"),
        *((f"{sentence.start}", " ".join(sentence.text.split())) for sentence in found.sentences),
    ]
    return common.pairs_table("", rows)


def _progress(out: Output) -> Callable[[int], None]:
    """A line now and then: how long the text is need not be known."""
    pace = Pace()

    def update(done: int) -> None:
        if pace.due():
            out.note(f"read {counted(done, 'character')} in {pace.seconds:.0f} s")

    return update
