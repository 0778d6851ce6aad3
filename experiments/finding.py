"""Why does recycling help, and when? The trainings of docs/plan.md.

    python experiments/finding.py --dataset phantom_us --at-once 2

trains the plain U-Net and the diffusion strategies with masks that are b times as strong against the noise
(`--signal b`), with images of other sizes and for other lengths (PLAN), and scores the test split at every
sampling step with both samplers. Further options are passed to train.py; docs/plan.md says how the data
sets are built.

The scores of finished runs are kept in docs/finding/, one file per data set, and what is there is not trained
again: the same command resumes, on another machine too, and writes the same files from the same scores
(`--report-only` writes them from what is finished). experiments/results.py makes the page from them.
"""

import csv
import io
import json
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from compare import HERE, dice_of, parse, side_by_side, test_cases, trained

import evaluate
from diffusion import SAMPLERS, gaussian, key_for, make_schedule, q_sample
from strategies import STRATEGIES, batched, make_denoise, one_hot
from support.disk.files import InputError, program, replace_file
from support.raw.images import box_of

COLUMNS = ("strategy", "variant", "seed", "sampler", "case")  # then the steps' Dice, and the ensemble's
PLAIN = "b = 1"  # the paper's signal, and every other setting as in the preset

# --- The plan -----------------------------------------------------------------------------------

VARIANTS: dict[str, list[str]] = {
    PLAIN: [],
    "b = 1/4": ["--signal", "0.25"],
    "b = 4": ["--signal", "4"],
    "b = 16": ["--signal", "16"],
    # Twice the size, with b, and half of it, with b 2^(d/2).
    "b = 2, 64 x 64": ["--signal", "2", "--phantom-shape", "64,64", "--patch-shape", "64,64"],
    "b = 2.8": ["--signal", "2.828427"],
    "500 steps": ["--steps", "500"],
    "4000 steps": ["--steps", "4000"],
    "1400 steps": ["--steps", "1400"],
}
ALL, TWO = tuple(STRATEGIES)[1:], ("diff", "rec_xT")
AT_EACH_B = [
    *((name, v) for v in (PLAIN, "b = 16") for name in ALL),
    *((name, v) for v in ("b = 1/4", "b = 4") for name in TWO),
]
PLAN: dict[str, list[tuple[str, str]]] = {
    "phantom_us": [("no_diff", PLAIN), *((name, v) for v in list(VARIANTS)[:4] for name in ALL),
                   *((name, "b = 2, 64 x 64") for name in TWO)],
    "folder:hippocampus_2mm": [("no_diff", PLAIN), *AT_EACH_B,
                               *((name, v) for v in ("b = 2.8", "500 steps", "4000 steps") for name in TWO),
                               ("diff", "1400 steps"), ("no_diff", "1400 steps")],
    "folder:nerve_64": [("no_diff", PLAIN), *AT_EACH_B],
    "folder:hippocampus_1mm": [(name, PLAIN) for name in TWO],
}  # fmt: skip


# --- Training and scoring -----------------------------------------------------------------------


class Run(NamedTuple):
    """One training."""

    strategy: str
    variant: str
    seed: int

    def folder(self, runs_dir: Path) -> Path:
        words = re.sub("[/:]", "-", re.sub(" = |,", "", self.variant)).replace(" ", "_")
        return runs_dir / f"{self.strategy}-{words}-seed{self.seed}"


def scored(run: Run, model: evaluate.Model, plain: evaluate.Model | None) -> list[list]:
    """A row of COLUMNS per sampler and test case, with Dice at every sampling step, and that of the mean of
    the last probabilities and those of the plain U-Net."""
    cases, name, rows = test_cases(model), model.facts.config.dataset, []
    beside = [probability for _, probability in plain.predict(cases)] if plain else [None] * len(cases)
    for sampler in SAMPLERS if model.network.noisy_mask else [""]:
        for (case, probability), other in zip(
            model.predict(cases, model.sampling(sampler=sampler)), beside, strict=True
        ):
            both = [] if other is None else dice_of((probability[-1:] + other) / 2, case, name)
            rows.append([*run, sampler, case.uid, *dice_of(probability, case, name), *both])
    if model.network.noisy_mask:
        rows += given_away(run, model, cases)
    return rows


def given_away(run: Run, model: evaluate.Model, cases: list[evaluate.Sample]) -> list[list]:
    """What x_T gives away: Dice of f(x_T, T) on the middle patch of every case, where x_T is pure noise, and
    where it is the noised truth (2a), as training has it, with the same noise."""
    config = model.facts.config
    schedule = make_schedule(config.schedule, config.train_timesteps, config.signal)
    shape, T = config.patch_shape, jnp.array([schedule.T])

    @jax.jit
    def first(network, image, x_T):
        x_0_hat = jnp.zeros_like(x_T) if network.self_condition else None
        return make_denoise(batched(network), schedule, config.prediction)(image, T, x_T, x_0_hat).x_0_hat

    rows = []
    for number, case in enumerate(cases):
        image, label = (box_of(values, shape)[0] for values in (case.image, case.label))
        x_0 = one_hot(jnp.asarray(label[None], jnp.int32), model.network.classes)
        eps = gaussian(jax.random.fold_in(key_for("sampling", 0), number)[None], x_0)
        for name, x_T in (("noise", eps), ("truth", q_sample(schedule, x_0, T, eps))):
            patch = case._replace(image=image, label=label)
            found = dice_of(
                (np.asarray(first(model.network, image[None], x_T)) + 1) / 2, patch, config.dataset
            )
            rows.append([*run, f"x_T from {name}", case.uid, *found])
    return rows


