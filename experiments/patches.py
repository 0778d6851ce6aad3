"""Does it pay to blend patches smoothly, or to average over mirrored images?

    python experiments/patches.py runs/folder-nerve_us-rec_xT runs/folder-nerve_us-no_diff --flips 1

predicts the validation cases of each run as `predict.py` does: with the paper's plain mean of the fewest
patches, with patches that overlap by half and Gaussian weights (--blend gaussian), and with each also
mirrored (--flips). It prints the mean Dice, its difference from the first row with a paired t-test over
the cases, and the time. The last rows are of the mean of all runs, case by case.
"""

import sys
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

import evaluate
from support.command_line import Parser, described, numbers
from support.files import program
from support.machine import prepare_machine
from support.scores import paired, per_case, show_p


def dice_of(model: evaluate.Model, data_dir: str, **how: object) -> tuple[np.ndarray, float]:
    """Dice (percent) of every validation case at the last sampling step, and the seconds per case."""
    dataset, found = model.dataset(data_dir), []
    cases = [dataset.load("validation", i) for i in range(len(dataset.uids["validation"]))]
    model.predict_image(cases[0], **how)  # compiles
    start = time.perf_counter()
    for case in cases:
        probability = model.predict_image(case, **how)
        classes = evaluate.clean(model.facts.dataset, probability.argmax(-1))[-1:]
        found.append(float(per_case(evaluate.score(classes, case, probability.shape[-1]).dice)[0]))
    return 100 * np.array(found), (time.perf_counter() - start) / len(cases)


def main() -> None:
    parser = Parser(**described(__doc__))
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Run folders, or model files.")
    parser.add_argument("--flips", type=numbers, default=(), help="The axes to mirror: 0,1. Default: none.")
    parser.add_argument("--data-dir", default="", help="Where the HDF5 file is. Default: as in training.")
    args = parser.parse_args()
    prepare_machine()
    ways = list(product(dict.fromkeys(((), args.flips)), evaluate.BLENDS))
    with program():
        print("| run | patches | mirrored | Dice (%) | difference | p | s per case |\n" + "|---" * 7 + "|")
        found = np.empty((len(args.runs), len(ways)), object)
        for run, values in zip(args.runs, found, strict=True):
            model = evaluate.load(run)
            for number, (flips, blend) in enumerate(ways):
                values[number] = dice_of(model, args.data_dir, blend=blend, flips=flips)
            show(run.name, ways, list(values))
        dice, seconds = (np.array([[way[i] for way in one] for one in found]).mean(axis=0) for i in (0, 1))
        if len(args.runs) > 1:
            show("all", ways, list(zip(dice, seconds, strict=True)))


def show(name: str, ways: list[tuple], found: list[tuple[np.ndarray, float]]) -> None:
    """The rows of one run: its Dice of every case, and seconds, in each way."""
    first, _ = found[0]
    for (flips, blend), (values, seconds) in zip(ways, found, strict=True):
        change = f"{np.nanmean(values - first):+.2f} | {show_p(paired(values, first)[0])}"
        cells = f"{blend} | {','.join(map(str, flips)) or 'no'} | {np.nanmean(values):.2f}"
        print(f"| {name} | {cells} | {' | ' if values is first else change} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
