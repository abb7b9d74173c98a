"""The algebra: segments of visible keys, position encodings, the exact merge of attention calls. Knows tensors and indices; no methods, caches or models."""
