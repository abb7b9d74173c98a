"""Pictures from plain data. Knows matplotlib; no models and no methods."""
