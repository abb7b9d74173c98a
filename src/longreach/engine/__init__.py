"""One forward: which rows hold which new tokens (batch), one layer of it (executor), and the dense truth beside it (reference). Knows no models."""
