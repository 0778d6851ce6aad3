"""Does recycling keep what the other strategies lose while they sample? The paper's comparison (Figure 3,
Table 1), from training to report, with one command:

    python experiments/compare.py --dataset phantom_us --seeds 0,1,2 --at-once 2

trains the plain U-Net and the five diffusion strategies with each seed, scores the test split with DDPM
and DDIM, and makes the report. More options go to train.py as they are (--steps 300). All runs have the
same network, steps, batches and seeds: a batch is a function of seed and step alone. The same command
again goes on where it stopped, and trains nothing twice.

Small networks leave most of a second CPU core unused: --at-once 2 gives each of two trainings one core of
its own, which takes about three quarters of the time. The number of cores changes results within rounding.
"""

import argparse
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

from data import InputError  # noqa: E402
from strategies import STRATEGIES  # noqa: E402
from train import read_checkpoint  # noqa: E402


def run(*command: str, output: Path | None = None) -> None:
    """One of the project's commands; what it says goes to a file, where one is given. Raises
    CalledProcessError."""
    print("\n$ python", " ".join(command), flush=True)
    if output is None:
        subprocess.run([sys.executable, HERE / command[0], *command[1:]], check=True)
        return
    with open(output, "a") as file:
        subprocess.run(
            [sys.executable, HERE / command[0], *command[1:]], check=True, stdout=file, stderr=file
        )


def train_and_score(folder: Path, options: list[str], output: Path | None) -> None:
    """One run, from where it is to its scores. Raises CalledProcessError, and InputError where the
    training was stopped on its way."""
    start = time.time()
    run("train.py", "--run-dir", str(folder), *options, output=output)
    header, _ = read_checkpoint(folder / "last")
    if header["step"] < header["config"].steps:
        raise InputError(f"{folder}: stopped at step {header['step']}; the same command goes on")
    # evaluate.py writes that of DDIM last, without diffusion a single one.
    if not [*folder.glob("scores/test-best-ddim-*.json"), *folder.glob("scores/test-best-none-*.json")]:
        run("evaluate.py", "test", str(folder), output=output)
    print(f"{folder}: done, {(time.time() - start) / 60:.1f} min", flush=True)


def own_cores(count: int, groups: queue.Queue) -> queue.Queue:
    """`groups`, with `count` groups of this machine's cores in it, as many in each as there are for all."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for n in range(count):
        groups.put(set(cores[n::count]) or set(cores))
    return groups


@contextmanager
def on_own_cores(groups: queue.Queue) -> Iterator[None]:
    """Keeps this thread, and what it starts, on one group of cores, which nothing else takes meanwhile."""
    cores = groups.get()
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        groups.put(cores)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="phantom_us", help="any that train.py knows")
    parser.add_argument("--seeds", default="0", help="of training, for example 0,1,2")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="all, where not given")
    parser.add_argument("--runs-dir", default="", help="empty: runs/compare-<dataset>")
    parser.add_argument("--at-once", type=int, default=1, help="trainings side by side, on a CPU")
    args, more = parser.parse_known_args()
    if args.at_once < 1:
        parser.error("--at-once must be 1 or more")
    folder = Path(args.runs_dir or f"runs/compare-{args.dataset.replace(':', '-')}")
    folder.mkdir(parents=True, exist_ok=True)
    groups = own_cores(args.at_once, queue.Queue())

    def job(strategy: str, seed: str) -> None:
        name = f"{strategy}-seed{seed}"
        options = ["--dataset", args.dataset, "--strategy", strategy, "--seed", seed, *more]
        output = folder / f"{name}.txt" if args.at_once > 1 else None
        with on_own_cores(groups):
            train_and_score(folder / name, options, output)

    with ThreadPoolExecutor(args.at_once) as pool:
        combinations = product(args.seeds.split(","), args.strategies.split(","))
        jobs = [pool.submit(job, strategy, seed) for seed, strategy in combinations]
        try:
            for started in jobs:
                started.result()
            run("report.py", "all", str(folder))
        except (InputError, subprocess.CalledProcessError, KeyboardInterrupt) as error:
            pool.shutdown(wait=True, cancel_futures=True)
            print(f"error: {error}", file=sys.stderr)
            print(f"what was said is above, or in {folder}/*.txt; the same command goes on", file=sys.stderr)
            sys.exit(getattr(error, "returncode", 2))


if __name__ == "__main__":
    main()
