"""What is kept of a sequence: buffers, stores, the slots of padded rows. Knows forms of keys and how long they are kept; no models."""
