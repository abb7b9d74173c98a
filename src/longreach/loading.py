"""Moved to `longreach.running.loading`; this name goes with the next release."""

from longreach.moved import moved

__getattr__ = moved(__name__, "longreach.running.loading")
