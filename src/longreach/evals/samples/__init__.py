"""What a sample is, how long it may be, and the texts that facts are hidden in."""
