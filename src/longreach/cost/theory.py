"""Moved to `longreach.planning.theory`; this name goes with the next release."""

from longreach.moved import moved

__getattr__ = moved(__name__, "longreach.planning.theory")
