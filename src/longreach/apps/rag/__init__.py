"""Retrieval and long context together: chunks, retrievers, prompts of any length, DRAG and IterDRAG, and how to spend a budget of tokens."""

from longreach.apps.rag.allocation import AllocationModel
from longreach.apps.rag.config import Passage, RagAnswer, RagConfig
from longreach.apps.rag.prompts import Demonstration, Step
from longreach.apps.rag.rag import Rag
from longreach.apps.rag.records import Run

__all__ = ["AllocationModel", "Demonstration", "Passage", "Rag", "RagAnswer", "RagConfig", "Run", "Step"]
