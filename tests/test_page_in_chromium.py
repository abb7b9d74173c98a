"""The page as people use it, in the Chromium that is installed: text, question, stream, stop, errors, keyboard, colours, and what it must never do."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import longreach
from chromium import ask_the_example, be_brief, browser, installed, opened
from served import Served, served

pytest.importorskip("playwright", reason="the page is tested with playwright: pip install 'longreach[dev]'")
pytestmark = pytest.mark.skipif(installed() is None, reason="no Chromium is installed: apt-get install chromium, or name one in LONGREACH_CHROMIUM")

KEY = "The pass key is 48213. Remember it. 48213 is the pass key."
EVIL = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@contextmanager
def serving(**more: Any) -> Iterator[Served]:
    model, tokenizer = longreach.load("nano")
    with longreach.extend(model, context=2048) as extension, served(extension, tokenizer, **more) as found:
        yield found


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving() as found:
        yield found


class Noted:
    """What the console says and what is asked of whom, from the beginning."""

    def __init__(self, page: Any) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.reload()


def drop(page: Any, words: str, name: str = "a.txt") -> None:
    """A file, dropped on the page."""
    make = "([words, name]) => { const data = new DataTransfer(); data.items.add(new File([words], name)); return data; }"
    data = page.evaluate_handle(make, [words, name])
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("#text", event, {"dataTransfer": data})


def tab_to(page: Any, name: str) -> None:
    for _ in range(40):
        if page.evaluate("document.activeElement.id") == name:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not reach {name}")


def expect(where: Any) -> Any:
    from playwright.sync_api import expect

    return expect(where)


def colours(page: Any) -> tuple[int, float]:
    """How many colours a screenshot has, and how light it is."""
    from PIL import Image, ImageStat

    with Image.open(io.BytesIO(page.screenshot(full_page=True))) as drawn:
        found = drawn.convert("RGB")
        return len(found.getcolors(2**24)), ImageStat.Stat(found.convert("L")).mean[0]


def test_a_text_is_dropped_and_asked_about_by_keyboard(chromium: Any, server: Served) -> None:
    book = longreach.shipped_book()[:3000]
    with opened(chromium, server.url) as page:
        noted = Noted(page)
        expect(page.locator("#facts")).to_have_text("modelnanomethodselfextendwindow512context2,048weightsfloat32")
        drop(page, f"{book[:1000]} {KEY} {book[1000:]}")
        expect(page.locator("#text")).to_have_value(f"{book[:1000]} {KEY} {book[1000:]}")
        expect(page.locator("#fit")).to_contain_text("times the trained window of 512, inside the context of 2,048.")
        told = page.locator("#fit").text_content().split(" tokens")[0].replace(",", "")
        assert 512 < int(told) < 1200
        be_brief(page)
        tab_to(page, "question")
        page.keyboard.type("What is the pass key?")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("Answered.")
        assert "48213" in page.locator(".answer").text_content()
        expect(page.locator("#talk")).to_have_attribute("aria-busy", "false")
        cost = page.locator(".cost").text_content()
        assert "tokens/s" in cost and "first word after" in cost and "tokens were cached" in cost, cost
        assert page.evaluate("document.activeElement.id") == "question"  # ready for the next one
        page.keyboard.type("Once more: what is it?")
        page.keyboard.press("Enter")
        expect(page.locator(".turn")).to_have_count(2)
        expect(page.locator(".cost").nth(1)).to_contain_text("tokens/s")
        expect(page.locator("#ruler [class^=s]").nth(3)).to_be_attached()
        # what is drawn: the text as long as it is, what is seen of it, and a picture
        width = page.locator("#ruler .filled").bounding_box()["width"]
        room = page.locator("#ruler .room").first.bounding_box()["width"]
        assert 0.25 < width / room < 0.9 and page.locator("#picture rect").count() > 48
        tab_to(page, "forget")
        page.keyboard.press("Enter")
        expect(page.locator(".turn")).to_have_count(0)
        assert not noted.errors and {url.split("/")[2] for url in noted.requests} == {server.url.split("/")[2]}
        assert colours(page)[0] > 100


def test_an_answer_is_stopped(chromium: Any, server: Served) -> None:
    with opened(chromium, server.url) as page:
        expect(page.locator("#facts")).to_contain_text("nano")
        page.locator("summary").click()
        page.locator("#most").fill("1900")
        for stop in (lambda: page.keyboard.press("Escape"), lambda: page.get_by_role("button", name="Stop").click(force=True)):
            page.locator("#question").fill("Call me Ishmael. Some years ago")
            page.keyboard.press("Enter")
            expect(page.locator(".answer").last).to_have_text(re.compile(r"\w+\W+\w+"))
            assert server.service.worker.on_their_way == 1
            stop()
            expect(page.locator("#status")).to_have_text("Stopped.")
            server.until(lambda: server.service.worker.on_their_way == 0 and server.service.worker.stats.running == 0)
            expect(page.locator(".cost").last).to_contain_text("What was written stays")
            expect(page.get_by_role("button", name="Stop")).to_be_hidden()
            assert page.evaluate("document.activeElement.id") == "question"


def test_other_methods_are_shown_and_not_served(chromium: Any, server: Served) -> None:
    with opened(chromium, server.url) as page:
        noted = Noted(page)
        expect(page.locator("#sight-said")).to_contain_text("sees all of the text")
        assert page.locator("#command").text_content().split()[:4] == ["longreach", "serve", "--model", "nano"]
        page.get_by_role("combobox", name="Method").select_option("lm-infinite")
        page.get_by_label("Length, in tokens").fill("8192")
        expect(page.locator("#command")).to_have_text("longreach serve --model nano --context 8192 --method lm-infinite --n-local 512 ")
        expect(page.locator("#serve-note")).to_contain_text("does not answer here")
        assert page.locator("#picture .unseen").count() > 48 and page.locator("#picture .beyond").count() == 0
        page.get_by_role("combobox", name="Method").select_option("stock")
        expect(page.locator("#sight-said")).to_contain_text("beyond the trained window of 512")
        assert page.locator("#picture .beyond").count() > 20
        page.get_by_role("combobox", name="Method").select_option("longrope")
        expect(page.locator("#sight-said")).to_contain_text("no recommended setting")
        expect(page.locator("#command")).to_be_hidden()
        assert not noted.errors


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible_in_light_and_dark_wide_and_narrow(chromium: Any, server: Served, scheme: str) -> None:
    """By axe: names of controls, roles, order of headings, contrast of every text, and the rest of its rules."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with opened(chromium, server.url, 1200, 800, scheme, bypass_csp=True) as page:  # axe is a script of somebody else's
        problems = [axe.run(page).response["violations"]]
        ask_the_example(page)
        page.locator("summary").click()
        page.evaluate("for (const id of ['key-form', 'problem']) document.getElementById(id).hidden = false")
        page.evaluate("document.getElementById('problem').textContent = 'Words of an error.'")
        for width in (1200, 360):
            page.set_viewport_size({"width": width, "height": 800})
            problems.append(axe.run(page).response["violations"])
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            count, light = colours(page)
            assert count > 100 and (light > 180 if scheme == "light" else light < 80), (count, light)
        assert problems == [[], [], []], json.dumps(problems, indent=1)[:3000]


