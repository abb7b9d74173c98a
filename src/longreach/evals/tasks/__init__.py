"""The benchmark tasks, one file each. `evals/base.py` finds them."""
