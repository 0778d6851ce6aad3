"""Is the paper's finding there, on real images, and does it hang on whether the network sees t?

    python experiments/finding.py --dataset folder:nerve_us --seeds 2,3,4,5,6 --at-once 2 --steps 1500

trains the plain U-Net and the diffusion strategies with every seed and every time embedding of EMBEDDINGS,
scores the test split at every sampling step with both samplers, and answers the questions of docs/results.md
("The plan") with 95 % intervals over trainings and cases. Further options are passed to train.py.

The scores of finished runs are kept in docs/finding/, one file per data set, and what is there is not trained
again: the same command resumes, on another machine too, and makes the same tables from the same scores.
"""

import csv
import io
import json
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from ablation import Change, in_own_process, replaced
from compare import HERE, parse, side_by_side

import evaluate
import train
import unet
from diffusion import SAMPLERS
from strategies import STRATEGIES
from support.files import InputError, program, replace_file
from support.machine import ignore_absent_tpu, keep_memory, provenance
from support.scores import per_case

COLUMNS = ("strategy", "embedding", "seed", "sampler", "case")  # then the steps' Dice, and the ensemble's


# --- What the network is told of t --------------------------------------------------------------


def waves(frequencies: jax.Array, t: jax.Array) -> jax.Array:
    angle = t.astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)])


