"""A log of a backup service, as long as asked for, in which one job fails: a document to ask questions about. Made up, and the same for the same seed.

    python examples/make_log.py --lines 330 > backup.log
"""

from __future__ import annotations

import argparse
from random import Random

HOSTS = ("atlas", "borneo", "cedar", "delta", "ember", "falcon", "granite", "harbor")
FOLDERS = ("photos", "invoices", "mail", "recipes", "drawings", "scans", "music", "letters")
FAILED = "The backup of {folder} from {host} failed: the disk is full. The ticket number is {ticket}."


def lines(count: int, failed_at: float, seed: int) -> list[str]:
    """`count` lines, one a minute; the failure stands after a share `failed_at` of them."""
    rng = Random(seed)
    found = []
    for minute in range(count):
        time = f"{minute // 60 % 24:02d}:{minute % 60:02d}"
        if minute == int(failed_at * (count - 1)):
            found.append(f"{time} {FAILED.format(folder=rng.choice(FOLDERS), host=rng.choice(HOSTS), ticket=rng.randrange(10_000, 100_000))}")
        else:
            found.append(f"{time} The backup of {rng.choice(FOLDERS)} from {rng.choice(HOSTS)} finished: {rng.randrange(2, 900)} files copied, no errors.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lines", type=int, default=330)
    parser.add_argument("--failed-at", type=float, default=0.4, help="0 is the beginning, 1 the end")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("\n".join(lines(args.lines, args.failed_at, args.seed)))


if __name__ == "__main__":
    main()
