"""The seam to Transformers: the only room that knows its forwards, caches and rotary modules."""
