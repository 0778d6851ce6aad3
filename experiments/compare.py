"""Does recycling keep what the other strategies lose while they sample? The paper's comparison (Figure 3,
Table 1), from training to report, with one command:

    python experiments/compare.py --dataset phantom_us --seeds 0,1,2 --at-once 2

trains the plain U-Net and the five diffusion strategies with each seed, scores the test split with DDPM
and DDIM, and makes the report. Further options are passed to train.py (--steps 300). All runs have
the same network, steps, batches and seeds: a batch depends only on seed and step. What a training says
stands in a file beside its folder. Run the same command again to resume; nothing is trained twice.

Small networks leave most of a second CPU core unused: --at-once 2 gives each of two trainings one core of
its own, which takes about three quarters of the time. The number of cores changes results within rounding.

The other experiments of many trainings take from here how these are asked for, carried out and scored.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

import evaluate
import report
import train
from data import Sample
from strategies import STRATEGIES
from support.disk.command_line import Parser, check_counts, numbers
from support.disk.files import InputError, program
from support.machine.devices import prepare_machine, provenance
from support.results.scores import per_case

HERE = Path(__file__).parent.parent


def parse(
    doc: str, runs_dir: str, seeds: str, strategies: Iterable[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The options of an experiment of many trainings, and the remaining words, which are for train.py."""
    parser = Parser(doc)
    parser.add_argument("--dataset", default="phantom_us", help="Any of train.py's. Default: phantom_us.")
    text = f"Seeds of training. Default: {seeds}."
    parser.add_argument("--seeds", type=numbers, default=seeds, help=text)
    usual = ",".join(strategies)
    text = f"Which to train. Default: {usual}."
    parser.add_argument("--strategies", type=lambda words: words.split(","), default=usual, help=text)
    parser.add_argument("--runs-dir", help=f"The folder of the runs. Default: {runs_dir}-<dataset>.")
    text = "How many trainings run side by side, on a CPU. Default: 1."
    parser.add_argument("--at-once", type=int, default=1, help=text)
    text = "Train nothing; make files and tables of what is finished."
    parser.add_argument("--report-only", action="store_true", help=text)
    args, more = parser.parse_known_args()
    check_counts(parser, args, at_once=1)
    args.runs_dir = Path(args.runs_dir or f"{runs_dir}-{args.dataset.replace(':', '-')}")
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    return args, more


def side_by_side(work: Callable, jobs: dict[Path, tuple], at_once: int) -> None:
    """Runs `work(folder, *job)` for every folder, `at_once` at a time, each on CPU cores of its own, and in
    its own process, since compiled programs keep the functions that they were made from. After one has
    failed, no more are started. Raises InputError."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    groups = [set(cores[n::at_once]) or set(cores) for n in range(at_once)]

    def take_cores() -> None:
        if group := groups.pop():
            os.sched_setaffinity(0, group)  # of this thread alone, and of what it starts

    def do(folder: Path) -> None:
        print(f"{folder}: begins; {folder}.txt says how far it is", flush=True)
        spawn = multiprocessing.get_context("spawn")
        process = spawn.Process(target=in_own_process, args=(work, folder, *jobs[folder]))
        process.start()
        process.join()
        if process.exitcode:
            raise InputError(f"{folder}: failed; {folder}.txt says why; then the same command resumes it")
        print(f"{folder}: done", flush=True)

    with ThreadPoolExecutor(at_once, initializer=take_cores) as pool:
        try:
            for job in as_completed([pool.submit(do, folder) for folder in jobs]):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def in_own_process(work: Callable, folder: Path, *job: object) -> None:
    """What each process runs. All that it says goes to a file beside its folder, also why it ends."""
    prepare_machine()
    log = f"{folder}.txt"
    with open(log, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file), program():
        work(folder, *job)


def trained(folder: Path, options: list[str]) -> tuple[evaluate.Model, dict]:
    """The best model of a run, which is trained or resumed, and by what: by the code as it is now, which may
    change before the training ends. Raises InputError if it is stopped."""
    ran = provenance()
    config, _ = train.parse_config([*options, "--run-dir", str(folder)])
    if train.train(config) is not None:
        raise InputError(f"{folder}: stopped; the same command resumes it")
    return evaluate.load(folder), ran


def test_cases(model: evaluate.Model) -> list[Sample]:
    """The test cases of the data set that a model was trained on."""
    dataset = model.dataset()
    return [dataset.load("test", i) for i in range(len(dataset.uids["test"]))]


def dice_of(probability: np.ndarray, case: Sample, dataset: str) -> list[str]:
    """The mean Dice over the classes of the truth, at every sampling step; NaN without foreground."""
    classes = evaluate.clean(dataset, probability.argmax(-1))
    found = evaluate.score(classes, case, probability.shape[-1], last_distance=True)
    return [f"{value:.6f}" for value in per_case(found.dice)]


def train_and_score(folder: Path, options: list[str]) -> None:
    """Completes one run, up to its scores."""
    trained(folder, options)
    # evaluate.py writes the scores of DDIM last; without diffusion it writes one file.
    if not [*folder.glob("scores/test-best-ddim-*.json"), *folder.glob("scores/test-best-none-*.json")]:
        evaluate.main(["test", str(folder)])


def main() -> None:
    args, more = parse(__doc__, "runs/compare", "0", STRATEGIES)
    jobs = {}
    for seed, strategy in product(args.seeds, args.strategies):
        options = ["--dataset", args.dataset, "--strategy", strategy, "--seed", str(seed), *more]
        jobs[args.runs_dir / f"{strategy}-seed{seed}"] = (options,)
    with program():
        if not args.report_only:
            side_by_side(train_and_score, jobs, args.at_once)
        report.main(["all", str(args.runs_dir)])


if __name__ == "__main__":
    main()
