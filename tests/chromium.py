"""The Chromium that is installed, for tests of the pages; and their pictures in the documentation: python tests/chromium.py docs/page.png docs/attribution.png

A browser is never downloaded. LONGREACH_CHROMIUM names one; else the first of these on the path is taken.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT = 60_000  # milliseconds: a busy machine is slow


def installed() -> str | None:
    return os.environ.get("LONGREACH_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=WAIT)
    with sync_playwright() as started:
        arguments = ["--disable-gpu", "--disable-dev-shm-usage", *(["--no-sandbox"] if os.getuid() == 0 else [])]
        found = started.chromium.launch(executable_path=installed(), args=arguments, timeout=WAIT)
        try:
            yield found
        finally:
            found.close()


@contextmanager
def opened(found: Any, url: str, width: int = 1200, height: int = 900, scheme: str = "light", **more: Any) -> Iterator[Any]:
    """The page, in a browser context of its own."""
    context = found.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **more)
    context.set_default_timeout(WAIT)
    try:
        page = context.new_page()
        page.goto(url)
        yield page
    finally:
        context.close()


def be_brief(page: Any, tokens: int = 24) -> None:
    page.locator("#most").evaluate("(field, tokens) => { field.value = tokens }", tokens)


def ask_the_example(page: Any) -> None:
    from playwright.sync_api import expect

    expect(page.locator("#sight-said")).to_contain_text("farthest")
    be_brief(page)
    page.get_by_role("button", name="Try an example").click()
    expect(page.locator("#fit")).to_contain_text("times the trained window")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Answered.")


def picture(file: Path) -> None:
    """Questions about the example, as README shows them."""
    from playwright.sync_api import expect

    import longreach
    from served import served

    model, tokenizer = longreach.load("nano")
    shot = file.with_suffix(".raw.png")
    with (
        longreach.extend(model, context=4096) as extension,
        served(extension, tokenizer) as server,
        browser() as found,
        opened(found, server.url, 1120, 940) as page,
    ):
        ask_the_example(page)
        page.locator("#question").fill("Remind me: what is the pass key?")
        page.keyboard.press("Enter")
        expect(page.locator(".cost").nth(1)).to_contain_text("tokens")
        expect(page.locator("#status")).to_have_text("Answered.")
        page.mouse.move(0, 0)
        page.locator("#question").blur()
        page.wait_for_timeout(1500)  # the last picture is drawn
        page.screenshot(path=shot, full_page=True)
    reduce(shot, file)


def picture_of_attribution(file: Path) -> None:
    """The page of `longreach attribute`, of a key that is hidden in the book."""
    import longreach
    from longreach.apps.attribution import page as pages

    model, tokenizer = longreach.load("nano")
    text, key = longreach.shipped_book()[40_000:45_400], "The pass key is 48213. Remember it. 48213 is the pass key. "
    text = text[: (at := text.index(". ", 1_300) + 2)] + key + text[at:]
    shot, html = file.with_suffix(".raw.png"), file.with_suffix(".raw.html")
    with longreach.extend(model, context=2048) as extension:
        found = longreach.attribute(extension, tokenizer, text, "What is the pass key?", words=40, max_new_tokens=16)
    html.write_text(pages.render(found, text, "Moby-Dick, with a sentence hidden in it", "nano"), encoding="utf-8")
    with browser() as chromium, opened(chromium, html.resolve().as_uri(), 1120, 1180) as page:
        page.screenshot(path=shot)
    reduce(shot, file)
    html.unlink()


def reduce(shot: Path, file: Path) -> None:
    """A screenshot becomes a picture of ours, with few colours."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from longreach.drawing import canvas
    from longreach.files import write_by

    signed = PngInfo()
    for name, text in canvas.SIGNATURE.items():
        signed.add_text(name, text)
    with Image.open(shot) as drawn:
        reduced = drawn.convert("RGB").quantize(canvas.REDUCED, Image.Quantize.MAXCOVERAGE)  # a small spot keeps its colour
    write_by(file, lambda part: reduced.save(part, "png", optimize=True, pnginfo=signed), "picture")
    shot.unlink()


if __name__ == "__main__":
    for name in map(Path, sys.argv[1:]):
        (picture_of_attribution if name.stem == "attribution" else picture)(name)
