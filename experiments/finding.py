"""Is the paper's finding there, on real images, and does it depend on whether the network sees t?

    python experiments/finding.py --dataset folder:nerve_us --seeds 2,3,4,5,6 --at-once 2 --steps 1500

trains the plain U-Net and the diffusion strategies with every seed and every time embedding of EMBEDDINGS,
scores the test split at every sampling step with both samplers, and answers the questions of docs/results.md
("The plan") with 95 % intervals over trainings and cases. Further options are passed to train.py.

The scores of finished runs are kept in docs/finding/, one file per data set, and what is there is not trained
again: the same command resumes, on another machine too, and makes the same tables from the same scores
(`--report-only` makes them from what is finished).
"""

import csv
import io
import json
import sys
from collections.abc import Iterable
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
from matplotlib.figure import Figure
from scipy.stats import t as t_distribution

import evaluate
import train
import unet
from diffusion import SAMPLERS
from strategies import STRATEGIES
from support.files import InputError, program, replace_file
from support.machine import ignore_absent_tpu, keep_memory, provenance
from support.pictures import png, style
from support.scores import holm, per_case, show_p

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
        ran = provenance()  # of the code as it is now; it may have changed when the training ends
        with change():
            settings = ["--strategy", run.strategy, "--seed", str(run.seed), "--run-dir", str(folder)]
            config, _ = train.parse_config([*options, *settings, *extra])
            if train.train(config) is not None:
                raise InputError(f"{folder}: stopped; the same command resumes it")
            model, plain = evaluate.load(folder), None
            if run.strategy != "no_diff":
                plain = evaluate.load(Run("no_diff", "told t", run.seed).folder(folder.parent))
            rows = scored(run, model, plain)
        facts = {"steps": config.steps, "best": model.facts.step, **ran}
        found = {"source": model.facts.source, "facts": facts, "rows": rows}
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
    steps = {one["steps"] for one in facts["runs"].values()}
    cases = {tuple(sorted({cells[4] for cells in of_run})) for of_run in rows.values()}
    if len(steps) > 1 or len(cases) > 1:
        raise InputError(
            f"{path}: trainings of different steps or test cases cannot be compared; move this file, and "
            "the one beside it, or give the options that its trainings had"
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, "dice at each step", "and with no_diff"])
    for run in sorted(rows, key=lambda r: (r.seed, list(STRATEGIES).index(r.strategy), r.embedding)):
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


def short(commit: str) -> str:
    """A commit's first ten digits, and whether anything beside it was changed."""
    digits, _, changed = commit.partition(" ")
    return f"{digits[:10]} {changed}".rstrip()


# --- Effects ------------------------------------------------------------------------------------


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
    half = t_distribution.ppf(0.975, freedom) * error
    return Effect(mean, mean - half, mean + half, 2 * t_distribution.sf(abs(mean) / error, freedom), S)


class Results(NamedTuple):
    """The Dice of every run of a data set, in points."""

    rows: dict[Run, list[list[str]]]

    def dice(self, run: Run, sampler: str) -> dict[str, list[float]]:
        """Of every case with a foreground, the steps and, with diffusion, the ensemble."""
        found = {}
        for row in self.rows.get(run, []):
            if row[3] in ("", sampler) and "nan" not in row[5:]:
                found[row[4]] = [100 * float(value) for value in row[5:]]
        return found

    def effect(self, *terms: tuple[int, str, str, str, int]) -> Effect | None:
        """The sum of terms (sign, strategy, embedding, sampler, column), per seed that has all of them and
        case; column -1 is the ensemble, -2 the last step and 0 the first (of no_diff, -1 is all there is).
        None where fewer than two seeds have all."""
        every = sorted({run.seed for run in self.rows})
        values = []
        for seed in every:
            parts = [self.dice(Run(strategy, embedding, seed), sampler)
                     for _, strategy, embedding, sampler, _ in terms]  # fmt: skip
            if all(parts):
                cases = sorted(set.intersection(*map(set, parts)))
                values.append([
                    sum(term[0] * part[case][term[4]] for term, part in zip(terms, parts, strict=True))
                    for case in cases
                ])  # fmt: skip
        return random_effects(np.array(values)) if len(values) > 1 else None


