"""Which parts of a text made a model's answer: TracLLM (arXiv 2506.04202), on any model and under any method."""
