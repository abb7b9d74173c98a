"""InfiniRetri (arXiv 2502.12962): a text of any length is read chunk by chunk, and what is remembered of it are the sentences that the question attends to."""
