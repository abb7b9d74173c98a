"""Questions about a document to `longreach serve`, with OpenAI's own client. The server reads the document once; every further question costs its own words.

    longreach serve --context 8192 &
    python examples/ask_a_server.py --file report.txt "Who wrote this?" "When?"

The client is told the address and nothing else: what works with OpenAI's API works here. LONGREACH_API_KEY is the key, where the server wants one.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from openai import APIStatusError, OpenAI


def ask(client: OpenAI, model: str, document: str, question: str, tokens: int) -> None:
    """Print the answer as it comes, and what it has cost."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"{document}\n\n{question}"}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    print(f"> {question}")
    for event in stream:
        for choice in event.choices:
            print(choice.delta.content or "", end="", flush=True)
        if event.usage is not None:
            details = event.usage.prompt_tokens_details
            cached = details.cached_tokens if details is not None else 0
            print(f"\n  ({event.usage.prompt_tokens} tokens, {cached} of them read before)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--file", type=Path, required=True, help="the document, in UTF-8")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key=os.environ.get("LONGREACH_API_KEY", "unused"))
    model = client.models.list().data[0].id
    document = args.file.read_text(encoding="utf-8")
    try:
        for question in args.questions:
            ask(client, model, document, question, args.tokens)
    except APIStatusError as error:
        sys.exit(f"the server refused: {error.message}")  # such as a document beyond its context, with the numbers


if __name__ == "__main__":
    main()
