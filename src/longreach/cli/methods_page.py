"""The generated parts of `docs/methods.md`: a gallery, and for every method its picture, formula, parameters and cost.

Knows dataclasses, their docstrings and their layouts; loads no model. What is written by hand in the page stands between the generated
sections, `<!-- begin NAME -->` .. `<!-- end NAME -->`, and is never touched.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path

from longreach import configs, files
from longreach.cli import parameters
from longreach.cli.distances import pairs_of
from longreach.core.matrices import matrices
from longreach.core.segments import Retention, forms, queries
from longreach.drawing import distances
from longreach.methods import registry
from longreach.methods.base import DEEP, Method
from longreach.methods.combined import Combined
from longreach.methods.lm_infinite import LMInfinite
from longreach.methods.longrope import LongRoPE
from longreach.methods.yarn import YaRN
from longreach.planning import dial
from longreach.planning.work import count as count_of

FOLDER = "pictures"  # beside the page
COLUMNS = 3  # of the gallery
DIMS = 64  # rotated dims of a head, and rope_theta, of the pictures of frequency methods: nano's
BASE = 1e4
COSTED = configs.Window(4096, "for the table"), 32768


@dataclass(frozen=True)
class Example:
    """A method with the parameters that a picture shows."""

    method: Method
    length: int
    window: int

    @property
    def command(self) -> str:
        dims = f" --rotary-dims {DIMS}" if self.method.rescales else ""
        shown = f"--length {self.length} --trained-window {self.window}{dims} --png docs/{FOLDER}/{self.method.name}.png"
        return f"longreach distances {parameters.brief(self.method.to_json())} {shown}"


def example(kind: type[Method]) -> Example:
    """The recommended setting. Positions are shown on a tiny window, where single tokens can be seen."""
    if kind is Combined:
        return Example(Combined(YaRN(2.0), LMInfinite(n_local=1024)), 2048, 512)
    if kind is LongRoPE:  # real lists are searched for a model; these grow evenly from the fastest pair to the slowest
        return Example(LongRoPE(4.0, tuple(round(4.0 ** (a / (DIMS // 2 - 1)), 3) for a in range(DIMS // 2))), 2048, 512)
    window, length = (512, 2048) if kind.rescales else (64, 192)
    return Example(dial.recommended(kind, configs.Window(window, "of the picture"), length), length, window)


def draw(shown: Example, path: Path) -> None:
    method = shown.method
    pairs = pairs_of(method, shown.window, shown.length, BASE, DIMS) if method.rescales else None
    distances.draw(matrices(method.layout().segments, shown.length).distance, method.brief(), path, shown.window, pairs)


# -- words ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doc:
    """A method's docstring: what it does with its formula, and the meaning of every parameter."""

    body: str
    meanings: dict[str, str]


def read_doc(kind: type[Method]) -> Doc:
    names = [p.name for p in parameters.of(kind)]
    body: list[str] = []
    meanings: dict[str, list[str]] = {}
    current: str | None = None
    for line in (inspect.getdoc(kind) or "").splitlines():
        first = line.split("  ", 1)[0]
        if first in names and "  " in line:
            current = first
            meanings[current] = [line[len(first) :].strip()]
        elif current is not None and line.startswith(" "):
            meanings[current].append(line.strip())
        elif line.startswith("Raises "):
            break
        elif line.strip() or current is None:
            current = None
            body.append(line)
    if missing := [name for name in names if name not in meanings]:
        raise ValueError(f"the docstring of {kind.__name__} does not explain {', '.join(missing)}; add a line 'NAME  meaning' for each, as in SelfExtend")
    return Doc("\n".join(body).strip(), {name: " ".join(words).rstrip(".") for name, words in meanings.items()})


def parameter_table(kind: type[Method], doc: Doc) -> str:
    rows = ["| parameter | type | default | meaning |", "|---|---|---|---|"]
    for p in parameters.of(kind):
        default = "required" if p.required else "none" if p.default is None else f"`{p.default}`"
        cells = (f"`{p.name}`", p.type, default, doc.meanings[p.name])
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) if len(rows) > 2 else "No parameters."


def paper(kind: type[Method]) -> str:
    linked = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", kind.paper)
    linked = re.sub(r"(?<![/\w])(github\.com/[\w./-]+)", r"[\1](https://\1)", linked)
    return re.sub(r"llama\.cpp, pull request (\d+)", r"[llama.cpp, pull request \1](https://github.com/ggml-org/llama.cpp/pull/\1)", linked)


@dataclass(frozen=True)
class Cost:
    """Vectors of one KV head in one layer and row, once `tokens` tokens have been read: what the next query meets, and what is held for later ones."""

    tokens: int
    read: int
    keys: int
    values: int


def cost(method: Method, tokens: int) -> Cost:
    layout = method.layout(DEEP)
    held = forms(layout)
    union = Retention()
    for retention in held.values():
        union |= retention
    count = lambda r: tokens if r.tail is None else min(tokens, r.head + r.tail)  # noqa: E731
    return Cost(tokens, count_of(layout, tokens - 1, tokens).pairs, sum(map(count, held.values())), count(union))


