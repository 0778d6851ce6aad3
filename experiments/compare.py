"""Does recycling keep what the other strategies lose while they sample? The paper's comparison (Figure 3,
Table 1), from training to report, with one command:

    python experiments/compare.py --dataset phantom_us --seeds 0,1,2 --at-once 2

trains the plain U-Net and the five diffusion strategies with each seed, scores the test split with DDPM
and DDIM, and makes the report. Further options are passed to train.py (--steps 300). All runs have
the same network, steps, batches and seeds: a batch depends only on seed and step. Run the same
command again to resume; nothing is trained twice.

Small networks leave most of a second CPU core unused: --at-once 2 gives each of two trainings one core of
its own, which takes about three quarters of the time. The number of cores changes results within rounding.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from strategies import STRATEGIES
from support.disk.command_line import Parser, check_counts
from support.disk.files import InputError, program
from support.disk.run_folder import read_state

HERE = Path(__file__).parent.parent


def parse(
    doc: str, runs_dir: str, seeds: str, strategies: str, **switches: str
) -> tuple[argparse.Namespace, list[str]]:
    """The options of an experiment of many trainings, with the help of each of its switches, and the
    remaining words, which are for train.py."""
    # No abbreviations: --seed is an option of train.py.
    parser = Parser(doc)
    parser.add_argument("--dataset", default="phantom_us", help="Any of train.py's. Default: phantom_us.")
    parser.add_argument("--seeds", default=seeds, help=f"Seeds of training. Default: {seeds}.")
    parser.add_argument("--strategies", default=strategies, help=f"Which to train. Default: {strategies}.")
    parser.add_argument("--runs-dir", help=f"The folder of the runs. Default: {runs_dir}-<dataset>.")
    text = "How many trainings run side by side, on a CPU. Default: 1."
    parser.add_argument("--at-once", type=int, default=1, help=text)
    for name, text in switches.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    args, more = parser.parse_known_args()
    check_counts(parser, args, at_once=1)
    args.runs_dir = Path(args.runs_dir or f"{runs_dir}-{args.dataset.replace(':', '-')}")
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    return args, more


def side_by_side(jobs: Sequence[Callable[[], None]], at_once: int) -> None:
    """Runs all jobs, `at_once` at a time. Each job, with the processes that it starts, has CPU cores
    of its own. After one has failed, no more are started, and its error is raised."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    groups = [set(cores[n::at_once]) or set(cores) for n in range(at_once)]

    def take_cores() -> None:
        if group := groups.pop():
            os.sched_setaffinity(0, group)  # of this thread alone

    with ThreadPoolExecutor(at_once, initializer=take_cores) as pool:
        try:
            for job in as_completed([pool.submit(job) for job in jobs]):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run(*command: str, output: Path | None) -> None:
    """Runs one of the project's commands. Its output goes to a file, if one is given. Raises
    InputError if it fails."""
    print("\n$ python", " ".join(command), flush=True)
    with open(output, "a") if output else nullcontext() as file:
        words = [sys.executable, HERE / command[0], *command[1:]]
        status = subprocess.call(words, stdout=file, stderr=file)
    if status:
        said = output or "the lines above"
        raise InputError(f"{command[0]} failed, see {said} for why; then the same command resumes it")


def train_and_score(folder: Path, options: list[str], output: Path | None) -> None:
    """Completes one run, up to its scores. Raises InputError, also if the training was stopped."""
    start = time.time()
    run("train.py", "--run-dir", str(folder), *options, output=output)
    state, _ = read_state(folder / "last")
    if state["step"] < state["config"]["steps"]:
        raise InputError(f"{folder}: stopped at step {state['step']}; the same command resumes it")
    # evaluate.py writes the scores of DDIM last; without diffusion it writes one file.
    if not [*folder.glob("scores/test-best-ddim-*.json"), *folder.glob("scores/test-best-none-*.json")]:
        run("evaluate.py", "test", str(folder), output=output)
    print(f"{folder}: done, {(time.time() - start) / 60:.1f} min", flush=True)


def main() -> None:
    args, more = parse(__doc__, "runs/compare", seeds="0", strategies=",".join(STRATEGIES))
    jobs = []
    for seed, strategy in product(args.seeds.split(","), args.strategies.split(",")):
        folder = args.runs_dir / f"{strategy}-seed{seed}"
        options = ["--dataset", args.dataset, "--strategy", strategy, "--seed", seed, *more]
        output = Path(f"{folder}.txt") if args.at_once > 1 else None
        jobs.append(partial(train_and_score, folder, options, output))
    with program():
        side_by_side(jobs, args.at_once)
        run("report.py", "all", str(args.runs_dir), output=None)


if __name__ == "__main__":
    main()
