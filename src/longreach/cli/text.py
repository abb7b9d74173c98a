"""From a file, standard input and a prompt to a text that fits. Nothing is cut unless the user says where.

Knows files, encodings and tokenizers; not models or methods.
"""

from __future__ import annotations

import codecs
import gzip
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from longreach.hf.interfaces import Tokenizer
from longreach.quantities import counted
from longreach.running import prompts
from longreach.running.prompts import Side as Side

COMPRESSED: dict[str, Callable[[Path], IO[bytes]]] = {".xz": lzma.open, ".gz": gzip.open}  # type: ignore[dict-item]
NOTHING_TO_DECODE = "--text-encoding says how a text is written, and no text is read here; pass --file FILE too, or leave it out"
LARGEST_FILE = 256 * 2**20
PIECE = 2**20  # bytes
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # the longer first
STDIN = "-"
BOOK = "@book"  # the book that comes with nano


@dataclass(frozen=True)
class Request:
    """What the model is to read: an instruction, a document, a question about it."""

    document: str
    prompt: str
    system: str | None = None
    hidden: str | None = None  # a sentence put into the document, to see whether it is found
    depth: float | None = None  # where: 0 is the beginning, 1 the end, None the middle

    def __post_init__(self) -> None:
        for option, value in (("--prompt", self.prompt), ("--system", self.system), ("--hide", self.hidden)):
            check_argument(option, value)
        if self.depth is not None and self.hidden is None:
            raise ValueError("--depth says where --hide puts its sentence; pass --hide SENTENCE too, or leave it out")

    @property
    def text(self) -> str:
        """The document, with the hidden sentence in it."""
        return self.document if self.hidden is None else prompts.hide(self.document, self.hidden.strip(), 0.5 if self.depth is None else self.depth)

    @property
    def user(self) -> str:
        return prompts.about(self.text, self.prompt)


@dataclass(frozen=True)
class Truncation:
    """What was left out of the document, in tokens."""

    side: Side
    document_tokens: int
    kept_tokens: int

    def __str__(self) -> str:
        return f"{self.document_tokens - self.kept_tokens} of the document's {counted(self.document_tokens, 'token')} were left out ({self.side})"


def check_argument(option: str, value: str | None) -> None:
    """Refuses words whose bytes are not UTF-8: no tokenizer takes them."""
    if value is not None and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{option} is not UTF-8 text; convert it to UTF-8 first")


def read(file: str | None, most: int, note: Callable[[str], None], encoding: str | None = None) -> str:
    """The text of `file`, of standard input for "-" or where something is piped in, else "". Raises for what is not text.

    encoding  None is UTF-8, or what a byte order mark says.
    """
    if file is None:
        if not _piped():
            if encoding is not None:
                raise ValueError(NOTHING_TO_DECODE)
            return ""
        note("reading the text from standard input")
        return _decode(sys.stdin.buffer.read(most + 1), "standard input", most, note, encoding)
    if file == STDIN:
        if sys.stdin is None:
            raise ValueError("standard input is closed, so there is no text in it; pipe a text in, or pass --file FILE")
        if sys.stdin.isatty():
            note("reading the text from the terminal; Ctrl-D on a line of its own ends it")
        return _required(_decode(sys.stdin.buffer.read(most + 1), "standard input", most, note, encoding), "standard input")
    if file == BOOK:
        from longreach.running.loading import shipped_book

        return shipped_book()
    with _opened(file) as stream:
        data = stream.read(most + 1)
    return _required(_decode(data, repr(file), most, note, encoding), repr(file))


def pieces(file: str, most: int | None, note: Callable[[str], None], encoding: str | None = None) -> Iterator[str]:
    """The same of a file of any length, a piece at a time. `most` None: any length."""
    if file == BOOK:
        from longreach.running.loading import shipped_book

        yield shipped_book()
        return
    empty, begin = True, 0
    with _opened(file) as stream:
        data = stream.read(PIECE)
        encoding = encoding or _marked(data, repr(file), note)
        _refuse_utf8(data, repr(file), encoding)
        with _decoded(repr(file), encoding, data):
            decoder = codecs.getincrementaldecoder(encoding or "utf-8-sig")()
        ended = False
        while not ended:
            ended = not data
            _refuse_longer(begin + len(data), most, repr(file))
            with _decoded(repr(file), encoding, data, begin):
                text = decoder.decode(data, ended)
            _refuse_binary(text, repr(file), encoding, data, begin)
            empty = empty and not text.strip()
            yield text
            begin += len(data)
            data = b"" if ended else stream.read(PIECE)
    if empty:
        _required("", repr(file))


@contextmanager
def _opened(file: str) -> Iterator[IO[bytes]]:
    """A file of text, plain or compressed."""
    path = Path(file).expanduser()
    if not file.strip() or not path.exists():
        raise ValueError(f"there is no file {file!r}; pass the path of a text file, or - for standard input")
    if path.is_dir():
        raise ValueError(f"{file!r} is a folder; pass one text file")
    try:
        with COMPRESSED.get(path.suffix, _open)(path) as stream:
            yield stream
    except PermissionError:
        raise ValueError(f"{file!r} may not be read by this user; change its permissions") from None
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError):
        raise ValueError(f"{file!r} is not a valid {path.suffix} file; pass a text file, plain or compressed") from None
    except OSError as error:
        raise ValueError(f"{file!r} could not be read ({error.strerror or error}); pass a text file") from None


