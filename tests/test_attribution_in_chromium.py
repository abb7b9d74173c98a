"""The page of an attribution in the Chromium that is installed: it takes nothing for markup, asks nobody for anything, and can be read in light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chromium import browser, installed, opened
from longreach.apps.attribution import page as pages
from test_attribution import EVIL, result

pytest.importorskip("playwright", reason="the page is tested with playwright: pip install 'longreach[dev]'")
pytestmark = pytest.mark.skipif(installed() is None, reason="no Chromium is installed: apt-get install chromium, or name one in LONGREACH_CHROMIUM")


def listen(page: Any) -> list[str]:
    """What the console says, what is asked for and what is shown as a dialog."""
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: said.append(request.url))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    return said


def test_in_a_browser(tmp_path: Path) -> None:
    from playwright.sync_api import expect

    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    words = f"Before. {EVIL} The marked part is here.\n\n" + "Between. " * 800 + "A second part. After."
    spans = [(words.index("The marked"), words.index("Between"), 8.0), (words.index("A second"), words.index("After"), 0.4)]
    file = tmp_path / "why.html"
    file.write_text(pages.render(result(spans, words), words, EVIL, EVIL), encoding="utf-8")
    with browser() as found:
        for scheme in ("light", "dark"):
            with opened(found, file.as_uri(), 1120, 900, scheme) as page:
                said = listen(page)
                page.reload()
                wrong = [(each["id"], each["help"]) for each in axe.run(page).response["violations"]]
                assert page.title() == "Where the answer came from" and not wrong and said == [file.as_uri()]
                assert not page.locator("#part-2").evaluate("e => e.getBoundingClientRect().top < innerHeight")
                page.locator("ol a").nth(1).click()
                expect(page.locator("#part-2")).to_be_in_viewport()
        with opened(found, file.as_uri(), 360, 800) as page:
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