def means_of(results: Results, strategy: str, embedding: str, sampler: str) -> list[np.ndarray]:
    """Mean over the cases, per seed, of Dice at every step, and that of the ensemble."""
    runs = (Run(strategy, embedding, seed) for seed in sorted({run.seed for run in results.rows}))
    return [np.mean(list(cases.values()), axis=0) for run in runs if (cases := results.dice(run, sampler))]


DIFFUSION = [name for name, strategy in STRATEGIES.items() if strategy.noisy_mask]
TOLD = ("told t", "not told t")


def effects(results: Results) -> dict[tuple[str, str, str], Effect | None]:
    """Every effect of the plan, by claim, embedding and what it is."""
    found = {}
    for told in TOLD:

        def last(strategy: str, sign: int = 1, sampler: str = "ddpm", told: str = told) -> tuple:
            plain = strategy == "no_diff"
            return sign, strategy, "told t" if plain else told, sampler, -1 if plain else -2

        def gain(strategy: str, sampler: str = "ddpm", told: str = told) -> list[tuple]:
            return [last(strategy, 1, sampler, told), (-1, strategy, told, sampler, 0)]

        for strategy in DIFFUSION:
            found["1", told, f"{strategy}, last step minus first"] = results.effect(*gain(strategy))
        for other in DIFFUSION[:-1]:
            name = f"rec_xT minus {other}"
            found["2", told, name] = results.effect(last("rec_xT"), last(other, -1))
        found["3", told, "rec_xT minus no_diff"] = results.effect(last("rec_xT"), last("no_diff", -1))
        both = (1, "rec_xT", told, "ddpm", -1)
        found["4", told, "mean of both minus no_diff"] = results.effect(both, last("no_diff", -1))
        found["4", told, "mean of both minus rec_xT"] = results.effect(both, last("rec_xT", -1))
        found["5", told, "rec_xT, last step minus first"] = results.effect(*gain("rec_xT", "ddim"))
        found["5", told, "rec_xT minus diff"] = results.effect(
            last("rec_xT", 1, "ddim"), last("diff", -1, "ddim")
        )
    trained = {run.embedding for run in results.rows}
    for embedding in ("not told t", *(name for name in EMBEDDINGS if name in trained - {*TOLD})):
        name = f"gain of rec_xT, {embedding} minus told t"
        terms = [(1, "rec_xT", embedding, "ddpm", -2), (-1, "rec_xT", embedding, "ddpm", 0),
                 (-1, "rec_xT", "told t", "ddpm", -2), (1, "rec_xT", "told t", "ddpm", 0)]  # fmt: skip
        found["t", embedding, name] = results.effect(*terms)
    return found


def corrected(
    found: dict[tuple[str, str, str], Effect | None], seeds: int
) -> dict[tuple[str, str, str], float]:
    """The p-values after Holm's correction for all effects of the plan. One that does not have all its
    `seeds` yet counts as p = 1: what is significant stays so when more is trained, and more can become
    significant."""
    p = [effect.p if effect and effect.seeds == seeds else 1.0 for effect in found.values()]
    return dict(zip(found, holm(p), strict=True))


def verdict(
    claim: str, told: str, found: dict[tuple[str, str, str], Effect | None], p: dict, seeds: int
) -> str:
    """Whether a claim of the paper is reproduced, by the rules of the plan. One effect can speak against a
    claim; for it, all must be known. Known is what has been trained with all `seeds`."""
    mine = {
        name: (effect, p.get((c, e, name)))
        for (c, e, name), effect in found.items()
        if (c, e) == (claim, told)
    }
    known = {name: pair for name, pair in mine.items() if pair[0] and pair[0].seeds == seeds}

    def above(name: str) -> bool:
        return known[name][1] < 0.05 and known[name][0].mean > 0

    def below(name: str) -> bool:
        return known[name][1] < 0.05 and known[name][0].mean < 0

    if claim == "3":
        against = any(effect.low > 2 or effect.high < -2 for effect, _ in known.values())
        shown = all(effect.low > -2 and effect.high < 2 for effect, _ in known.values())
    else:
        others = [name for name in known if claim == "1" and not name.startswith("rec_xT,")]
        wanted = [name for name in known if name not in others]
        against = any(map(below, wanted)) or any(map(above, others))
        shown = all(map(above, wanted))
    if against:
        return "not reproduced"
    if len(known) < len(mine):
        return "not all run"
    return "reproduced" if shown else "undecided"


