"""Build the wheel and the source distribution, and check what is in them: python .ci/distributions.py FOLDER

The wheel holds the package, nano and the type marker, and nothing else. The source distribution holds every file that git tracks, so its tests
find what they read. The wheel built from it is the wheel built from the checkout, byte for byte. Needs `build` and `hatchling`, no network.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NANO = {"README.md", "book.txt.xz", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def build(out: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *arguments, str(ROOT)], check=True)


def one(folder: Path, pattern: str) -> Path:
    [found] = folder.glob(pattern)
    return found


def wheel_files(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def source_files(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name.split("/", 1)[1]: archive.extractfile(member).read() for member in archive.getmembers() if member.isfile()}


def tracked_files() -> dict[str, bytes]:
    listed = subprocess.run(["git", "-c", "safe.directory=*", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return {name: (ROOT / name).read_bytes() for name in listed.stdout.split("\0") if name}


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def problems(wheel: dict[str, bytes], from_checkout: dict[str, bytes], source: dict[str, bytes], tracked: dict[str, bytes]) -> list[str]:
    """One sentence for everything that is wrong."""
    found = []
    package = {name.removeprefix("src/") for name in tracked if name.startswith("src/longreach/")}
    info = {name for name in wheel if name.split("/")[0].endswith(".dist-info")}
    if different := sorted(package ^ (wheel.keys() - info)):
        found.append(f"the wheel is not src/longreach: {different}")
    if missing := sorted({"longreach/py.typed", *(f"longreach/nano/{name}" for name in NANO)} - wheel.keys()):
        found.append(f"the wheel lacks {missing}")
    if different := differing(wheel, from_checkout):
        found.append(f"the source distribution builds another wheel: {different}")
    if different := differing({name: data for name, data in source.items() if name != "PKG-INFO"}, tracked):
        found.append(f"the source distribution is not what git tracks: {different}")
    metadata = BytesParser().parsebytes(next(data for name, data in wheel.items() if name.endswith(".dist-info/METADATA")))
    for field, expected in (("Name", "longreach"), ("License-Expression", "Apache-2.0"), ("Description-Content-Type", "text/markdown")):
        if metadata[field] != expected:
            found.append(f"the metadata's {field} is {metadata[field]!r}, not {expected!r}")
    if metadata.get_payload().strip() != tracked["README.md"].decode().strip():
        found.append("the description in the metadata is not README.md")
    if not any(name.endswith("/licenses/LICENSE") for name in info):
        found.append("the wheel lacks the licence")
    return found


def main() -> int:
    folder = Path(sys.argv[1])
    build(folder)  # the source distribution, and the wheel from it
    build(folder / "checkout", "--wheel")
    wheel, from_checkout = wheel_files(one(folder, "*.whl")), wheel_files(one(folder / "checkout", "*.whl"))
    found = problems(wheel, from_checkout, source_files(one(folder, "*.tar.gz")), tracked_files())
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