def test_every_control_has_a_name_and_is_reached_in_order(chromium: Any, server: Served) -> None:
    with opened(chromium, server.url) as page:
        ask_the_example(page)
        page.locator("summary").click()
        page.locator("h1").click()  # from here on
        found = []
        for _ in range(40):
            page.keyboard.press("Tab")
            name = page.evaluate("document.activeElement.id || document.activeElement.tagName.toLowerCase()")
            if name == "body" or name in found:
                break
            found.append(name)
        order = "sample open empty text forget talk question ask summary most temperature method length command copy"
        assert found == order.split()
        box = page.locator("#question")
        box.focus()
        assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "2px"
        box.fill("a line")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("and another")
        assert box.input_value() == "a line\nand another" and page.locator(".turn").count() == 1


def test_a_key_is_asked_for_and_kept_nowhere(chromium: Any) -> None:
    with serving(key="sesame") as server, opened(chromium, server.url) as page:
        expect(page.get_by_label("This server wants an API key")).to_be_focused()
        for wrong, says in (("wrong", "The API key is wrong or missing"), ("schlüssel", "letters, digits and signs of ASCII")):
            page.get_by_label("This server wants an API key").fill(wrong)
            page.keyboard.press("Enter")
            expect(page.locator("#key-note" if wrong == "wrong" else "#problem")).to_contain_text(says)
        page.get_by_label("This server wants an API key").fill("sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#facts")).to_contain_text("nano")
        expect(page.locator("#key-form")).to_be_hidden()
        ask_the_example(page)
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, document.getElementById('key').value]") == [0, 0, "", ""]
        page.reload()
        expect(page.locator("#key-form")).to_be_visible()


