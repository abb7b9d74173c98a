"""`python -m longreach.cli`, the same as `longreach`."""

import sys

from longreach.cli import main

if __name__ == "__main__":
    sys.exit(main())
