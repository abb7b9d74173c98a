"""Everything that only a CUDA card can tell, by one command: half precision, one layer's attention, an 8B model.

    python benchmarks/card.py --out DIR --minutes 12
    python benchmarks/card.py --out DIR --minutes 3 --device cpu --small      # a rehearsal of the same path, about a minute on two cores

1. tests      the half-precision tests on the card, one after another; after an error of the card the others go on in a new process, and the first
              such test is run once more under CUDA_LAUNCH_BLOCKING=1, which names the call that failed
2. attention  attention.py without cuDNN
3. model      model.py on a random model of Llama 3 8B's shape in bf16

Each writes its results into DIR after every case, so that a time limit loses nothing but the case it cuts, and its whole output into a log there. A
step may take its share of the minutes that are left; what it does not need is for the next ones. card.json says what became of every step. The
exit code is 0 if all of them ended well. Needs pytest beside the dependencies of Longreach; nothing has to be installed, since this checkout is measured.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import card_tests
import torch
from common import ROOT, device_of, facts, write_json

HALF = "bf16 or bfloat16 or float16"
TESTS = tuple(str(ROOT / "tests" / f"test_{name}.py") for name in ("matrix", "numerics", "frequencies"))
SHARES = {"tests": 4, "attention": 3, "model": 5}
RERUN_SECONDS = 120.0


@dataclass(frozen=True)
class Run:
    """Commands with their logs in one folder, on one device, until one moment."""

    out: Path
    device: str
    small: bool
    end: float

    @property
    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def limit(self, step: str) -> float:
        """Seconds that a step may take, if all after it take their shares."""
        names = list(SHARES)
        return self.left * SHARES[step] / sum(SHARES[name] for name in names[names.index(step) :])

    def python(self, arguments: Sequence[str], log: str, seconds: float, more: Mapping[str, str] | None = None) -> dict[str, Any]:
        """One Python process, its output appended to a log; ended, with all that it started, when its seconds are over."""
        paths = [str(ROOT / "src"), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "LONGREACH_TEST_DEVICE": self.device}
        settings |= ({"OMP_NUM_THREADS": "1"} if self.small else {}) | dict(more or {})  # in a rehearsal everything is tiny: a second thread only waits
        begun, timed_out = time.monotonic(), False
        with (self.out / log).open("a", encoding="utf-8") as output:
            print("$", *(f"{name}={value}" for name, value in (more or {}).items()), shlex.join(["python", *arguments]), file=output, flush=True)
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            child = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=os.environ | settings, start_new_session=True, **streams)
            try:
                child.wait(seconds)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                end(child)
        spent = time.monotonic() - begun
        return {"exit_code": child.returncode, "timed_out": timed_out, "seconds": round(spent, 1), "limit_seconds": round(seconds, 1), "log": log}


def end(child: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, None)):
        if child.poll() is None:
            os.killpg(child.pid, number)
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                continue


def tests(run: Run, files: Sequence[str] = TESTS, select: str | None = None) -> dict[str, Any]:
    """The half-precision tests until all have a result or the time is over."""
    record, until, rerun, processes = run.out / "tests.jsonl", time.monotonic() + run.limit("tests"), None, 0
    select = select or (f"test_kernel and ({HALF}) or test_bf16 and llama" if run.small else HALF)
    # without the options of pyproject.toml, for one process is enough and xdist may not be there; with its folder, so that ids are always the same
    pytest = ["-m", "pytest", "-c", "pyproject.toml", "-o", "addopts=", "--import-mode=importlib", "-p", "card_tests", "-p", "no:cacheprovider", "-v"]
    while True:
        known = len(card_tests.read(record))
        spent = run.python([*pytest, f"--record={record}", "-k", select, *files], "tests.log", max(0.0, until - time.monotonic()))
        processes += 1
        results = card_tests.read(record)
        broken = [name for name, line in list(results.items())[known:] if line.get("card_error") or line["outcome"] == card_tests.ENDED]
        if spent["timed_out"] or not broken:
            break
        if rerun is None:
            seconds = min(RERUN_SECONDS, max(0.0, until - time.monotonic()))
            again = run.python([*pytest, f"--only={broken[0]}", *files], "tests-blocking.log", seconds, {"CUDA_LAUNCH_BLOCKING": "1"})
            rerun = {"test": broken[0], **again}
    cut = broken[-1:] if spent["timed_out"] else []  # the test in which the time was over
    outcomes = Counter("cut" if name in cut else line["outcome"] for name, line in results.items())
    bad = [name for name, line in results.items() if line["outcome"] not in ("passed", "skipped") and name not in cut]
    finished = not spent["timed_out"] and spent["exit_code"] in (0, 1, 5)  # 5: none were left for this process
    return {"passed": finished and bool(outcomes["passed"]) and not bad, "finished": finished, "outcomes": dict(outcomes), "failed": bad, "blocking": rerun,
            "processes": processes, "results": record.name, **spent}  # fmt: skip


def attention(run: Run) -> dict[str, Any]:
    small = ["--quick", "--dtype", "bf16", "--case", "selfextend-decode,kv-bytes", "--repeats", "2"] if run.small else []
    return benchmark(run, "attention", ["--no-cudnn", *small])


def model(run: Run) -> dict[str, Any]:
    whole = ["--model", "random-8B", "--tokens", "8192", "32768"]
    small = ["--model", "random-1M", "--tokens", "512", "1024", "--new-tokens", "2", "--rounds", "1"]
    return benchmark(run, "model", ["--dtype", "bf16", *(small if run.small else whole)])


def benchmark(run: Run, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    out = run.out / f"{name}.json"
    command = [str(ROOT / "benchmarks" / f"{name}.py"), "--device", run.device, "--out", str(out), *arguments]
    spent = run.python(command, f"{name}.log", run.limit(name))
    return {"passed": spent["exit_code"] == 0, "results": out.name if out.exists() else None, **spent}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder for results and logs; it is made if it is not there")
    parser.add_argument("--minutes", type=float, default=12.0, help="for everything together (default 12)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to see that it runs")
    parser.add_argument("--small", action="store_true", help="few tests, small sizes")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be more than 0, not {options.minutes:g}")
    out = options.out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"{options.out} is not an empty folder; results of two runs would mix, so name another")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device; rehearse with --device cpu --small")
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, options.device, options.small, time.monotonic() + 60 * options.minutes)
    found: dict[str, Any] = {"benchmark": "card", "small": options.small, "minutes": options.minutes, "machine": facts(device_of(options.device)), "steps": {}}
    for step in (tests, attention, model):
        name = step.__name__
        found["steps"][name] = step(run)
        write_json(out / "card.json", found)
        print(said(name, found["steps"][name]), flush=True)
    return 0 if all(step["passed"] for step in found["steps"].values()) else 1


def said(name: str, step: Mapping[str, Any]) -> str:
    how = "the time is over" if step["timed_out"] else "passed" if step["passed"] else f"FAILED (exit code {step['exit_code']})"
    counts = ", ".join(f"{count} {outcome}" for outcome, count in step.get("outcomes", {}).items())
    again = f"; {step['blocking']['test']} once more in {step['blocking']['log']}" if step.get("blocking") else ""
    return f"{name}: {how}{f', {counts}' if counts else ''}, {step['seconds']:g} s; {step['log']}{again}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended too
    sys.exit(main())
