"""Is this engine right on this model? Families, exactness, measurements, and the speed of this machine."""
