"""The files of the page, and under which rules a browser may use them. Knows their names; no models and no requests."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "static"
KINDS = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
# path -> file. A request never names a file: what is not in this table does not exist.
FILES = {"/": "index.html"} | {f"/page/{name}": name for name in ("page.css", "page.js", "server.js", "text.js", "talk.js", "sight.js", "words.js", "icon.svg")}
# Nothing from anywhere else, no script or style inside the document, and no text that becomes markup.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def kind(name: str) -> str:
    return KINDS[Path(name).suffix]


def content(name: str) -> bytes:
    return (FOLDER / name).read_bytes()
