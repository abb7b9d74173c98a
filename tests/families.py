"""The random tiny models of the tests; they live in the package, for `longreach check --all` runs over them too."""

from longreach.evals.families import BASE, FAMILIES, REFUSED, WINDOW, build, rope, tokens

__all__ = ["BASE", "FAMILIES", "REFUSED", "WINDOW", "build", "rope", "tokens"]
