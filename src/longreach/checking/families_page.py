"""The page of the families, docs/families.md, from measured cells.

Knows Markdown and what `exactness` measured; measures nothing.
"""

from __future__ import annotations

from longreach.checking.exactness import FAST, NEUTRAL, NEUTRAL_TOKENS, TOKENS, Cell, Family
from longreach.methods import registry

METHOD = "the method"


def page(found: list[Family]) -> str:
    """The whole page. Sentences of refusals that differ only in the method's name share one number."""
    open_ones, closed = [f for f in found if f.refusal is None], [f for f in found if f.refusal is not None]
    names = list(dict.fromkeys(cell.method for family in open_ones for cell in family.cells))
    reasons = list(dict.fromkeys(reason(cell) for family in open_ones for cell in family.cells if cell.refusal))
    remarks = {family.name: cell.remark for family in open_ones for cell in family.cells if cell.remark and cell.method not in ("stock",)}
    exact = sum(cell.refusal is None for family in open_ones for cell in family.cells)
    refused = sum(cell.refusal is not None for family in open_ones for cell in family.cells)
    parts = [
        "# Families",
        f"Written by `longreach check --all --markdown docs/families.md`: {len(names)} methods on {len(open_ones)} families, {exact} combinations exact, "
        f"{refused} refused with a reason, and {len(closed)} families to which no method can be attached. Each family is represented by a tiny model with "
        "random weights and a real architecture of Transformers, in fp32 on the CPU. This proves that the arithmetic is right, not that a method is "
        "useful there.",
        f"Every cell shows two differences, relative to the largest logit. The first compares the fast path with a cache to the dense truth, on {TOKENS} "
        f"tokens, with small parameters that use every part of the method; the gate is {FAST:.0e}. The second compares parameters that make the method plain "
        f"attention to the stock model, on {NEUTRAL_TOKENS} tokens; the gate is {NEUTRAL:.0e}. `R1`, `R2`, ... mean refused, for the [reasons](#reasons) "
        "below. The tests check the same cells, and also prefill chunks, decoding, left-padded batches and bf16.",
        "This is not a list of supported models: `extend` reads and verifies the rotary encoding and the attention of the model it is given. A model that is "
        "not listed here is either exact in the same sense, or refused.",
        "## Layers",
        "What each family was trained with. Layers with a sliding window or chunks stay as trained; the method is applied to the full layers. If every "
        "layer has a sliding window, the method replaces it.",
        table(["family", "model", "layers"], [[f.name, f.architecture, f.layers.replace(" | ", ", ")] for f in open_ones]),
        "## Requests read together",
        together(open_ones),
        "## Exactness",
        table(["family", *names], [[f.name, *(shown(cell, reasons) for cell in f.cells)] for f in open_ones]),
        "## Reasons",
        "\n".join(f"- **R{number}**: {sentence}" for number, sentence in enumerate(reasons, 1)) or "No combination is refused.",
    ]
    if remarks:
        parts += ["## Remarks", "\n".join(f"- **{name}**: {remark}" for name, remark in remarks.items())]
    if closed:
        parts += ["## Refused families", table(["family", "model", "reason"], [[f.name, f.architecture, f.refusal or ""] for f in closed])]
    return "\n\n".join(parts) + "\n"


def together(families: list[Family]) -> str:
    """Which families read several requests in one flat forward."""
    alone = [family for family in families if family.alone is not None]
    said = (
        "`extension.flat()` and `longreach.generate` read many requests in one forward. Their first call compares requests that are read together with each "
        "of them alone: a few tokens, also at indices beyond every length of the configuration, and beside a request with enormous activations, which shows a "
        f"quantisation with one scale for a whole tensor. It is exact on {len(families) - len(alone)} of the {len(families)} families"
    )
    return said + (", and refused on:\n\n" + "\n".join(f"- **{family.name}**: {family.alone}" for family in alone) if alone else ".")


def shown(cell: Cell, reasons: list[str]) -> str:
    if cell.refusal is not None:
        return f"R{reasons.index(reason(cell)) + 1}"
    return f"{cell.fast:.0e} {cell.neutral:.0e}{'' if cell.passed else ' FAILS'}"


def reason(cell: Cell) -> str:
    """The refusal without the names of the method, so that methods refused for one reason share it."""
    sentence = cell.refusal or ""
    for name in (registry()[cell.method].__name__, cell.method):
        sentence = sentence.replace(f"{name} would", f"{METHOD} would")
    return sentence


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
