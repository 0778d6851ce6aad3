"""Which training steps of the paper fit which TPU, with how much memory to spare? One table of all:

    pip install libtpu
    python experiments/fits.py --topologies v3:2x2,v5e:2x4 --limit 900

compiles the step of every data set of the paper and every strategy with aot.py, each in a process of its own
that is stopped after --limit seconds, and adds a row to docs/fits.csv as each one ends. What is there is not
compiled again, unless --limit was reached: the same command resumes. It prints the table of all rows and
writes it to docs/fits.md. Further options are passed to train.py.
"""

import argparse
import csv
import io
import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

from strategies import STRATEGIES  # noqa: E402
from support.command_line import described  # noqa: E402
from support.files import InputError, program, replace_file  # noqa: E402
from support.machine import ignore_absent_tpu, provenance  # noqa: E402

DATASETS = ("muscle_us", "amos_ct", "prostate_mr", "brats_mr")
KEYS = ("topology", "dataset", "strategy", "options")
COLUMNS = (*KEYS, "fits", "GiB per core", "million cycles", "copies %", "compiled in s", "commit")

PAGE = """# Training steps compiled for an accelerator

Made by `experiments/fits.py` from [fits.csv](fits.csv): the step of each data set of the paper and
each strategy, as of a commit, compiled for a TPU or a GPU that was not there. Memory is what a core
holds in all, cycles are the compiler's own estimate for a core of a TPU, and of these some are
plain copies. Nothing here was run; [tpu.md](tpu.md) says how to read it.

"""


def read(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of an earlier run, by their keys."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {tuple(row[key] for key in KEYS): row for row in csv.DictReader(file)}


def found_in(text: str) -> dict[str, str]:
    """The numbers of a row, from what aot.py printed. GiB are those of all that the step holds."""

    def number(pattern: str) -> str:
        found = re.search(pattern, text)
        return found[1] if found else ""

    if "does NOT fit" in text:
        return {"fits": "no", "GiB per core": number(r"needs ([\d.]+)G")}
    parts = [number(rf"\n    {name} +([\d.]+)") for name in ("batch and state", "temporaries", "code")]
    return {
        "fits": "yes", "GiB per core": f"{sum(map(float, parts)):.2f}",
        "million cycles": number(r"estimate of a step: ([\d.]+) million"),
        "copies %": number(r"copy [\d.]+ \((\d+) %\)"),
        "compiled in s": number(r"compiled in (\d+) s"),
    }  # fmt: skip


def compiled(key: tuple[str, ...], limit: float) -> dict[str, str]:
    """One row. Raises InputError where aot.py ends otherwise than by saying whether the step fits."""
    topology, dataset, strategy, options = key
    words = ["--topology", topology, "--dataset", dataset, "--strategy", strategy, *options.split()]
    row = dict(zip(KEYS, key, strict=True)) | {"commit": provenance()["commit"][:10]}
    try:
        command = [sys.executable, str(HERE / "experiments" / "aot.py"), *words]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return row | {"fits": f"not known after {limit:.0f} s"}
    if done.returncode and "does NOT fit" not in done.stdout:
        raise InputError(f"aot.py {' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
    return row | found_in(done.stdout)


def page(rows: dict[tuple[str, ...], dict[str, str]]) -> str:
    """The table of all rows, with what its columns mean."""
    lines = [" | ".join(COLUMNS), " | ".join(["---"] * len(COLUMNS))]
    lines += [" | ".join(rows[key].get(name) or "" for name in COLUMNS) for key in sorted(rows)]
    return PAGE + "\n".join(f"| {line} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, **described(__doc__))
    parser.add_argument("--topologies", default="v3:2x2,v5e:2x4", help="Default: v3:2x2,v5e:2x4.")
    parser.add_argument("--datasets", default=",".join(DATASETS), help="Default: the paper's four.")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="Default: all.")
    parser.add_argument("--limit", type=float, default=900, help="Seconds for one compilation. Default: 900.")
    args, more = parser.parse_known_args()
    path = HERE / "docs" / "fits.csv"
    lists = (args.topologies, args.datasets, args.strategies)
    keys = [(*key, " ".join(more)) for key in product(*(words.split(",") for words in lists))]
    ignore_absent_tpu()
    with program():
        rows = read(path)
        for key in keys:
            if key not in rows or rows[key]["fits"].startswith("not known"):
                print(f"{time.strftime('%H:%M')}  {' '.join(key)}", file=sys.stderr, flush=True)
                rows[key] = compiled(key, args.limit)
                text = io.StringIO()
                writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows[key] for key in sorted(rows))
                replace_file(path, text.getvalue().encode())
        text = page(rows)
        replace_file(path.with_suffix(".md"), text.encode())
        print(text)


if __name__ == "__main__":
    main()
