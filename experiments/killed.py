"""Does a training that is killed go on bit for bit, on the machine at hand?

    python experiments/killed.py --dataset hippocampus_mr --steps 60 --validate-every 20

trains every strategy three times: in one go; killed half-way, with a signal that no program can catch, and
resumed from its last checkpoint (so --validate-every must be less than half of --steps); and in one go with
nothing kept of what was compiled. It says whether logs and weights are those of
the first. Compiling again may change them where XLA chooses how to compute by timing it, as on a GPU.
Further options are passed to train.py. The output of each training is beside its folder.
"""

import os
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np
from compare import HERE, parse, side_by_side

import evaluate
from strategies import STRATEGIES
from support.files import InputError, program
from support.run_folder import move_aside, newest_state, read_log, read_state


def start(folder: Path, options: list[str], **variables: str) -> subprocess.Popen:
    """A training in another process."""
    words = [sys.executable, HERE / "train.py", "--run-dir", folder, "--log-every", "1", *options]
    with open(f"{folder}.txt", "a") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | variables)


def finish(folder: Path, options: list[str], **variables: str) -> None:
    """Trains to the end. Raises InputError where that fails."""
    if start(folder, options, **variables).wait():
        raise InputError(f"{folder}: the training failed, see {folder}.txt for why")


def kill_half_way(folder: Path, options: list[str], steps: int) -> int:
    """Starts a training and kills it after half of its steps. Returns the last step in its log."""
    process, log = start(folder, options), folder / "log.jsonl"

    def newest() -> int:
        return max((line["step"] for line in read_log(log, steps)), default=0)

    while process.poll() is None and newest() <= steps // 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    return newest()


def compared(folder: Path, other: Path) -> str:
    """Whether two finished runs have the same log, and the same weights at their end."""
    logs = [(run / "log.jsonl").read_bytes() for run in (folder, other)]
    weights = [jax.tree.leaves(evaluate.load(run / "final").network) for run in (folder, other)]
    same = logs[0] == logs[1], all(map(np.array_equal, *weights))
    return f"log {'same' if same[0] else 'differs'}, weights {'same' if same[1] else 'differ'}"


def train_thrice(folder: Path, options: list[str], cache: str) -> None:
    """The three trainings of a strategy, whose folders begin with the name of `folder`, and what came out."""
    whole, killed, anew = runs = [Path(f"{folder}-{name}") for name in ("whole", "killed", "anew")]
    for run in runs:
        move_aside(run)
    finish(whole, options)
    state, _ = read_state(whole / "last")
    at = kill_half_way(killed, options, state["step"])
    found = newest_state(killed)
    saved = found[0]["step"] if found else 0
    if not 0 < saved < state["step"]:
        raise InputError(
            f"{killed}: killed after step {at} of {state['step']}, its last checkpoint being step {saved}, "
            "which shows nothing about resuming; give more --steps, and --validate-every below half of them"
        )
    finish(killed, options)
    finish(anew, options, JAX_COMPILATION_CACHE_DIR=cache)
    said = [
        f"{folder.name}, {state['devices']}, killed after step {at} of {state['step']}",
        f"    resumed from step {saved}: {compared(whole, killed)}",
        f"    compiled anew: {compared(whole, anew)}",
    ]
    print("\n".join(said), flush=True)


def main() -> None:
    args, more = parse(__doc__, "runs/killed", seeds="0", strategies=",".join(STRATEGIES))
    jax.config.update("jax_platforms", "cpu")  # here, where runs are compared; the trainings choose
    with program(), TemporaryDirectory() as empty:
        jobs = []
        for seed, strategy in product(args.seeds.split(","), args.strategies.split(",")):
            folder = args.runs_dir / f"{strategy}-seed{seed}"
            options = ["--dataset", args.dataset, "--strategy", strategy, "--seed", seed, *more]
            jobs.append(partial(train_thrice, folder, options, f"{empty}/{folder.name}"))
        side_by_side(jobs, args.at_once)


if __name__ == "__main__":
    main()