def cost_sentence(kind: type[Method]) -> str:
    window, tokens = COSTED
    method = example(kind).method if kind in (Combined, LongRoPE) else dial.recommended(kind, window, tokens)
    found = cost(method, tokens)
    growth = "and stops growing" if method.bounded else "and grows with the text"
    chosen = ""
    if (choice := method.choice) is not None:
        blocks, width, each = tokens // choice.block, choice.index.width, " for every query head" if choice.index.each == "head" else ""
        who = "the layer" if choice.heads == "layer" else f"each {choice.heads}"
        chosen = f", which {who} chooses by summaries of {blocks} blocks, as large as {blocks * width} keys{each} and kept too"
        if choice.index.probes:
            chosen = f", which {who} finds by looking up some of the others; the last of its stages is asked anew every {choice.refresh[-1]} tokens"
        if kept := queries(method.layout(DEEP)):
            chosen += f", with the last {max(of.tail or 0 for of in kept.values())} queries"
    work = f"a new token attends to {found.read} keys{chosen}; the KV cache holds {found.keys} keys and {found.values} values {growth}"
    setting = f"`{method.brief()}`" if kind is not LongRoPE else "any lists"
    trained = "" if kind in (Combined, LongRoPE) else f" on a trained window of {window.tokens}"
    return f"**Cost** at {tokens} tokens with {setting}{trained}, per KV head, layer and row: {work} (stock: {tokens} of each)."


def section(kind: type[Method]) -> str:
    doc, shown = read_doc(kind), example(kind)
    alt = f"Distances of {shown.method.brief()}" + (", and the turns of its rotary pairs" if kind.rescales else "")
    head = f"`{kind.__name__}`, on the command line `{kind.name}`. Paper or source: {paper(kind)}. Recalls {kind.recalls}."
    picture = f'<img src="{FOLDER}/{kind.name}.png" width="{680 if kind.rescales else 400}" alt="{alt}">'
    drawn = f"Picture: `{shown.command}`"
    return "\n\n".join((head, picture, drawn, doc.body, parameter_table(kind, doc), cost_sentence(kind)))


def gallery() -> str:
    """All pictures side by side: methods of positions first, on the same text and window with the same colours."""
    kinds = sorted(registry().values(), key=lambda kind: (kind.rescales, kind.name))
    positions = [kind for kind in kinds if not kind.rescales]
    shown = example(positions[0])
    lead = (
        f"Methods of positions, {shown.length} tokens on a trained window of {shown.window}: the colour is the effective distance, on the same scale in every "
        "picture. Orange distances were never trained; white keys are not visible."
    )
    others = [kind for kind in kinds if kind.rescales]
    shown = example(others[0])
    second = (
        f"Frequency methods, which keep the true distances, {shown.length} tokens on a trained window of {shown.window}. Beside the distances: how many tokens "
        f"one full turn of every rotary pair takes (rope_theta {BASE:g}, {DIMS} rotated dims). At an orange distance, some pair has an angle that was never "
        "trained."
    )
    return "\n\n".join((lead, grid(positions, COLUMNS), second, grid(others, 2)))


def grid(kinds: list[type[Method]], columns: int) -> str:
    rows = []
    for start in range(0, len(kinds), columns):
        cells = [f"[![{kind.__name__}]({FOLDER}/{kind.name}.png)](#{anchor(kind)})" for kind in kinds[start : start + columns]]
        rows.append("| " + " | ".join(cells + [""] * (columns - len(cells))) + " |")
    return "\n".join((rows[0], "|" + "---|" * columns, *rows[1:]))


def anchor(kind: type[Method]) -> str:
    """Every generated section carries an anchor of its own, whatever the heading above it says."""
    return f"method-{kind.name}"


# -- the page ---------------------------------------------------------------------------------------------------------------------


def sections() -> dict[str, str]:
    return {"gallery": gallery()} | {kind.name: f'<a id="{anchor(kind)}"></a>\n\n{section(kind)}' for kind in registry().values()}


def filled(page: str) -> str:
    """The page with every generated section as it should be."""
    for name, content in sections().items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the page has no section for {name}; add the lines {begin} and {end} below its heading")
        page = f"{before}{begin}\n{content}\n{end}{after}"
    return page


def write(path: Path) -> list[Path]:
    """Fill the page and draw the pictures -> the files written."""
    if not path.is_file():
        raise ValueError(f"there is no page {str(path)!r} with generated sections; pass docs/methods.md of the repository")
    try:
        page = filled(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{str(path)!r} is not text in UTF-8; pass docs/methods.md of the repository") from None
    folder = path.parent / FOLDER
    folder.mkdir(exist_ok=True)
    pictures = []
    for kind in registry().values():
        pictures.append(folder / f"{kind.name}.png")
        draw(example(kind), pictures[-1])
    files.write(path, page, "page")
    return [path, *pictures]
