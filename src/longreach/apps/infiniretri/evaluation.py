"""InfiniRetri among the engines of an evaluation: a sample's document is the text, and what stands around it the question. Knows prompts and replies."""

from __future__ import annotations

import time
from dataclasses import dataclass

from longreach.apps.infiniretri.prompt import Frame
from longreach.apps.infiniretri.reading import InfiniRetri
from longreach.evals.harness.engine import Reply
from longreach.evals.harness.model_engine import peak_memory
from longreach.evals.samples.budget import Prompt
from longreach.hf.placement import device_of


@dataclass(frozen=True)
class RetrievalEngine:
    """Answers prompts of any length. Each reads its own document, and is answered from what was kept of it."""

    asking: InfiniRetri

    def answer(self, prompt: Prompt) -> Reply:
        """Raises ValueError for a sample without a document, for there is nothing to be kept."""
        new, frame = prompt.sample.max_new_tokens, frame_of(prompt)
        with self.asking.attached() as extension:
            started = time.perf_counter()
            sizes = self.asking.sizes(extension, [frame], new)
            read = self.asking.read(extension, prompt.sample.parts.document, [frame], sizes)
            reading = time.perf_counter() - started
            found, _ = self.asking.answer(extension, frame, read.memories[0], sizes, new, stop=prompt.sample.stop)
            peak = peak_memory(device_of(extension.model))
        return Reply(found.text, found.tokens, found.finish, reading + found.prefill_seconds, found.decode_seconds, peak_memory=peak)


def frame_of(prompt: Prompt) -> Frame:
    """What stands around the document of a prompt, in a chat template or not."""
    parts, plain = prompt.sample.parts, prompt.text == prompt.sample.parts.text  # a template writes more
    at = len(parts.prefix) if plain else prompt.text.find(parts.document)
    if at < 0 or not parts.document.strip():
        raise ValueError(f"{prompt.sample.id} has no document that could be read apart from its question; ask it without --strategy")
    return Frame.around(prompt.text[:at], prompt.text[at + len(parts.document) :], parts.query, plain)