def train_and_score(folder: Path, run: Run, options: list[str], scored: Callable = scored) -> None:
    """Trains one run and leaves the rows that `scored` gives and its facts in finding.json, with the seconds
    per step, compiling and validations among them, of a training that was not interrupted."""
    start = None if (folder / "last").exists() else time.monotonic()
    model, ran = trained(folder, [*options, "--strategy", run.strategy, "--seed", str(run.seed)])
    steps = model.facts.config.steps
    seconds = start and round((time.monotonic() - start) / steps, 3)
    beside, plain = Run("no_diff", PLAIN, run.seed).folder(folder.parent), None
    if run.strategy != "no_diff" and "--phantom-shape" not in options:
        plain = evaluate.load(beside) if (beside / "final").exists() else None  # at its end
    facts = {"steps": steps, "seconds": seconds, "best": model.facts.step, **ran}
    found = {"source": model.facts.source, "facts": facts, "rows": scored(run, model, plain)}
    replace_file(folder / "finding.json", json.dumps(found).encode())


def collect(path: Path, folders: dict[Run, Path]) -> None:
    """Adds the rows of finished runs to the data set's file, and their facts to the file beside it."""
    rows = read_rows(path)
    facts = json.loads(path.with_suffix(".json").read_text()) if rows else {"source": "", "runs": {}}
    for run, folder in folders.items():
        if run in rows or not (folder / "finding.json").exists():
            continue
        found = json.loads((folder / "finding.json").read_text())
        rows[run] = [list(map(str, row)) for row in found["rows"]]
        facts["source"] = found["source"]
        facts["runs"][folder.name] = found["facts"]
    if not rows:
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, "dice at each step", "and with no_diff"])
    for run in sorted(rows, key=lambda r: (r.seed, list(STRATEGIES).index(r.strategy), r.variant)):
        writer.writerows(rows[run])
    path.parent.mkdir(parents=True, exist_ok=True)
    facts["runs"] = dict(sorted(facts["runs"].items()))
    replace_file(path.with_suffix(".json"), (json.dumps(facts, indent=1) + "\n").encode())
    replace_file(path, text.getvalue().encode())


def read_rows(path: Path) -> dict[Run, list[list[str]]]:
    """The rows of every run in a data set's file."""
    rows: dict[Run, list[list[str]]] = {}
    if path.exists():
        with open(path, newline="") as file:
            for row in list(csv.reader(file))[1:]:
                rows.setdefault(Run(row[0], row[1], int(row[2])), []).append(row)
    return rows


# --- Intervals ----------------------------------------------------------------------------------


class Effect(NamedTuple):
    """A mean difference in points of Dice, with a 95 % interval and p for new trainings and new cases."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int


def random_effects(values: np.ndarray) -> Effect:
    """The mean of one number per seed and case, [seed, case], both of which stand for others that might have
    been drawn. This is the analysis of Dorfman, Berbaum and Metz (1992) for readers and cases, here for seeds
    and cases, with the degrees of freedom of Hillis (2007)."""
    S, C = values.shape
    mean, by_seed, by_case = values.mean(), values.mean(axis=1), values.mean(axis=0)
    rest = values - by_seed[:, None] - by_case + mean
    of_seeds = C * ((by_seed - mean) ** 2).sum() / (S - 1)
    of_cases = S * ((by_case - mean) ** 2).sum() / (C - 1)
    of_rest = (rest**2).sum() / ((S - 1) * (C - 1))
    total = of_seeds + max(of_cases - of_rest, 0)
    if total == 0:
        return Effect(mean, mean, mean, float(mean == 0), S)
    error = np.sqrt(total / (S * C))
    freedom = total**2 / (of_seeds**2 / (S - 1)) if of_seeds else np.inf
    half = scipy.stats.t.ppf(0.975, freedom) * error
    return Effect(mean, mean - half, mean + half, 2 * scipy.stats.t.sf(abs(mean) / error, freedom), S)


def chosen(args: Namespace, plan: dict[str, list[tuple[str, str]]]) -> list[Run]:
    """The runs of a plan that the command line asks for. Raises InputError."""
    if args.dataset not in plan:
        raise InputError(f"--dataset {args.dataset}: the plan has {', '.join(plan)}")
    wanted = [pair for pair in plan[args.dataset] if pair[0] in args.strategies]
    return [Run(*pair, seed) for pair in wanted for seed in args.seeds]


def carry_out(
    path: Path, runs: dict[Run, list[str]], args: Namespace, more: list[str],
    work: Callable[[Path, Run, list[str]], None],
) -> None:  # fmt: skip
    """Does `work` for every run, with options of its own, whose scores are not in the data set's file, and
    writes them there. Raises InputError."""
    folders = {run: run.folder(args.runs_dir) for run in runs}
    collect(path, folders)
    if args.report_only:
        return
    known, options = read_rows(path), ["--dataset", args.dataset, "--blend", "mean", *more]  # as in the paper
    jobs = {folders[run]: (run, [*options, *words]) for run, words in runs.items() if run not in known}
    side_by_side(work, jobs, args.at_once)
    collect(path, folders)


def main() -> None:
    args, more = parse(__doc__, "runs/finding", "1,2,3", STRATEGIES)
    path = HERE / "docs" / "finding" / f"{args.dataset.removeprefix('folder:')}.csv"
    with program():
        runs = {run: VARIANTS[run.variant] for run in chosen(args, PLAN)}
        carry_out(path, runs, args, more, train_and_score)


if __name__ == "__main__":
    main()
