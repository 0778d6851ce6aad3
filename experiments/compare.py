"""Does recycling keep what the other strategies lose while they sample? The paper's comparison (Figure 3,
Table 1), from training to report, with one command:

    python experiments/compare.py --dataset phantom_us --seeds 0,1,2

trains the plain U-Net and the five diffusion strategies with each seed, scores the test split with DDPM
and DDIM, and makes the report. More options go to train.py as they are (--steps 300). All runs have the
same network, steps, batches and seeds: a batch is a function of seed and step alone. The same command
again goes on where it stopped, and trains nothing twice.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

from strategies import STRATEGIES  # noqa: E402


def run(*command: str) -> None:
    """One of the project's commands; where it fails, this script ends with its exit status."""
    print("\n$ python", " ".join(command), flush=True)
    status = subprocess.run([sys.executable, HERE / command[0], *command[1:]]).returncode
    if status:
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="phantom_us", help="any that train.py knows")
    parser.add_argument("--seeds", default="0", help="of training, for example 0,1,2")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="all, where not given")
    parser.add_argument("--runs-dir", default="", help="empty: runs/compare-<dataset>")
    args, more = parser.parse_known_args()
    folder = Path(args.runs_dir or f"runs/compare-{args.dataset.replace(':', '-')}")
    for seed in args.seeds.split(","):
        for strategy in args.strategies.split(","):
            one = folder / f"{strategy}-seed{seed}"
            run("train.py", "--dataset", args.dataset, "--strategy", strategy, "--seed", seed,
                "--run-dir", str(one), *more)  # fmt: skip
            # evaluate.py writes that of DDIM last, without diffusion a single one.
            scored = [*one.glob("scores/test-best-ddim-*.json"), *one.glob("scores/test-best-none-*.json")]
            if not scored:
                run("evaluate.py", "test", str(one))
    run("report.py", "all", str(folder))


if __name__ == "__main__":
    main()
