"""Moved to `longreach.evals.lm_eval.harness`; this name goes with the next release."""

from longreach.moved import moved

__getattr__ = moved(__name__, "longreach.evals.lm_eval.harness")
