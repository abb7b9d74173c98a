"""The command line: `longreach COMMAND`. The program is in program.py, a command in the file of its name.

Imports nothing at the top, so that Ctrl-C is heard from the first moment on.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; -> the exit code: 0, 1 where a check failed, 2 for bad input, 130 for Ctrl-C."""
    try:
        from longreach.cli import program

        return program.main(arguments)
    except KeyboardInterrupt:  # while the program was being loaded
        import sys

        sentence = "interrupted; nothing was kept"
        print(sentence, file=sys.stderr)
        if "--json" in (sys.argv[1:] if arguments is None else arguments):
            print(f'{{"error": "{sentence}"}}')
        return 130
