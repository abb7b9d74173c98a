"""Many requests at once: a scheduler of flat forwards, and what serves them."""
