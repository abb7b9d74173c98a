"""The tables and the picture of docs/real-models.md and README.md, from the lines that `real_models.py` measured. Knows plain rows and files only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from common import ROOT, markdown, write_section

from longreach.drawing import canvas
from longreach.evals.scores import clusters
from longreach.quantities import counted

Row = dict[str, Any]
PAGE, README, PICTURES = ROOT / "docs/real-models.md", ROOT / "README.md", ROOT / "docs"
CORE = ("stock", "old rule", "second rule", "dial", "tuned before", "tuned", "rerope", "yarn", "lm-infinite")
PAST = ("second rule", "tuned before")  # what was measured once and is no longer chosen where it was
FORMS = {"chat": "filler, chat template", "raw": "filler, raw prompt", "novel": "hidden in a novel, raw prompt"}
NAMES = {"old rule": "the dial's old rule", "second rule": "its second rule", "dial": "the dial"}
NAMES |= {"rerope": "ReRoPE", "yarn": "YaRN", "lm-infinite": "LM-Infinite"}
LABELS = NAMES | {"dial": "**the dial**"}
PICTURE_LABELS = NAMES | {"tuned": "longreach tune", "tuned before": "longreach tune, before"}
COLOURS = dict(zip(CORE, ("#8a8a8a", "#6fb3e0", "#b08968", canvas.BLUE, "#e3a6a0", "#c0392b", "#2a9d6f", "#8a5ab5", canvas.ORANGE)))


def write_page(models: dict[str, list[Row]]) -> None:
    """Every section that the page has for a model. A model without readings has none."""
    for name, rows in models.items():
        answers = [row for row in rows if row["task"] == "passkeys"]
        if not answers:
            continue
        write_section(PAGE, f"{name} recall", recall(answers))
        write_section(PAGE, f"{name} pairs", pairs(answers))
        write_section(PAGE, f"{name} loss", losses([row for row in rows if row["task"] == "loss"]))
        write_section(PAGE, f"{name} methods", methods(answers))
        write_section(PAGE, f"{name} tasks", others([row for row in rows if row["task"] not in ("passkeys", "loss")]))
        write_section(PAGE, f"{name} settings", settings(rows))
        write_section(PAGE, f"{name} made", made(rows))
        draw(rows, PICTURES / f"real-{name}.png", name)
        if f"<!-- begin {name} -->" in README.read_text(encoding="utf-8"):
            write_section(README, name, first_table(rows))


def ordered(rows: Sequence[Row]) -> list[str]:
    found = {row["setting"] for row in rows}
    return [*(name for name in CORE if name in found), *sorted(found - set(CORE))]


def share(rows: Sequence[Row], setting: str, windows: float, form: str) -> clusters.Share | None:
    groups = [[q["score"] for q in row["questions"]] for row in rows if (row["setting"], row["windows"], row["form"]) == (setting, windows, form)]
    return clusters.share(groups) if groups else None


def cell(found: clusters.Share | None) -> str:
    if found is None:
        return ""
    few = "" if found.documents >= 4 else f", {found.documents} documents" if found.documents > 1 else ", one document"
    return f"{found.found:.4g} of {found.n} ({100 * found.low:.0f} to {100 * found.high:.0f} %{few})"


def recall(rows: Sequence[Row]) -> str:
    parts = []
    windows = sorted({row["windows"] for row in rows})
    lengths = {row["windows"]: row["length"] for row in rows}
    for form, title in FORMS.items():
        body = [
            [LABELS.get(name, name), *(cell(share(rows, name, w, form)) for w in windows)]
            for name in ordered(rows)
            if name in CORE and any(share(rows, name, w, form) for w in windows)
        ]
        if body:
            parts.append(f"Keys found, {title}:\n\n" + markdown(["", *(f"{lengths[w]} tokens ({w:g}x)" for w in windows)], body))
    return "\n\n".join(parts)


def pairs(rows: Sequence[Row]) -> str:
    """The dial against the others, on the documents that both have read."""
    beyond = sorted({(row["windows"], row["form"]) for row in rows if row["windows"] > 1}, key=lambda key: (key[0], list(FORMS).index(key[1])))
    length = {row["windows"]: row["length"] for row in rows}
    scores = {(row["setting"], row["windows"], row["form"], row["document"]): [q["score"] for q in row["questions"]] for row in rows}
    body = []
    for name in (name for name in ordered(rows) if name != "dial"):
        cells = []
        for place in beyond:
            both = [n for n in range(100) if ("dial", *place, n) in scores and (name, *place, n) in scores]
            if not both:
                cells.append("")
                continue
            found = clusters.compare([scores[("dial", *place, n)] for n in both], [scores[(name, *place, n)] for n in both])
            cells.append(f"{found.only_a:.4g}, {found.only_b:.4g} (p = {found.p:.2g})")
        if any(cells):
            body.append([LABELS.get(name, name), *cells])
    if not body:
        return "Not measured yet."
    head = ["", *(f"{length[w]} tokens, {FORMS[form].removeprefix('filler, ')}" for w, form in beyond)]
    return markdown(head, body)


def losses(rows: Sequence[Row]) -> str:
    """The mean over the last two segments before a place, where it was read under the setting for the shortest of the lengths that reach it."""
    if not rows:
        return "Not measured yet."
    lengths = sorted({row["length"] for row in rows})
    window = next(row["length"] / row["windows"] for row in rows)
    places = [window * part for part in (0.5, 1.0, 1.5, 2.0) if window * part <= lengths[-1]]
    books = len({row["document"] for row in rows})
    body = []
    for name in ordered(rows):
        cells = []
        for place in places:
            end, length = int(place // rows[0]["segment"]), min(n for n in lengths if n >= place)
            values = [fmean(row["losses"][max(0, end - 2) : end]) for row in rows if (row["setting"], row["length"]) == (name, length)]
            few = f" ({counted(len(values), 'passage')})" if len(values) < books else ""
            cells.append(f"{fmean(values):.2f}{few}" if values else "")
        body.append([LABELS.get(name, name), *cells])
    head = ["", *(f"at {place:.0f} ({place / window:g}x)" for place in places)]
    under = f"under the setting for {lengths[0]} tokens" + "".join(f", then under that for {length}" for length in lengths[1:])
    return (
        f"Nats per token over the 2048 tokens before a place, mean of {counted(books, 'passage')}, {under}. Texts inside the window the dial reads with plain "
        f"attention: what its row says there is what a longer text costs in its beginning.\n\n{markdown(head, body)}"
    )


def methods(rows: Sequence[Row]) -> str:
    at = [row for row in rows if row["windows"] == 1.5 and row["form"] in ("raw", "chat")]
    body = []
    for name in ordered(at):
        mine = [row for row in at if row["setting"] == name]
        body.append([LABELS.get(name, name), f"`{mine[0]['parameters']}`", *(cell(share(at, name, 1.5, form)) for form in ("chat", "raw")), cost(mine)])
    return markdown(["", "parameters", "chat template", "raw prompt", "reading, KV cache"], body)


def cost(rows: Sequence[Row]) -> str:
    seconds = median(row["prefill_seconds"] for row in rows)
    held = max((row["bytes"] or 0 for row in rows), default=0)
    return f"{seconds:.0f} s" + (f", {held / 2**20:.0f} MiB" if held else "")


def others(rows: Sequence[Row]) -> str:
    if not rows:
        return "Not measured yet."
    keys = sorted({(row["task"], row["setting"], row["windows"]) for row in rows}, key=lambda key: (key[0], CORE.index(key[1]), key[2]))
    body = []
    for task, setting, windows in keys:
        groups = [[q["score"] for q in row["questions"]] for row in rows if (row["task"], row["setting"], row["windows"]) == (task, setting, windows)]
        found = clusters.share(groups)
        percent = f"{100 * found.value:.0f} % of {found.n} ({100 * found.low:.0f} to {100 * found.high:.0f} %)"
        body.append([task, LABELS.get(setting, setting), f"{windows:g}x", percent])
    return markdown(["task", "", "length", "score"], body)


def settings(rows: Sequence[Row]) -> str:
    keys = sorted({(CORE.index(row["setting"]), row["setting"], row["length"], row["parameters"]) for row in rows if row["setting"] in CORE})
    merged: dict[tuple[str, str], list[int]] = {}
    for _, setting, length, parameters in keys:
        merged.setdefault((setting, parameters), []).append(length)
    return markdown(["", "parameters", "at"], [[LABELS.get(s, s), f"`{p}`", ", ".join(map(str, lengths))] for (s, p), lengths in merged.items()])


def made(rows: Sequence[Row]) -> str:
    """Readings were taken on several days, and need not be of one machine."""

    def several(values: Iterable[str]) -> str:
        return " or ".join(sorted(set(values)))

    loads = sorted(row["facts"]["load_at_start"] or 0 for row in rows)
    dates = sorted(row["facts"]["date"][:10] for row in rows)
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return (
        f"{len(rows)} readings, {span}; {several(row['facts']['cpu'] for row in rows)}, {several(counted(row['facts']['threads'], 'thread') for row in rows)}, "
        f"{several(row['dtype'].removeprefix('torch.') for row in rows)}, PyTorch {several(row['facts']['torch'] for row in rows)}, "
        f"Transformers {several(row['facts']['transformers'] for row in rows)}; load at the start of a reading {loads[0]:.1f} to {loads[-1]:.1f}, median "
        f"{median(loads):.1f}: where it is above the number of threads, seconds say little."
    )


def first_table(rows: Sequence[Row]) -> str:
    """What users get, without what was: the old rules are on the page."""
    answers, loss = [row for row in rows if row["task"] == "passkeys"], [row for row in rows if row["task"] == "loss"]
    length = {row["windows"]: row["length"] for row in rows}
    columns = [(w, form) for w in (1.5, 2.0) for form in ("chat", "raw") if any((row["windows"], row["form"]) == (w, form) for row in answers)]
    body = []
    for name in (name for name in ordered(answers) if name in CORE and name not in ("old rule", *PAST)):
        cells = [cell(share(answers, name, w, form)) for w, form in columns]
        if any(cells):
            found = [fmean(row["losses"][-2:]) for row in loss if row["setting"] == name and row["windows"] == 2.0]
            body.append([LABELS.get(name, name), *cells, *([f"{fmean(found):.2f}" if found else ""] if loss else [])])
    inside = [cell(share(answers, "stock", w, form)) for w, form in ((1.0, "chat"), (1.0, "raw"))]
    names = {"chat": "chat template", "raw": "raw prompt"}
    head = ["", *(f"{length[w]} tokens, {names[form]}" for w, form in columns), *(["loss at twice the window"] if loss else [])]
    ceiling = f"Inside the window ({length[1.0]} tokens) plain attention finds {inside[0]} with the chat template and {inside[1]} without."
    return f"{markdown(head, body)}\n\n{ceiling}"


# -- the picture --------------------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: Path, name: str) -> None:
    answers, loss = [row for row in rows if row["task"] == "passkeys"], [row for row in rows if row["task"] == "loss"]
    forms = [form for form in FORMS if any(row["form"] == form for row in answers)]  # what was not measured has no panel
    ratios = [*([1.0] * len(forms)), *([1.25] if loss else [])]
    figure = canvas.figure(1.2 + 2.9 * sum(ratios), 3.9, dpi=150)
    axes = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    windows = sorted({row["windows"] for row in answers})
    for axis, form in zip(axes, forms):
        for shift, setting in enumerate(setting for setting in ordered(answers) if setting in CORE):
            points = [(w, found) for w in windows if (found := share(answers, setting, w, form)) is not None]
            if not points:
                continue
            x = [w * 1.012 ** (shift - 3) for w, _ in points]
            y = [100 * found.value for _, found in points]
            ends = [[value - 100 * found.low for value, (_, found) in zip(y, points)], [100 * found.high - value for value, (_, found) in zip(y, points)]]
            width, label = 2.2 if setting == "dial" else 1.3, PICTURE_LABELS.get(setting, setting)
            axis.errorbar(x, y, ends, color=COLOURS[setting], label=label, marker="o", ms=4, lw=width, elinewidth=0.7)
        axis.axvline(1, color="black", ls=":", lw=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(windows, [f"{w:g}x" for w in windows], fontsize=8.5)
        axis.minorticks_off()
        axis.set_ylim(-4, 104)
        axis.set_title(FORMS[form], fontsize=10)
        axis.set_xlabel("length in trained windows", fontsize=9)
        axis.tick_params(labelsize=8.5)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("keys found (%)", fontsize=9)
    if loss:
        _losses_along(axes[-1], loss)
    canvas.legend(figure, axes[0])
    figure.suptitle(f"{name}: keys found by length (95 % intervals, clustered by document)" + (", and the loss along a text" if loss else ""), fontsize=10)
    canvas.save(figure, path)


def _losses_along(axis: Any, loss: Sequence[Row]) -> None:
    """Those of the longest texts, of settings that have read all of them."""
    longest = [row for row in loss if row["length"] == max(row["length"] for row in loss)]
    passages = {row["document"] for row in longest}
    for setting in (setting for setting in ordered(longest) if setting in CORE):
        mine = [row for row in longest if row["setting"] == setting]
        if {row["document"] for row in mine} != passages:
            continue
        curve = [fmean(values) for values in zip(*(row["losses"] for row in mine))]
        smooth = [fmean(curve[max(0, n - 1) : n + 1]) for n in range(len(curve))]
        axis.plot([(n + 1) * mine[0]["segment"] * mine[0]["windows"] / mine[0]["length"] for n in range(len(curve))], smooth, color=COLOURS[setting], lw=1.6)
    axis.axvline(1, color="black", ls=":", lw=1)
    axis.set_title("loss along a novel (nats per token)", fontsize=10)
    axis.set_xlabel("position in trained windows", fontsize=9)
    axis.tick_params(labelsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)
    lowest = math.floor(4 * min(value for row in loss for value in row["losses"])) / 4
    axis.set_ylim(lowest, lowest + 2)
