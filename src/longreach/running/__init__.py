"""A model at work: loading, reading in chunks, generation, conversations."""
