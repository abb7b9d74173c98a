"""The seam to vLLM: its paged cache and its scheduler under our methods. Only `seam.py` knows vLLM; the other files know tensors and configurations."""
