"""Which faults would the tests notice? Every fault listed in tests/faults.txt is put into a copy of the code,
one at a time, and the tests that speak of that file are run until one fails.

    python experiments/faults.py                     # all of them: hours
    python experiments/faults.py --only train.py     # those of one file

Each outcome is written at once to `--output`, so that the same command continues where it was stopped. A
fault that was noticed once is not tried again; one that was not is tried again with `--again`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

from tqdm import tqdm

HERE = Path(__file__).parent.parent


class Fault(NamedTuple):
    """A piece of a file's line, what stands there instead, what that means, and which tests speak of the
    file. `equivalent` says why no test can notice it, where that is so."""

    file: str
    tests: tuple[str, ...]
    meaning: str
    old: str
    new: str
    equivalent: str = ""


def read_faults(path: Path) -> list[Fault]:
    """The faults in a list like tests/faults.txt. Raises ValueError if a line is not one."""
    faults, file, tests = [], "", ()
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("["):
            file, _, rest = line[1:].partition("]")
            tests = tuple(rest.split())
        elif file and line.strip():
            parts = [part.strip() for part in f"{line} ".split(" ;; ")]
            if len(parts) not in (3, 4):
                raise ValueError(f"{path}: line {number} is not: meaning ;; old ;; new")
            faults.append(Fault(file, tests, *parts))
    return faults


def put_in(fault: Fault, source: str) -> str:
    """The source with the fault. Raises ValueError unless there is just one place for it."""
    if (count := source.count(fault.old)) != 1:
        raise ValueError(f"{fault.file}: {count} places for the fault {fault.meaning!r}: {fault.old}")
    return source.replace(fault.old, fault.new)


def fails(tests: tuple[str, ...], copy: Path, limit: int) -> bool:
    """Whether one of these tests fails in a copy of the project, or they take more than `limit` seconds."""
    words = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "--ff", *tests]
    try:
        done = subprocess.run(words, cwd=copy, capture_output=True, timeout=limit, text=True)
    except subprocess.TimeoutExpired:
        return True
    if done.returncode > 2:  # 2 is a file of tests that cannot be imported; below 0, a process that died
        raise RuntimeError(f"{' '.join(words)} cannot be run: {done.stdout}{done.stderr}")
    return done.returncode != 0


def is_noticed(fault: Fault, copy: Path, limit: int) -> bool:
    """Whether a test fails in a copy of the project with the fault."""
    path = copy / fault.file
    source = path.read_text()
    path.write_text(put_in(fault, source))
    try:
        return fails(fault.tests, copy, limit)
    finally:
        path.write_text(source)


def copy_of_the_project(folder: Path) -> Path:
    """A copy of the files under version control, as they are now."""
    names = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (HERE / name).is_file(), names.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / name, folder / name)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="Only the faults of files whose path contains this text.")
    parser.add_argument("--workers", type=int, default=1, help="How many are tried at once. Default: 1.")
    parser.add_argument("--limit", type=int, default=900, help="Seconds per fault. Default: 900.")
    parser.add_argument("--again", action="store_true", help="Try those again that were not noticed.")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/faults.jsonl"), help="Default: runs/faults.jsonl."
    )
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = args.output.read_text().splitlines() if args.output.exists() else []
    known = {tuple(fault): noticed for *fault, noticed in map(json.loads, lines)}
    faults = [fault for fault in read_faults(HERE / "tests" / "faults.txt") if args.only in fault.file]

    def key(fault: Fault) -> tuple[str, ...]:
        return fault.file, fault.old, fault.new

    todo = [f for f in faults if not (f.equivalent or known.get(key(f), False))]
    todo = [f for f in todo if args.again or key(f) not in known]
    with tempfile.TemporaryDirectory() as folder:
        # Every worker has a copy of its own; all share what JAX compiles, and no bytecode, whose age may lie.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        copies: Queue[Path] = Queue()
        for worker in range(args.workers):
            copies.put(copy_of_the_project(Path(folder) / str(worker)))

        def attempt(fault: Fault) -> tuple[Fault, bool]:
            copy = copies.get()
            try:
                return fault, is_noticed(fault, copy, args.limit)
            finally:
                copies.put(copy)

        for tests in dict.fromkeys(fault.tests for fault in todo):
            if fails(tests, Path(folder) / "0", args.limit):
                sys.exit(f"{' '.join(tests)}: these tests fail without any fault; mend them first")
        with ThreadPoolExecutor(args.workers) as pool, open(args.output, "a") as output:
            for fault, noticed in tqdm(pool.map(attempt, todo), total=len(todo)):
                known[key(fault)] = noticed
                print(json.dumps([*key(fault), noticed]), file=output, flush=True)
    tried = [fault for fault in faults if key(fault) in known and not fault.equivalent]
    total, found = Counter(f.file for f in tried), Counter(f.file for f in tried if known[key(f)])
    for file, count in total.items():
        print(f"{file:32} {found[file]:4} of {count:4} noticed")
    share = 100 * found.total() / max(total.total(), 1)
    print(f"{'all':32} {found.total():4} of {total.total():4} noticed, {share:.1f} %")
    for fault in faults:
        if fault.equivalent:
            print(f"cannot be noticed: {fault.file}: {fault.meaning}, since {fault.equivalent}")
        elif not known.get(key(fault), True):
            print(f"NOT noticed: {fault.file}: {fault.meaning}: {fault.new}")


if __name__ == "__main__":
    main()
