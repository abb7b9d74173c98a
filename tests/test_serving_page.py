"""The page without a browser: its files and their rules, and the numbers that it draws beside the definitions they come from."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
import torch

import longreach
from longreach.cli import parameters
from longreach.cli.program import build
from longreach.methods import registry
from longreach.methods.base import Method
from longreach.serving.page import files, routes, seen
from served import Served, served

METHODS = sorted(registry())
MARKUP = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|@import|url\("
KEPT = r"localStorage|sessionStorage|indexedDB|cookie"  # where a key would outlive the page


@contextmanager
def serving(key: str | None = None, **more: Any) -> Iterator[Served]:
    model, tokenizer = longreach.load("nano")
    with longreach.extend(model, **more) as extension, served(extension, tokenizer, key=key) as found:
        yield found


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(context=2048) as found:
        yield found


def get(server: Served, path: str, **more: Any) -> Any:
    answer = httpx.get(server.url + path, timeout=60, **more)
    assert answer.status_code == 200, answer.text
    return answer.json()


# -- files ------------------------------------------------------------------------------------------------------------------------


def test_every_file_is_served_under_the_rules_and_nothing_else_is(server: Served) -> None:
    assert sorted(files.FILES.values()) == sorted(path.name for path in files.FOLDER.iterdir())
    for path, name in files.FILES.items():
        answer = httpx.get(server.url + path)
        assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, files.content(name), files.kind(name))
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "require-trusted-types-for 'script'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"
        assert httpx.head(server.url + path).status_code == 200
    for path in ("/page/", "/page/%2e%2e/page/page.js", "/page/..%2froutes.py", "/page/routes.py", "/page//etc/passwd", "/page/index.html"):
        assert httpx.get(server.url + path).status_code == 404, path
    assert not [path for path in server.app.openapi()["paths"] if path in files.FILES]


def test_the_files_ask_for_nothing_outside_and_make_no_markup() -> None:
    for name in files.FILES.values():
        text = files.content(name).decode()
        found = set(re.findall(r"https?://[^\"' )]+", text))
        assert found <= {"http://www.w3.org/2000/svg"}, (name, found)  # a name, not an address
        assert not re.search(MARKUP, text) and not re.search(KEPT, text), name
        assert len(text.splitlines()) <= 350 and max(map(len, text.splitlines())) <= 160, name


class Page(HTMLParser):
    """What holds, and what is named, in the document."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(files.content("index.html").decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_document_holds_no_script_and_no_style_of_its_own() -> None:
    tags = Page().tags
    assert not [name for _, attributes in tags for name in attributes if name == "style" or name.startswith("on")]
    assert not [tag for tag, _ in tags if tag in ("style", "iframe", "object")]
    linked = {attributes.get("src") or attributes.get("href") for tag, attributes in tags if tag in ("script", "link")}
    assert linked == {"/page/page.js", "/page/page.css", "/page/icon.svg"}
    script = files.content("page.js").decode()
    ids = {attributes["id"] for _, attributes in tags if "id" in attributes}
    assert set(re.findall(r"\$\(\"([\w-]+)\"\)", script)) <= ids
    imported = {name for path in files.FILES.values() if path.endswith(".js") for name in re.findall(r"from \"\./([\w.]+)\"", files.content(path).decode())}
    assert imported | {"page.js"} == {name for name in files.FILES.values() if name.endswith(".js")}


def test_a_browser_gets_the_page_without_a_key_and_no_numbers() -> None:
    with serving("sesame", context=600) as found:
        assert all(httpx.get(found.url + path).status_code == 200 for path in files.FILES)
        data = ("/page/state", "/page/methods", "/page/sample", "/page/sight?tokens=9", "/v1/models")
        assert [httpx.get(found.url + path).status_code for path in data] == [401] * len(data)
        assert [httpx.get(found.url + path, headers={"Authorization": "Bearer sesame"}).status_code for path in data] == [200] * len(data)


# -- what a method sees -----------------------------------------------------------------------------------------------------------


def small(name: str) -> Method:
    return registry()[name].small(8)