# --- The report ---------------------------------------------------------------------------------

CLAIMS = {
    "1": "`rec_xT` alone gets better over the steps",
    "2": "it ends best of the diffusion strategies",
    "3": "it is on par with the plain U-Net",
    "4": "the ensemble of both is better than either",
    "5": "the same with DDIM",
}


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def effect_rows(found: dict[tuple[str, str, str], Effect | None], p: dict) -> list[str]:
    """A row for every effect that is known."""
    lines = []
    for key, effect in found.items():
        if effect:
            cells = f"{effect.mean:+.2f}", f"{effect.low:+.2f} to {effect.high:+.2f}"
            lines.append(row(*key, *cells, show_p(effect.p), show_p(p[key]), effect.seeds))
    return lines


def score_rows(results: Results) -> list[str]:
    """A row for every strategy, embedding and sampler that was run."""
    lines = []
    for strategy, embedding, sampler in product(STRATEGIES, EMBEDDINGS, SAMPLERS):
        plain = strategy == "no_diff"
        means = means_of(results, strategy, embedding, sampler)
        if not means or (plain and sampler != "ddpm"):
            continue
        mean, last = np.mean(means, axis=0), np.array(means)[:, -1 if plain else -2]
        steps = [f"{value:.2f}" for value in (mean if plain else mean[:-1])]
        spread = f"{last.std(ddof=1):.2f}" if len(last) > 1 else ""
        which = ("", "") if plain else (embedding, sampler)
        beside = "" if plain else f"{mean[-1]:.2f}"
        lines.append(row(strategy, *which, *steps, *[""] * (5 - len(steps)), spread, beside, len(last)))
    return lines


def report_of(dataset: str, results: Results, facts: dict) -> str:
    """The answers, effects and scores in Markdown. It depends on the scores and their facts alone."""
    found, ran = effects(results), facts["runs"].values()
    unknown = sum(effect is None for effect in found.values())

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(one[name]) for one in ran}))

    seeds = sorted({run.seed for run in results.rows})
    p = corrected(found, len(seeds))
    commits = ", ".join(sorted({short(one["commit"]) for one in ran}))
    incomplete = any(effect.seeds < len(seeds) for effect in found.values() if effect)
    some = ", and 1 where not all seeds were trained" if incomplete else ""
    lines = [
        f"# The finding on {dataset}",
        "",
        f"{len(results.rows)} trainings of {all_of('steps')} steps, seeds {', '.join(map(str, seeds))}, "
        f"{all_of('devices')}, commit {commits}; data: {facts['source']}.",
        "",
        "This page is made by `experiments/finding.py` from the scores beside it. [The",
        "plan](../results.md#the-plan) says what is asked, and what the answers mean.",
        "",
        "## Answers",
        "",
        row("claim of the paper", *TOLD),
        "|---|---|---|",
        *(
            row(f"{c}. {text}", *(verdict(c, t, found, p, len(seeds)) for t in TOLD))
            for c, text in CLAIMS.items()
        ),
        "",
        "## Effects",
        "",
        "In points of Dice, with 95 % intervals that are not corrected for the number of effects. Holm's p",
        f"is corrected for all {len(found)} effects of the plan{some}.",
        *([f"Effects left out, with fewer than two seeds trained: {unknown}."] if unknown else []),
        "",
        row("claim", "t", "effect", "mean", "95 % interval", "p", "Holm p", "seeds"),
        "|---" * 8 + "|",
        *effect_rows(found, p),
        "",
        "## Scores",
        "",
        "Mean Dice (%) over the test cases and the seeds, at each step. ± is the standard deviation between",
        'the seeds at the last step. "with no_diff" is the Dice of the ensemble: the mean of the',
        "probabilities at the last step and those of `no_diff`.",
        "",
        row("", "t", "sampler", *(f"step {k}" for k in range(1, 6)), "±", "with no_diff", "seeds"),
        "|---" * 11 + "|",
        *score_rows(results),
    ]
    return "\n".join(lines) + "\n"