def test_texts_and_answers_are_never_markup(chromium: Any, server: Served) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": EVIL}, "finish_reason": None}]}
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    body = "".join(f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n" for data in (chunk, end, "[DONE]"))
    with opened(chromium, server.url) as page:
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body))
        expect(page.locator("#facts")).to_contain_text("nano")
        drop(page, EVIL, f"{EVIL}.txt")
        expect(page.locator("#text")).to_have_value(EVIL)
        page.locator("#question").fill(EVIL)
        page.keyboard.press("Enter")
        expect(page.locator(".answer")).to_have_text(EVIL)
        assert page.locator(".asked").text_content() == EVIL
        assert page.locator("#talk img, #talk script").count() == 0 and page.title() == "nano · Longreach"


PROBLEMS: list[tuple[dict[str, Any] | None, str]] = [
    ({"status": 429, "body": '{"error": {"message": "too many requests wait; come again in a second"}}'}, "Too many requests wait; come again in a second."),
    ({"status": 502, "body": "<html>"}, "The server answered with the status 502, and without a reason."),
    ({"body": 'data: {"error": {"message": "the model failed"}}\n\n'}, "The model failed."),
    (None, "The server cannot be reached."),
    ({"body": 'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'}, "The connection broke off before the answer was whole."),
]


def answering(answer: dict[str, Any] | None) -> Any:
    return lambda route: route.abort() if answer is None else route.fulfill(**answer)


def test_what_goes_wrong_is_said_in_plain_words(chromium: Any, server: Served) -> None:
    with opened(chromium, server.url) as page:
        expect(page.locator("#facts")).to_contain_text("nano")
        be_brief(page)
        page.locator("#question").fill("Why?")
        for answer, says in PROBLEMS:
            page.route("**/v1/chat/completions", answering(answer))
            page.locator("#question").press("Enter")
            expect(page.get_by_role("alert")).to_contain_text(says)
            assert page.locator("#question").input_value() == "Why?"  # nothing is lost
            assert page.locator(".turn").count() == (says == PROBLEMS[-1][1])  # what came of an answer stays to be read
            page.unroute("**/v1/chat/completions")
        page.locator("#question").press("Enter")
        expect(page.locator("#status")).to_have_text("Answered.")
        expect(page.get_by_role("alert")).to_be_hidden()


def test_what_is_no_text_and_what_is_too_long_are_refused(chromium: Any, server: Served) -> None:
    with opened(chromium, server.url) as page:
        expect(page.locator("#facts")).to_contain_text("nano")
        drop(page, "%PDF\0", "a.pdf")
        expect(page.get_by_role("alert")).to_contain_text("a.pdf does not look like a text.")
        page.locator("#text").fill("word " * 3000)
        expect(page.locator("#fit")).to_contain_text("The context of 2,048 has no room for it")
        assert page.locator("#ruler .beyond").count() > 0
        page.locator("#question").fill("Why?")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("more than the context of 2048 tokens")