def least(method: Method, tokens: int, columns: int, queries: torch.Tensor) -> list[list[float | None]]:
    """The truth: all distances of these queries, and in each stretch the least."""
    distances = method.distances(queries[:, None], torch.arange(tokens)[None]).nan_to_num(torch.inf)
    parts = distances.reshape(len(queries), columns, tokens // columns).amin(-1)
    return [[None if d == torch.inf else round(d, 3) for d in row] for row in parts.tolist()]


@pytest.mark.parametrize("name", METHODS)
def test_a_picture_has_the_distances_of_the_paper(name: str) -> None:
    method = small(name)
    for tokens in (seen.ROWS - 1, seen.ROWS, 2 * seen.ROWS, 10 * seen.ROWS):
        rows = min(tokens, seen.ROWS)
        queries = (torch.arange(rows) + 1) * (tokens // rows) - 1
        assert seen.picture(method, tokens) == least(method, tokens, rows, queries), tokens
    for tokens in (1, 100, 8 * seen.STRIP):
        assert seen.strip(method, tokens) == least(method, tokens, min(tokens, seen.STRIP), torch.tensor([tokens - 1]))[0], tokens


def test_the_first_keys_show_in_a_stretch_of_thousands() -> None:
    found = seen.picture(longreach.LMInfinite(n_local=512, n_global=4), 100_000)
    assert found[-1][0] is not None and found[-1][-1] == 0 and not any(found[-1][1:-1])
    assert len(found) == len(found[0]) == seen.ROWS and len(seen.strip(longreach.Stock(), 10**8)) == seen.STRIP


@pytest.mark.parametrize("name", METHODS)
def test_the_command_serves_what_is_shown(server: Served, name: str) -> None:
    """Typed at a terminal it makes the same method. One without a recommended setting says so."""
    found = get(server, f"/page/sight?tokens=2048&method={name}")
    if found["sight"] is None:
        assert name in ("combined", "longrope") and "no recommended setting" in found["problem"]
        return
    sight = found["sight"]
    program, command, *words = shlex.split(sight["command"])
    assert (program, command) == ("longreach", "serve") and found["problem"] is None
    options = parameters.split(words)
    assert (options.pop("--model"), options.pop("--context"), options.pop("--method")) == ("nano", "2048", sight["method"]["method"])
    method = parameters.build(sight["method"]["method"], [part for pair in options.items() for part in pair if part is not None])
    assert method is not None and json.loads(json.dumps(method.to_json())) == sight["method"]
    assert sight["served"] is (name == "selfextend") and sight["trained_window"] == 512 and sight["capacity"] == method.capacity(512)


def test_the_method_in_force_is_the_one_that_answers(server: Served) -> None:
    found = get(server, "/page/sight?tokens=1900")["sight"]
    method = server.service.extension.method
    assert found["served"] and found["method"] == method.to_json() and found["command"] == routes.command("nano", method, 2048)
    assert found["distances"] == seen.picture(method, 1900) and found["last"] == seen.strip(method, 1900) and not found["rescales"]
    assert [one["name"] for one in get(server, "/page/methods")["data"] if one["served"]] == ["selfextend"]
    assert sorted(one["name"] for one in get(server, "/page/methods")["data"]) == METHODS
    dial = get(server, "/page/sight?tokens=8000&method=dial")["sight"]
    assert dial["method"] == planned(8000).to_json() and not dial["served"] and "--context 8000 --method selfextend" in dial["command"]
    assert get(server, "/page/sight?tokens=9000000&method=dial")["problem"]
    assert get(server, "/page/sight?tokens=64&method=quest")["sight"]["chosen"] is not None
    assert routes.command("my.gguf", longreach.Stock(), None) == "longreach serve --model MODEL --method stock"


@pytest.mark.parametrize("query", ["", "tokens=0", "tokens=x", "tokens=99999999999999999999", "tokens=5&method=nonsense"])
def test_what_cannot_be_seen_is_refused(server: Served, query: str) -> None:
    answer = httpx.get(f"{server.url}/page/sight?{query}")
    assert answer.status_code == (404 if "nonsense" in query else 400) and answer.json()["error"]["message"]


def planned(context: int) -> Method:
    """What `extend(model, context=N)` chooses."""
    model, _ = longreach.load("nano")
    with longreach.extend(model, context=context) as extension:
        return extension.method


# -- the rest of the page ---------------------------------------------------------------------------------------------------------


def test_memory_is_told_by_tier() -> None:
    memory = longreach.Tiered(device="2MiB", host="64MiB")
    with serving(context=2048, memory=memory) as found:
        before = get(found, "/page/state")
        assert [(place["name"], place["budget"]) for place in before["memory"]] == [("device", 2 * 2**20), ("host", 64 * 2**20)]
        words = longreach.shipped_book()[:5000]
        with found.client.completions.create(model="nano", prompt=words, max_tokens=200, temperature=0, stream=True) as stream:
            next(iter(stream))
            during = get(found, "/page/state")
        assert during["running"] == 1 and sum(place["bytes"] for place in during["memory"]) > sum(place["bytes"] for place in before["memory"])
        assert during["memory"][0]["bytes"] <= 2 * 2**20 < sum(place["bytes"] for place in during["memory"])
        found.until(lambda: get(found, "/page/state")["running"] == 0)


def test_memory_without_tiers_is_that_of_the_device(server: Served) -> None:
    before = get(server, "/page/state")
    assert [set(place) for place in before["memory"]] == [{"name", "bytes", "budget"}] and before["memory"][0]["name"] == "device"
    used = server.client.completions.create(model="nano", prompt="Whale! " * 50, max_tokens=2).usage
    assert used is not None and used.prompt_tokens_details is not None
    server.until(lambda: get(server, "/page/state")["running"] == 0)
    read = get(server, "/page/state")["read"] - before["read"]
    assert read == used.prompt_tokens - (used.prompt_tokens_details.cached_tokens or 0) > 100


def test_the_example_fits_and_is_answered(server: Served) -> None:
    found = get(server, "/page/sample")
    words: Any = [{"role": "user", "content": f"{found['text']}\n\n{found['question']}"}]
    answer = server.client.chat.completions.create(model="nano", messages=words, max_tokens=12, temperature=0)
    assert answer.usage is not None and 512 < answer.usage.prompt_tokens < 2048 and "48213" in (answer.choices[0].message.content or "")


def test_the_words_of_the_command_line_are_those_of_the_program() -> None:
    import typer

    serve = typer.main.get_command(build()).commands["serve"]  # type: ignore[attr-defined]
    assert {"--model", "--context", "--method"} <= {option for parameter in serve.params for option in parameter.opts}
