"""The seam to vLLM: the only place that knows its names, which move between releases.

plugin   the entry point, the configuration of an engine, what is refused
worker   attaches a method to the model that a worker has loaded
backend  the attention backend
blocks   which pages of a request the scheduler frees

What was found true of a model is verified (`probe.py`), the backend is tested at start (`selftest.py`), and what cannot apply stops the engine. Nothing is
changed for engines that do not ask for longreach, in the same process too. It knows no attention of its own: that is in `pages.py`.
"""

from longreach.vllm.seam.plugin import register

__all__ = ["register"]