def slow_embedding(t: jax.Array, T: int, dim: int = 256) -> jax.Array:
    """Sinusoids whose wavelengths are 64 steps and more: neighbouring times look alike, so that what is
    learned at one serves the others."""
    return waves(2 * jnp.pi / jnp.geomspace(64, 20_000, dim // 2), t)


def distinct_embedding(t: jax.Array, T: int, dim: int = 256) -> jax.Array:
    """Sinusoids of t itself, at most 1 radian per step: no two times are confused, as they may be in §5.3's,
    whose fastest ones turn 10 radians per step; and yet neighbouring times look different."""
    return waves(jnp.exp(-jnp.log(10_000.0) * jnp.arange(dim // 2) / (dim // 2)), t)


EMBEDDINGS: dict[str, tuple[list[str], Change]] = {
    "told t": ([], ExitStack),
    "not told t": (["--time-dim", "0"], ExitStack),
    "slow": ([], replaced("time_embedding", slow_embedding, unet)),
    "distinct": ([], replaced("time_embedding", distinct_embedding, unet)),
}


# --- Training and scoring -----------------------------------------------------------------------


class Run(NamedTuple):
    """One training."""

    strategy: str
    embedding: str
    seed: int

    def folder(self, runs_dir: Path) -> Path:
        return runs_dir / f"{self.strategy}-{self.embedding.replace(' ', '_')}-seed{self.seed}"


def scored(run: Run, model: evaluate.Model, plain: evaluate.Model | None) -> list[list]:
    """A row of COLUMNS per sampler and test case, with the mean Dice over the classes of the truth at every
    sampling step, and that of the mean of the last probabilities and those of the plain U-Net."""
    dataset, rows = model.dataset(), []
    cases = [dataset.load("test", i) for i in range(len(dataset.uids["test"]))]

    def dice(probability: np.ndarray, case: evaluate.Sample) -> list[str]:
        classes = evaluate.clean(model.facts.dataset, probability.argmax(-1))
        found = evaluate.score(classes, case, probability.shape[-1], last_distance=True)
        return [f"{value:.6f}" for value in per_case(found.dice)]

    beside = [probability for _, probability in plain.predict(cases)] if plain else [None] * len(cases)
    for sampler in SAMPLERS if plain else [""]:
        for (case, probability), other in zip(model.predict(cases, sampler=sampler), beside, strict=True):
            both = [] if other is None else dice((probability[-1:] + other) / 2, case)
            rows.append([*run, sampler, case.uid, *dice(probability, case), *both])
    return rows


def train_and_score(folder: Path, run: Run, options: list[str]) -> None:
    """Trains one run and leaves its rows and facts in finding.json."""
    extra, change = EMBEDDINGS[run.embedding]
    ignore_absent_tpu()
    keep_memory()
    with open(f"{folder}.txt", "a") as file, redirect_stdout(file), redirect_stderr(file), program():
        with change():
            settings = ["--strategy", run.strategy, "--seed", str(run.seed), "--run-dir", str(folder)]
            config, _ = train.parse_config([*options, *settings, *extra])
            if train.train(config) is not None:
                raise InputError(f"{folder}: stopped; the same command resumes it")
            model, plain = evaluate.load(folder), None
            if run.strategy != "no_diff":
                plain = evaluate.load(Run("no_diff", "told t", run.seed).folder(folder.parent))
            rows = scored(run, model, plain)
        facts = {"steps": config.steps, "best": model.facts.step, **provenance()}
        found = {"source": model.facts.source, "facts": facts, "rows": rows}
        replace_file(folder / "finding.json", json.dumps(found).encode())


def collect(path: Path, folders: dict[Run, Path]) -> None:
    """Adds the rows of finished runs to the data set's file, and their facts to the file beside it."""
    rows = read_rows(path)
    facts_path = path.with_suffix(".json")
    facts = json.loads(facts_path.read_text()) if facts_path.exists() else {"source": "", "runs": {}}
    for run, folder in folders.items():
        if run in rows or not (folder / "finding.json").exists():
            continue
        found = json.loads((folder / "finding.json").read_text())
        rows[run] = [list(map(str, row)) for row in found["rows"]]
        facts["source"] = found["source"]
        facts["runs"][folder.name] = found["facts"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, "dice at each step", "and with no_diff"])
    for run in sorted(rows, key=lambda r: (r.seed, list(STRATEGIES).index(r.strategy), r.embedding)):
        writer.writerows(rows[run])
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.getvalue().encode())
    facts["runs"] = dict(sorted(facts["runs"].items()))
    replace_file(facts_path, (json.dumps(facts, indent=1) + "\n").encode())


def read_rows(path: Path) -> dict[Run, list[list[str]]]:
    """The rows of every run in a data set's file."""
    rows: dict[Run, list[list[str]]] = {}
    if path.exists():
        with open(path, newline="") as file:
            for row in list(csv.reader(file))[1:]:
                rows.setdefault(Run(row[0], row[1], int(row[2])), []).append(row)
    return rows


def main() -> None:
    args, more = parse(__doc__, "runs/finding", seeds="2,3,4,5,6", strategies=",".join(STRATEGIES))
    path = HERE / "docs" / "finding" / f"{args.dataset.removeprefix('folder:')}.csv"
    seeds, strategies = list(map(int, args.seeds.split(","))), args.strategies.split(",")
    runs = [Run("no_diff", "told t", seed) for seed in seeds]  # first: all others are averaged with them
    # What the main questions need comes first, so that an unfinished table answers them.
    order = sorted(set(strategies) - {"no_diff"}, key=["rec_xT", "diff", "sc_xt1", "rec_xt1", "sc_xt"].index)
    first = list(product(seeds, [s for s in order if s in ("rec_xT", "diff")], ("told t", "not told t")))
    first += [(seed, "rec_xT", "slow") for seed in seeds if "rec_xT" in order]
    then = list(product(seeds, order, ("told t", "not told t")))
    then += [(seed, "rec_xT", "distinct") for seed in seeds if "rec_xT" in order]
    first.sort(key=lambda one: seeds.index(one[0]))
    runs += [Run(strategy, embedding, seed) for seed, strategy, embedding in dict.fromkeys(first + then)]
    folders = {run: run.folder(args.runs_dir) for run in runs}
    with program():
        if len(seeds) < 2:
            raise InputError("--seeds needs two or more: the intervals are over trainings")
        collect(path, folders)
        missing = set(runs) - read_rows(path).keys()
        missing |= {Run("no_diff", "told t", run.seed) for run in missing}  # for their means with it
        options = ["--dataset", args.dataset, *more]
        jobs = [
            partial(in_own_process, train_and_score, folders[run], run, options)
            for run in runs
            if run in missing and not (folders[run] / "finding.json").exists()
        ]
        side_by_side(jobs, args.at_once)
        collect(path, folders)


if __name__ == "__main__":
    main()
