"""Tuning: which method, at which setting, a certain model likes best at a certain length. Measured, because no rule can know it.

candidates.py proposes, plan.py divides the time, halving.py asks a bench (bench.py) and drops, decision.py chooses, study.py runs models, workplace.py
keeps what was measured, outcome.py is what comes of it. recall.py is the quick look of `longreach check --recall`. The dial only reads that outcome
(planning/profile.py).
"""
