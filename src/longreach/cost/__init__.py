"""Moved to `longreach.planning`; `longreach.cost.theory` goes with the next release."""
