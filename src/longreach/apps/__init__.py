"""Work on text with a model, as a user of the library would write it."""
