"""How well each chunk fits a query: BM25 by bm25s, or the embeddings of a sentence-transformers model. Both are optional packages.

Knows texts and scores; not chunks, prompts or models that answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BM25 = "bm25"
CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
TOKEN = f"[{CJK}]|[^\\W{CJK}]+"  # words, of one letter too; scripts without spaces by their characters
Scores = Callable[[str], Any]  # query -> [N], one number for each text, larger is better
Retriever = Callable[[Sequence[str]], Scores]  # texts [N], looked at once -> what scores them for any query


def retriever(name: str) -> Retriever:
    """ "bm25", or the name or folder of a sentence-transformers model. Raises ValueError, with the fix, where the package is not installed."""
    if not name.strip():
        raise ValueError("the retriever has no name; pass bm25, or the name or folder of a sentence-transformers model")
    if name == BM25:
        _package("bm25s", "BM25", "pip install 'longreach[rag]'")
        return bm25
    _package("sentence_transformers", f"the retriever {name!r}", "pip install sentence-transformers, or pass bm25")
    return lambda texts: embeddings(name, texts)


def bm25(texts: Sequence[str]) -> Scores:
    """BM25 (k1 1.5, b 0.75) over words in lower case without English stop words."""
    bm25s = _package("bm25s", "BM25", "pip install 'longreach[rag]'")

    def words(given: Sequence[str]) -> Any:
        return bm25s.tokenize(list(given), stopwords="en", token_pattern=TOKEN, return_ids=False, show_progress=False)

    tokens = words(texts)
    known = {token for text in tokens for token in text}
    index = bm25s.BM25()
    if known:  # the library refuses texts without words, and queries too
        index.index(tokens, show_progress=False)

    def scores(query: str) -> Any:
        asked = [token for token in words([query])[0] if token in known]
        return index.get_scores(asked) if asked else np.zeros(len(texts))

    return scores


def embeddings(name: str, texts: Sequence[str]) -> Scores:
    """Cosines of the embeddings of a sentence-transformers model, which encodes queries and texts each in its own way if it has two."""
    package = _package("sentence_transformers", f"the retriever {name!r}", "pip install sentence-transformers, or pass bm25")
    try:
        model = package.SentenceTransformer(name, trust_remote_code=False)
    except Exception as error:  # the library and those below it raise errors of many kinds
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"the retriever {name!r} could not be loaded ({reason}); pass a sentence-transformers model, or bm25") from error
    how = {"normalize_embeddings": True, "show_progress_bar": False, "convert_to_numpy": True}
    encode_query = getattr(model, "encode_query", model.encode)
    of_texts = getattr(model, "encode_document", model.encode)(list(texts), **how)
    return lambda query: of_texts @ encode_query([query], **how)[0]


def best(scores: Any, texts: int, k: int) -> list[tuple[int, float]]:
    """The k best of so many texts, as (place, score), best first; of equals the first. Raises ValueError for what are no scores of them."""
    found = np.asarray(scores, dtype=np.float64)
    if found.shape != (texts,) or not np.isfinite(found).all():
        raise ValueError(f"a retriever must give {texts} finite numbers for a query, one for each chunk; correct it, or pass bm25")
    return [(int(place), float(found[place])) for place in np.argsort(-found, kind="stable")[:k]]


def _package(module: str, what: str, fix: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"{what} needs the package {module.replace('_', '-')}, which is not installed; {fix}") from error