def figure_of(sets: dict[str, Results]) -> Figure:
    """Dice over the sampling steps (DDPM), mean over the seeds, told t and not told t, on every data set."""
    figure = Figure(figsize=(1 + 4 * len(sets), 3.6), layout="constrained")
    grid = figure.subplots(1, 2 * len(sets))
    for panels, (name, results) in zip(grid.reshape(-1, 2), sets.items(), strict=True):
        panels[1].sharey(panels[0])
        for axes, told in zip(panels, TOLD, strict=True):
            for number, strategy in enumerate(STRATEGIES):
                plain = strategy == "no_diff"
                means = means_of(results, strategy, "told t" if plain else told, "ddpm")
                if means and plain:
                    axes.axhline(np.mean(means), color="black", linestyle="--", linewidth=1, label=strategy)
                elif len(means) > 1:
                    mean = np.mean(means, axis=0)[:-1]
                    axes.plot(range(1, len(mean) + 1), mean, label=strategy, **style(number))
            axes.set(xlabel="sampling step", xticks=range(1, 6))
            axes.set_title(f"{name},\n{told}", fontsize=9)
    grid[0].set_ylabel("Dice (%)")
    lines = {
        label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(lines.values(), lines, loc="outside right center", fontsize=8)
    return figure


def write_report(dataset: str, path: Path, folders: dict[Run, Path]) -> None:
    """Adds what is finished to the scores, and makes the report and its figure from them."""
    collect(path, folders)
    results = Results(read_rows(path))
    if not results.rows:
        raise InputError(f"{path}: no training is finished yet; run the command without --report-only")
    facts = json.loads(path.with_suffix(".json").read_text())
    replace_file(path.with_suffix(".md"), report_of(dataset, results, facts).encode())
    replace_file(path.with_suffix(".png"), png(figure_of({dataset: results})))
    print(f"{path.with_suffix('.md')}: the report")


def listed(words: str, known: Iterable[str]) -> list[str]:
    """Names separated by commas, each of which must be known."""
    names = words.split(",")
    for name in names:
        if name not in known:
            raise InputError(f"{name!r} is no name of a strategy or embedding here: {', '.join(known)}")
    return names


def planned(seeds: list[int], strategies: list[str], embeddings: list[str]) -> list[Run]:
    """The trainings, in their order: no_diff, with which all others are averaged; then what the main
    questions need, so that an unfinished table answers them; then the rest."""
    runs = [Run("no_diff", "told t", seed) for seed in seeds]
    for seed in seeds:
        runs += [Run(name, told, seed) for name in ("rec_xT", "diff") for told in TOLD]
        runs += [Run("rec_xT", "slow", seed)]
    runs += [
        Run(name, told, seed) for seed in seeds for name in ("sc_xt1", "rec_xt1", "sc_xt") for told in TOLD
    ]
    runs += [Run("rec_xT", "distinct", seed) for seed in seeds]
    return [
        run
        for run in runs
        if run.strategy == "no_diff" or (run.strategy in strategies and run.embedding in embeddings)
    ]


def main() -> None:
    text = "Train nothing; make the report from the scores of the runs that are finished."
    names, told = ",".join(STRATEGIES), ",".join(EMBEDDINGS)
    args, more = parse(__doc__, "runs/finding", "2,3,4,5,6", names, embeddings=told, report_only=text)
    path = HERE / "docs" / "finding" / f"{args.dataset.removeprefix('folder:')}.csv"
    with program():
        words = args.seeds.split(",")
        if len(set(words)) < 2 or not all(map(str.isdecimal, words)):
            raise InputError(f"--seeds: {args.seeds!r} must be two or more numbers, separated by commas")
        seeds = list(map(int, words))
        runs = planned(seeds, listed(args.strategies, STRATEGIES), listed(args.embeddings, EMBEDDINGS))
        folders = {run: run.folder(args.runs_dir) for run in runs}
        collect(path, folders)
        if args.report_only:
            return write_report(args.dataset, path, folders)
        missing = set(runs) - read_rows(path).keys()
        missing |= {Run("no_diff", "told t", run.seed) for run in missing}  # for their means with it
        options = ["--dataset", args.dataset, "--blend", "mean", *more]  # as in the paper
        jobs = [
            partial(in_own_process, train_and_score, folders[run], run, options)
            for run in runs
            if run in missing and not (folders[run] / "finding.json").exists()
        ]
        side_by_side(jobs, args.at_once)
        write_report(args.dataset, path, folders)


if __name__ == "__main__":
    main()