def _open(path: Path) -> IO[bytes]:
    return open(path, "rb")


def _piped() -> bool:
    """Whether standard input is a pipe, a socket or a file, rather than a terminal, /dev/null or closed."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _decode(data: bytes, source: str, most: int, note: Callable[[str], None], encoding: str | None) -> str:
    _refuse_longer(len(data), most, source)
    encoding = encoding or _marked(data, source, note)
    _refuse_utf8(data, source, encoding)
    with _decoded(source, encoding, data):
        text = data.decode(encoding or "utf-8-sig")
    _refuse_binary(text, source, encoding, data)
    return text


def _refuse_longer(size: int, most: int | None, source: str) -> None:
    if most is not None and size > most:
        raise ValueError(f"{source} is longer than {most} bytes; pass a larger --max-bytes, or a part of the text")


def _marked(data: bytes, source: str, note: Callable[[str], None]) -> str | None:
    """The encoding that a byte order mark says."""
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    if encoding is not None:
        note(f"reading {source} as {encoding.upper()}, as its first bytes say")
    return encoding


def _refuse_utf8(data: bytes, source: str, encoding: str | None) -> None:
    with _decoded(source, encoding, data):
        if _is_wide(encoding) and _is_utf8(data):
            raise ValueError(f"{source} is UTF-8 text, not {str(encoding).upper()}; leave out --text-encoding")


@contextmanager
def _decoded(source: str, encoding: str | None, data: bytes, begin: int = 0) -> Iterator[None]:
    """What a decoder raises, as a sentence. `data`: what it was given, from the byte `begin` on; it may have left a mark out, or kept bytes of before."""
    try:
        yield
    except LookupError:
        raise ValueError(f"there is no encoding {encoding!r}; pass --text-encoding utf-8, utf-16, latin-1, cp1252 or another that Python knows") from None
    except UnicodeError as error:
        where = ""
        if isinstance(error, UnicodeDecodeError) and (error.object.endswith(data) or data.endswith(error.object)):
            where = f" (byte 0x{error.object[error.start]:02x} at offset {begin + len(data) - len(error.object) + error.start})"
        name = "UTF-8" if encoding is None else encoding.upper()
        raise ValueError(f"{source} is not {name} text{where}; convert it to UTF-8, or pass --text-encoding NAME, such as latin-1") from None


def _refuse_binary(text: str, source: str, encoding: str | None, data: bytes, begin: int = 0) -> None:
    if "\0" in text:
        if encoding is None and (wide := _wide(data)) is not None:
            raise ValueError(f"{source} looks like {wide.upper()} text; pass --text-encoding {wide}")
        where = f" at offset {begin + data.index(0)}" if 0 in data and not _is_wide(encoding) else ""  # there other characters have zeros too
        raise ValueError(f"{source} is binary (byte 0{where}); pass a text file, or --text-encoding NAME if it is one")


def _is_wide(encoding: str | None) -> bool:
    return encoding is not None and codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


def _wide(data: bytes) -> str | None:
    """The encoding of two bytes a character, without a mark, that most of a text looks like; None if it does not."""
    for name, high in (("utf-16-le", data[1::2]), ("utf-16-be", data[::2])):
        if high.count(0) > len(high) / 2:
            return name
    return None


def _is_utf8(data: bytes) -> bool:
    """Whether bytes are a text in UTF-8. Those of a text of two or four bytes a character are none: they have zeros, control characters or stray bytes."""
    try:
        return bool(data) and all(character.isprintable() or character.isspace() for character in data.decode("utf-8"))
    except UnicodeError:
        return False


def _required(text: str, source: str) -> str:
    if not text.strip():
        raise ValueError(f"{source} is empty; pass a file with text, or leave it out and give a --prompt")
    return text


def shorten(tokenizer: Tokenizer, document: str, most: int, side: Side, encode: Callable[[str], list[int]]) -> tuple[str, Truncation]:
    """The document with as much of it left out, at `side`, as makes what `encode` makes of it at most `most` tokens."""
    _, spans = prompts.encode_with_spans(tokenizer, document, special=False)
    rest = len(encode(""))

    def make(keep: int) -> tuple[str, int]:
        shorter = prompts.keep_tokens(document, spans, keep, side)
        return shorter, len(encode(shorter)) - most

    shorter = prompts.shrink(min(len(spans), most - rest), make)
    if shorter is None:
        alone = f"the prompt alone has {counted(rest, 'token')} and no document" if rest else "nothing of the text"
        raise ValueError(f"{alone} fits into {most}; shorten it or declare a larger --context")
    return shorter, Truncation(side, len(spans), len(prompts.encode(tokenizer, shorter, special=False)))
