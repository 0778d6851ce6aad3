"""Which table, and which figure, of the paper is this? Tables 1-5 and 8-10 and Figures 3-11 of Fu et
al. (2023), for runs of train.py that evaluate.py has scored.

    python report.py all runs -o report            # everything, for the runs that there are
    python report.py compare RUN RUN ...           # Tables 1, 8, 9; Figures 3, 4, 8, 9, 10
    python report.py ensemble RUN_NO_DIFF RUN_DIFF # Tables 2, 8, 9; Figures 5, 6, 11
    python report.py ablate RUN ...                # Tables 3, 4; over several runs 5, 10
    python report.py information --dataset NAME    # Figure 7

Every command fills a folder: report.md, a PNG per figure, a CSV per table. What is in a run's
`scores/` is read; what is not there, and cannot be, is predicted: the example pictures, the
ensemble, and the sampling seeds. Reading order: Scores, statistics, one section per command.
"""

import argparse
import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer
from matplotlib.figure import Figure
from scipy.spatial import KDTree
from tqdm import tqdm

from data import Dataset, Sample, open_dataset
from diffusion import SAMPLERS, TIMESTEPS, gaussian, linear_schedule, q_sample
from evaluate import Model, clean, dice, load, read_facts, score, score_split, surface
from strategies import STRATEGIES, cross_entropy, one_hot
from support import pictures
from support.command_line import (
    add_sampling_options, add_scoring_options, as_typed, check_counts, described, numbers,
)  # fmt: skip
from support.files import InputError, one_line, program, replace_file, tuples
from support.machine import prepare_machine, provenance
from support.scores import (
    TESTS, Score, against, improved, mean_sd, middle, of_cases, per_case, read_scores_csv, scores_name,
    write_scores,
)  # fmt: skip
from train import MAY_CHANGE, PRESETS, Config, run_dir

SAME = MAY_CHANGE - {"steps"} | {"seed", "convolutions"}  # may differ between runs of one group
# What the paper prints outside of its tables: mean Dice with DDPM (§6.1), and in how many percent of the
# test samples the ensemble beats the plain U-Net (§6.2, Figure 5).
PAPER_DICE = {
    "muscle_us": {"diff": 86.60, "rec_xT": 88.23}, "amos_ct": {"diff": 85.25, "rec_xT": 87.45},
    "prostate_mr": {"diff": 83.61, "rec_xT": 85.54}, "brats_mr": {"diff": 90.29, "rec_xT": 92.29},
}  # fmt: skip
PAPER_ENSEMBLE = {"muscle_us": 70.83, "amos_ct": 91.11, "prostate_mr": 89.02, "brats_mr": 64.54}


class Which(NamedTuple):
    """The scores and the predictions that are asked for. K = 0: the sampling steps of validation."""

    split: str = "test"
    checkpoint: str = "best"
    seed: int = 0
    K: int = 0
    data_dir: str = ""


# --- The folder that is filled ------------------------------------------------------------------


class Report:
    """A folder of tables (CSV) and figures (PNG), each written when it is made, and of report.md, which
    shows them all and is written last. Raises InputError at once where the folder cannot be written."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise InputError(f"{folder}: cannot be written; give another folder with -o")
        self.folder = folder
        self.lines: list[str] = []
        self.lacking: list[str] = []

    def text(self, line: str) -> None:
        self.lines += [line, ""]
        print(f"\n{line}".replace("$", "").replace("**", ""))

    def table(self, name: str, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        text = io.StringIO()
        csv.writer(text).writerows([[cell.replace("$", "") for cell in row] for row in [heads, *rows]])
        replace_file(self.folder / f"{name}.csv", text.getvalue().encode())
        self.text(f"**{title}** ([CSV]({name}.csv))")
        self.lines += ["| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows]] + [""]
        plain = [[cell.replace("$", "").replace("**", "") for cell in row] for row in [heads, *rows]]
        widths = [max(map(len, column)) for column in zip(*plain, strict=True)]
        for row in plain:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    def figure(self, name: str, title: str, figure: Figure) -> None:
        figure.suptitle(fill(title, int(16 * figure.get_figwidth())), fontsize=8)
        replace_file(self.folder / f"{name}.png", pictures.png(figure))
        self.text(f"**{title}**")
        self.lines += [f"![{title}]({name}.png)", ""]

    def missing(self, what: str, fix: str) -> None:
        self.lacking.append(f"- {what}: {fix}")

    def attempt(self, what: str, make: Callable, *args: object) -> None:
        """make(self, ...); where that cannot be, a line in the list of what is missing."""
        try:
            make(self, *args)
        except InputError as error:
            self.missing(what, str(error))

    def close(self) -> None:
        ran = provenance()
        if self.lacking:
            self.text("## What is missing, and what would make it")
            self.text("\n".join(self.lacking))
        head = f"# Tables and figures\n\nMade on {ran['date']} at commit {ran['commit']}, {ran['devices']}."
        replace_file(self.folder / "report.md", "\n".join([head, "", *self.lines]).encode())
        print(f"\nall of it: {self.folder / 'report.md'}")


# --- Scores of runs -----------------------------------------------------------------------------


class Scores(NamedTuple):
    """The scores of one way of training and sampling. The first axis is over runs that differ in their
    training seed alone; classes are foreground classes; distances are in `unit`."""

    config: dict
    sampler: str
    unit: str
    source: str
    classes: tuple[str, ...]
    uids: tuple[str, ...]
    folders: tuple[Path, ...]
    dice: Float[np.ndarray, "runs cases K foreground"]
    hausdorff: Float[np.ndarray, "runs cases K foreground"]

    @property
    def stem(self) -> str:
        """How the data set's files begin."""
        return self.config["dataset"].removeprefix("folder:")


def read_scores(folder: Path, which: Which) -> list[Scores]:
    """A run's scores, one per sampler. Raises InputError where there are none, or where they are not of
    the model that is there."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run; train first: python train.py --help")
    model, found = folder / which.checkpoint, []
    step = read_facts(model)[0].step if model.exists() else None
    pattern = f"{which.split}-{which.checkpoint}-*-seed{which.seed}.json"
    for path in sorted((folder / "scores").glob(pattern)):
        try:
            facts = json.loads(path.read_text())
            config = asdict(Config()) | facts["config"]  # scores may be older than a setting
            sampler, K, unit = facts["sampler"], facts["sampling_steps"], facts["unit"]
            source, trained = facts["source"], facts["trained_steps"]
        except (ValueError, KeyError, TypeError) as error:
            fix = "delete it and run evaluate.py test again"
            raise InputError(f"{path}: damaged ({one_line(error)}); {fix}") from error
        if sampler == "none" or (which.K or config["sampling_steps"]) == K:
            if step not in (None, trained):
                now = f"scored at step {trained}, the model is of step {step}"
                raise InputError(f"{path}: {now}; score it again: {test_command(folder, which)}")
            uids, classes, dices, distances = read_scores_csv(path.with_suffix(".csv"))
            facts = (config, sampler, unit, source, classes, uids, (folder,))
            found.append(Scores(*facts, dices[None], distances[None]))
    if not found:
        raise InputError(f"{folder}: no such scores; make them: {test_command(folder, which)}")
    return found


def test_command(folder: Path, which: Which) -> str:
    """The command that makes a run's scores."""
    asked = zip(which._fields, which, Which(), strict=True)
    words = [
        f"--{'sampling-steps' if name == 'K' else name.replace('_', '-')} {value}"
        for name, value, default in asked if value != default
    ]  # fmt: skip
    return " ".join(["python evaluate.py test", str(folder), *words])


def settings(scores: Scores) -> str:
    """What makes two runs runs of one group: all settings but those that may differ."""
    return json.dumps({name: value for name, value in scores.config.items() if name not in SAME})


def group(scores: Sequence[Scores]) -> list[Scores]:
    """Runs that differ in their training seed alone put together, in the order of the strategies. Raises
    InputError where runs are not of one data set, or not scored on the same cases."""
    first, groups = scores[0], {}
    for one in scores:
        these = f"{first.folders[0]} and {one.folders[0]}"
        if one.config["dataset"] != first.config["dataset"] or one.classes != first.classes:
            raise InputError(f"{these}: trained on different data sets or classes; compare runs of one")
        if set(one.uids) != set(first.uids):
            odd = sorted(set(one.uids) ^ set(first.uids))[0]
            raise InputError(f"{these}: scored on different cases (such as {odd}); test both again")
        order = [one.uids.index(uid) for uid in first.uids]
        one = one._replace(uids=first.uids, dice=one.dice[:, order], hausdorff=one.hausdorff[:, order])
        groups.setdefault((settings(one), one.sampler), []).append(one)
    together = []
    for members in groups.values():
        seeds = [member.config["seed"] for member in members]
        if len(set(seeds)) < len(seeds):
            these = " and ".join(str(member.folders[0]) for member in members)
            raise InputError(f"{these}: the same settings and training seed; leave one of them out")
        together.append(
            members[0]._replace(
                folders=tuple(member.folders[0] for member in members),
                dice=np.concatenate([member.dice for member in members]),
                hausdorff=np.concatenate([member.hausdorff for member in members]),
            )
        )
    samplers = [*SAMPLERS, "none"]
    return sorted(
        together, key=lambda s: (samplers.index(s.sampler), list(STRATEGIES).index(s.config["strategy"]))
    )


def labels(groups: Sequence[Scores]) -> list[str]:
    """The paper's name of each group's strategy, and those settings in which groups differ."""
    varying = [
        name for name in groups[0].config
        if name not in SAME | {"strategy"} and len({str(g.config.get(name)) for g in groups}) > 1
    ]  # fmt: skip
    return [
        ", ".join([name_of(g.config), *(f"{name} {g.config.get(name)}" for name in varying)]) for g in groups
    ]


def title(scores: Scores, which: Which) -> str:
    """Whose scores: the data set, where it comes from, and how many cases."""
    return f"{scores.config['dataset']} ({scores.source}), {len(scores.uids)} {which.split} cases"


def name_of(config: dict) -> str:
    """The paper's name of a run's strategy."""
    return STRATEGIES[config["strategy"]].title


NOTE = (
    "Dice and HD95 are means ± standard deviations over the cases, at the last sampling step. The tests are "
    "paired over cases, on Dice: they generalise over images, not over trainings; the seeds show the latter."
)


# --- report.py compare --------------------------------------------------------------------------


def compare(report: Report, folders: Sequence[Path], which: Which) -> None:
    """Table 1 (with tests against the best of each sampler), Tables 8 and 9, Figures 3, 10, 8, 9, 4."""
    groups = group([scores for folder in folders for scores in read_scores(folder, which)])
    named = list(zip(groups, labels(groups), strict=True))
    about, stem, unit = title(groups[0], which), groups[0].stem, groups[0].unit
    heads = ["method", "sampler", "Dice (%)", f"HD95 ({unit})", *TESTS]
    heads += ["training seeds", "SD of their Dice"] * (max(len(g.folders) for g in groups) > 1)
    heads += ["paper, Dice (%)"] * (stem in PAPER_DICE)
    rows = []
    for sampler in dict.fromkeys(g.sampler for g in groups):
        family = [(g, name) for g, name in named if g.sampler == sampler]
        values = [of_cases(g.dice)[:, -1] for g, _ in family]
        tests = against(values, int(np.argmax([np.nanmean(v) for v in values])))
        for (g, name), value, test in zip(family, values, tests, strict=True):
            row = [name, sampler, mean_sd(value, 100), mean_sd(of_cases(g.hausdorff)[:, -1]), *test]
            if "training seeds" in heads:
                runs = 100 * np.nanmean(per_case(g.dice)[:, :, -1], axis=1)
                row += [str(len(runs)), f"{runs.std(ddof=1):.2f}" if len(runs) > 1 else "-"]
            if stem in PAPER_DICE:
                known = PAPER_DICE[stem].get(g.config["strategy"]) if sampler == "ddpm" else None
                row.append(f"{known:.2f}" if known else "")
            rows.append(row)
    report.table(f"{stem}-table1", f"Table 1. Training strategies. {about}", heads, rows)
    report.text(f"{NOTE} The reference is the best of its sampler.")
    per_class(report, stem, about, [(g, n) for g, n in named if g.sampler in (groups[0].sampler, "none")])
    for sampler, curve_number, box_number in (("ddpm", 3, 8), ("ddim", 10, 9)):
        family = [(g, n) for g, n in named if g.sampler in (sampler, "none")]
        diffusion = [(g, n) for g, n in family if g.sampler == sampler and g.dice.shape[2] > 1]
        if diffusion:
            heading = f"Figure {curve_number}. Performance per sampling step, {sampler}. {about}"
            report.figure(f"{stem}-figure{curve_number}", heading, curves(family, unit))
            heading = f"Figure {box_number}. Last step minus first, {sampler}. {about}"
            report.figure(f"{stem}-figure{box_number}", heading, boxes(diffusion, unit))
    report.attempt(f"{stem}, Figure 4", example, named, which)


def per_class(report: Report, stem: str, about: str, named: Sequence[tuple[Scores, str]]) -> None:
    """Tables 8 and 9, where there are several foreground classes."""
    first = named[0][0]
    what = ((8, "Dice", "dice", "%", 100), (9, "HD95", "hausdorff", first.unit, 1))
    for number, score_name, field, unit, scale in what if len(first.classes) > 1 else ():
        rows = [
            [name, *(mean_sd(getattr(g, field)[:, :, -1, j].mean(axis=0), scale) for g, _ in named)]
            for j, name in enumerate(first.classes)
        ]
        heading = f"Table {number}. {score_name} ({unit}) per class. {about}"
        report.table(f"{stem}-table{number}", heading, ["class", *(name for _, name in named)], rows)


def curves(family: Sequence[tuple[Scores, str]], unit: str) -> Figure:
    """Figures 3 and 10: mean Dice and distance at every sampling step."""
    lines = [
        (name, 100 * np.nanmean(of_cases(g.dice), axis=0), np.nanmean(of_cases(g.hausdorff), axis=0))
        for g, name in family
    ]
    return pictures.curves(lines, unit)


def boxes(family: Sequence[tuple[Scores, str]], unit: str) -> Figure:
    """Figures 8 and 9: the last step's score minus the first's, per case, and in how many percent of the
    cases it is better (a higher Dice, a smaller distance)."""
    panels = []
    labels = "Dice, last step - first (percentage points)", f"HD95, last step - first ({unit})"
    for what, sign, scale, label in zip(("dice", "hausdorff"), (1, -1), (100, 1), labels, strict=True):
        values = [of_cases(getattr(scores, what)) for scores, _ in family]
        differences = [scale * (v[:, -1] - v[:, 0]) for v in values]
        panels.append((label, differences, [f"{improved(sign * d):.0f} % better" for d in differences]))
    return pictures.boxes([name for _, name in family], panels)


def example(report: Report, named: Sequence[tuple[Scores, str]], which: Which) -> None:
    """Figure 4: a case over the sampling steps, a row per strategy: the case whose Dice is in the middle."""
    first = named[0][0]  # with ddpm, where there is any
    family = [(g, n) for g, n in named if g.sampler == first.sampler]
    plain = [(g, n) for g, n in named if g.sampler == "none"][:1]
    if first.sampler == "none":
        return
    uid = first.uids[middle(np.mean([of_cases(g.dice)[:, -1] for g, _ in family], axis=0))]
    rows = []
    for scores, name in family + plain:
        model = load(scores.folders[0] / which.checkpoint)
        dataset = model.dataset(which.data_dir)
        number = dataset.uids[which.split].index(uid)
        case, probability = predict_case(model, dataset, number, which, first.sampler)
        found = clean(dataset.name, probability.argmax(-1))
        rows.append((name, [(classes, caption(case, classes, len(first.classes))) for classes in found]))
    about = f"{first.sampler}, the case of median Dice, {uid}; DS in %, HD in {first.unit}"
    heading = f"Figure 4. Predictions over the steps, {about}. {title(first, which)}"
    figure = pictures.example(case.image[..., 0], case.label, rows[len(family) :], rows[: len(family)])
    report.figure(f"{first.stem}-figure4", heading, figure)


def predict_case(
    model: Model, dataset: Dataset, number: int, which: Which, sampler: str
) -> tuple[Sample, np.ndarray]:
    """One case of a split with the noise that it has in scoring, and so with the same scores."""
    cases = [dataset.load(which.split, number)]
    return next(model.predict(cases, sampler=sampler, K=which.K, seed=which.seed, first=number))


def caption(case: Sample, classes: Integer[np.ndarray, "*spatial"], foreground: int) -> str:
    """Dice and distance, means over the foreground classes."""
    scores = score(classes[None], case, foreground + 1)
    return f"DS {100 * per_case(scores.dice)[0]:.1f}  HD {per_case(scores.hausdorff)[0]:.1f}"


# --- report.py ensemble -------------------------------------------------------------------------


def as_scores(scores: Sequence[Score], model: Model, sampler: str, uids: Sequence[str]) -> Scores:
    """Scores of the last step that were made here, as if they had been read."""
    facts = model.facts
    return Scores(
        facts.config, sampler, facts.unit, facts.source, facts.class_names[1:], tuple(uids),
        (model.path.parent,), np.stack([s.dice[-1:] for s in scores])[None],
        np.stack([s.hausdorff[-1:] for s in scores])[None],
    )  # fmt: skip


def predict_pair(
    plain: Model, diffusion: Model, dataset: Dataset, which: Which, sampler: str
) -> Iterator[tuple]:
    """Every case with three sets of classes: without diffusion, with, and of their probabilities' mean
    (§5.1.2)."""
    count = len(dataset.uids[which.split])

    def cases() -> Iterator[Sample]:
        return (dataset.load(which.split, i) for i in range(count))

    both = zip(
        plain.predict(cases(), K=1, seed=which.seed),
        diffusion.predict(cases(), sampler=sampler, K=which.K, seed=which.seed),
        strict=True,
    )
    for (case, without), (_, steps) in tqdm(both, "ensemble", count):
        yield case, three_classes(dataset.name, without[-1], steps[-1])


def three_classes(dataset: str, without: np.ndarray, steps: np.ndarray) -> list[np.ndarray]:
    """The classes of two probabilities and of their mean."""
    return [clean(dataset, p.argmax(-1)[None])[0] for p in (without, steps, (without + steps) / 2)]


def ensemble(report: Report, folders: Sequence[Path], which: Which, sampler: str = "ddpm") -> None:
    """Table 2, Tables 8 and 9 of the three, Figures 5, and 6 or 11."""
    models = [load(folder / which.checkpoint) for folder in folders]
    if models[0].network.noisy_mask or not models[1].network.noisy_mask:
        raise InputError(f"{folders[0]}, {folders[1]}: give a run of no_diff, then one with diffusion")
    if models[0].facts.dataset != models[1].facts.dataset:
        raise InputError(f"{folders[0]} and {folders[1]}: trained on different data sets; use runs of one")
    dataset, _ = (model.dataset(which.data_dir) for model in models)
    uids, classes, facts = dataset.uids[which.split], len(dataset.class_names), models[1].facts
    scored = [
        [score(predicted[None], case, classes) for predicted in three]
        for case, three in predict_pair(*models, dataset, which, sampler)
    ]
    names = ["No diff.", name_of(facts.config), "Ensemble"]
    methods = list(zip(*scored, strict=True))
    groups = [
        as_scores(method, models[min(i, 1)], "none" if i == 0 else sampler, uids)
        for i, method in enumerate(methods)
    ]
    about, stem = title(groups[0], which), groups[0].stem
    ran = {
        "split": which.split, "sampler": f"ensemble_{sampler}", "seed": which.seed, "unit": dataset.unit,
        "sampling_steps": which.K or facts.sampling_steps, "checkpoint": which.checkpoint,
        "runs": [str(folder) for folder in folders], "source": dataset.source, **provenance(),
    }  # fmt: skip
    write_scores(report.folder / f"{stem}-ensemble", list(methods[2]), dataset.class_names, ran)
    ensemble_table(report, stem, about, groups, names)
    per_class(report, f"{stem}-ensemble", about, list(zip(groups, names, strict=True)))
    heading = f"Figure 5. Differences against No diff., {sampler}. {about}"
    report.figure(f"{stem}-figure5", heading, bland_altman(groups, names))
    number = middle(of_cases(groups[2].dice)[:, 0])
    first = [predict_case(model, dataset, number, which, sampler) for model in models]
    case, three = first[0][0], three_classes(dataset.name, *(steps[-1] for _, steps in first))
    figure_number = 11 if dataset.name == "brats_mr" else 6
    heading = f"Figure {figure_number}. Surface error, the case of median Dice, {case.uid}. {about}"
    report.figure(f"{stem}-figure6", heading, surface_errors(case, three, names, dataset))


def ensemble_table(
    report: Report, stem: str, about: str, groups: Sequence[Scores], names: Sequence[str]
) -> None:
    """Table 2: with tests, and the share of better cases, against No diff."""
    values = [of_cases(g.dice)[:, 0] for g in groups]
    rows = []
    for i, (g, name, test) in enumerate(zip(groups, names, against(values, 0), strict=True)):
        share = f"{improved(values[i] - values[0]):.2f}" if i else ""
        rows.append([name, mean_sd(values[i], 100), mean_sd(of_cases(g.hausdorff)[:, 0]), *test, share])
    heads = ["method", "Dice (%)", f"HD95 ({groups[0].unit})", *TESTS, "better cases (%)"]
    if stem in PAPER_ENSEMBLE:
        heads += ["paper, better cases (%)"]
        rows = [[*row, f"{PAPER_ENSEMBLE[stem]:.2f}" if i == 2 else ""] for i, row in enumerate(rows)]
    report.table(f"{stem}-table2", f"Table 2. Without diffusion, with, and both. {about}", heads, rows)
    report.text(f"{NOTE} The reference is No diff.; better cases have a higher Dice than with it.")


def bland_altman(groups: Sequence[Scores], names: Sequence[str]) -> Figure:
    """Figure 5: differences against the first group over the mean of the two, and the share of better
    cases."""
    unit, panels = groups[0].unit, []
    what = (("dice", 1, 100, "Dice", "%", "points"), ("hausdorff", -1, 1, "HD95", unit, unit))
    for values, sign, scale, name, *units in what:
        for i in (1, 2):
            a, b = (scale * of_cases(getattr(groups[j], values))[:, 0] for j in (i, 0))
            head = f"{names[i]} - {names[0]}: {improved(sign * (a - b)):.0f} % better"
            panels.append((head, name, *units, a, b))
    return pictures.bland_altman(panels)


def distances_to(
    places: Integer[np.ndarray, "n dims"], mask: Bool[np.ndarray, "*spatial"], spacing: Sequence[float]
) -> Float[np.ndarray, "n"]:
    """From voxels to the surface of a mask; the image's diagonal where it is empty, as in scoring."""
    if not mask.any():
        return np.full(len(places), np.linalg.norm(np.array(mask.shape) * spacing))
    return KDTree(surface(mask) * np.array(spacing)).query(places * np.array(spacing))[0]


def surface_errors(
    case: Sample, predictions: Sequence[np.ndarray], names: Sequence[str], dataset: Dataset
) -> Figure:
    """Figures 6 and 11: the true surfaces, coloured by how far the predicted one of their class is."""
    volume, foreground = case.label.ndim == 3, range(1, len(dataset.class_names))
    present = [c for c in foreground if (case.label == c).any()]
    shapes = [pictures.faces(case.label == c) if volume else (surface(case.label == c),) for c in present]
    errors = [
        [distances_to(shape[0], classes == c, case.spacing) for c, shape in zip(present, shapes, strict=True)]
        for classes in predictions
    ]
    heads = [f"{n}\n{caption(case, p, len(foreground))}" for n, p in zip(names, predictions, strict=True)]
    return pictures.surface_errors(case.image[..., 0], shapes, errors, heads, case.spacing, dataset.unit)


# --- report.py ablate ---------------------------------------------------------------------------


def ablate(
    report: Report, folders: Sequence[Path], which: Which, steps: Sequence[int], seeds: int, sampler: str
) -> None:
    """Tables 3 and 4 of the first run, Tables 5 and 10 of all of them."""
    folder, model = folders[0], load(folders[0] / which.checkpoint)
    if not model.network.noisy_mask:
        raise InputError(f"{folder}: no diffusion in it; give a run that has sampling steps first")
    dataset, config = model.dataset(which.data_dir), model.facts.config
    sampling_steps(report, model, dataset, which, steps, sampler)
    if seeds > 1:
        inference_seeds(report, model, dataset, which, seeds, sampler)
    scores = [one for folder in folders for one in read_scores(folder, which)]
    for number, field, value in ((5, "transformer", False), (10, "train_timesteps", 5)):
        if not variants(report, number, field, scores, which):
            command = train_command(config, run_dir=f"{folder}-{field}", **{field: value})
            test = test_command(Path(f"{folder}-{field}"), which)
            report.missing(f"{config['dataset']}, Table {number}", f"`{command} && {test}`")


def sampling_steps(
    report: Report, model: Model, dataset: Dataset, which: Which, steps: Sequence[int], sampler: str
) -> None:
    """Table 3. What the run's scores do not hold yet is predicted, and added to them."""
    folder, found = model.path.parent, []
    for K in steps:
        name = scores_name(which.split, which.checkpoint, sampler, K, which.seed)
        if not (folder / "scores" / f"{name}.csv").exists():
            score_split(model, dataset, which.split, sampler=sampler, K=K, seed=which.seed)
        found += [s for s in read_scores(folder, which._replace(K=K)) if s.sampler == sampler]
    values = [of_cases(s.dice)[:, -1] for s in found]
    tests = against(values, int(np.argmax([np.nanmean(v) for v in values])))
    rows = [
        [str(K), mean_sd(value, 100), mean_sd(of_cases(s.hausdorff)[:, -1]), *test]
        for K, s, value, test in zip(steps, found, values, tests, strict=True)
    ]
    heading = f"Table 3. Number of sampling steps, {folder.name}, {sampler}. {title(found[0], which)}"
    heads = ["sampling steps", "Dice (%)", f"HD95 ({found[0].unit})", *TESTS]
    report.table(f"{folder.name}-table3", heading, heads, rows)
    report.text(f"{NOTE} The reference is the best of them.")


def inference_seeds(
    report: Report, model: Model, dataset: Dataset, which: Which, seeds: int, sampler: str
) -> None:
    """Table 4: over all pairs of sampling seeds, how far their predictions are from each other, and how far
    their scores are."""
    count, classes = len(dataset.uids[which.split]), len(dataset.class_names)

    def predictions(seed: int) -> Iterator[tuple[Sample, np.ndarray]]:
        cases = (dataset.load(which.split, i) for i in range(count))
        return model.predict(cases, sampler=sampler, K=which.K, seed=seed)

    def apart(scores: Sequence[Score], a: int, b: int, field: str) -> np.ndarray:
        return np.abs(per_case(getattr(scores[a], field)) - per_case(getattr(scores[b], field)))

    measured = []
    together = zip(*(predictions(which.seed + n) for n in range(seeds)), strict=True)
    for same_case in tqdm(together, f"{seeds} seeds", count):
        case = same_case[0][0]
        found = [clean(dataset.name, probability.argmax(-1)) for _, probability in same_case]
        scores = [score(classified, case, classes) for classified in found]
        pairs = [
            (*agreement(found[a], found[b], case, classes),
             *(apart(scores, a, b, field) for field in ("dice", "hausdorff")))
            for a, b in combinations(range(seeds), 2)
        ]  # fmt: skip
        measured.append(np.mean(pairs, axis=0))  # [measure, K]
    rows = [
        [str(k + 1), *(mean_sd(np.array([m[i, k] for m in measured]), (100, 1)[i % 2]) for i in range(4))]
        for k in range(measured[0].shape[1])
    ]
    unit, run = dataset.unit, model.path.parent.name
    heads = ["step", "Dice of each other (%)", f"HD95 of each other ({unit})",
             "difference in Dice (points)", f"difference in HD95 ({unit})"]  # fmt: skip
    about = f"{model.facts.dataset} ({dataset.source}), {count} {which.split} cases"
    heading = f"Table 4. {seeds} sampling seeds, {run}, {sampler}. {about}"
    report.table(f"{run}-table4", heading, heads, rows)
    report.text(
        "Means ± standard deviations over the cases, of the mean over all pairs of seeds: Dice and HD95 of "
        "one prediction against the other; the absolute difference of their scores against the truth."
    )


def agreement(a: np.ndarray, b: np.ndarray, case: Sample, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Dice and distance of one prediction against another per step, means over the foreground classes that
    either has."""
    steps = [score(a[k : k + 1], case._replace(label=b[k]), classes) for k in range(len(a))]
    return tuple(np.array([per_case(getattr(s, of))[0] for s in steps]) for of in ("dice", "hausdorff"))


def variants(report: Report, number: int, field: str, scores: Sequence[Scores], which: Which) -> bool:
    """Tables 5 and 10: groups that differ in one setting alone, side by side. Whether there are any."""
    groups = group(scores)
    pairs = {}
    for g in groups:
        others = {name: value for name, value in json.loads(settings(g)).items() if name != field}
        pairs.setdefault((json.dumps(others), g.sampler), []).append(g)
    rows = []
    for members in pairs.values():
        if len(members) > 1:
            members = sorted(members, key=lambda member: -member.config[field])
            values = [of_cases(g.dice)[:, -1] for g in members]
            for g, value, test in zip(members, values, against(values, 0), strict=True):
                row = [name_of(g.config), g.sampler, str(g.config[field]), mean_sd(value, 100)]
                rows.append([*row, mean_sd(of_cases(g.hausdorff)[:, -1]), *test])
    if rows:
        what = {5: "Without Transformer", 10: "Length of the training schedule"}[number]
        heading = f"Table {number}. {what}. {title(groups[0], which)}"
        heads = ["method", "sampler", field, "Dice (%)", f"HD95 ({groups[0].unit})", *TESTS]
        report.table(f"{groups[0].stem}-table{number}", heading, heads, rows)
        report.text(f"{NOTE} The reference is the first of each pair.")
    return bool(rows)


# --- report.py information ----------------------------------------------------------------------


def information(report: Report, name: str, data_dir: Path, shape: Sequence[int], uid: str, seed: int) -> None:
    """Figure 7: what x_t still tells of x_0, for one real mask (of a made-up data set, of size `shape`):
    the case `uid`, or the first test case."""
    dataset = open_dataset(name, data_dir, shape)
    found = [(split, uids.index(uid)) for split, uids in dataset.uids.items() if uid in uids]
    if uid and not found:
        raise InputError(f"--uid {uid}: {name} has no such case")
    case = dataset.load(*(found or [("test" if dataset.uids["test"] else "train", 0)])[0])
    schedule, classes = linear_schedule(), len(dataset.class_names)
    x_0 = one_hot(jnp.asarray(case.label[None].astype(np.int32)), classes)
    draws = -(-(2**17) // case.label.size)  # a small image alone would show chance
    x_0 = jnp.repeat(x_0, draws, axis=0)
    keys = jax.random.split(jax.random.key(seed), draws)
    times = np.unique(np.rint(np.linspace(1, schedule.T, 51)).astype(int))

    def information_at(x: jax.Array) -> tuple[float, float]:
        predicted = np.asarray(x).argmax(-1)
        truth = np.broadcast_to(case.label, predicted.shape)
        scores = [dice(predicted == c, truth == c) for c in range(1, classes)]
        return float(cross_entropy(x, x_0).mean()), 100 * float(np.nanmean(scores))

    def noise(number: int) -> jax.Array:
        return gaussian(jax.vmap(jax.random.fold_in, (0, None))(keys, number), x_0)

    limit = information_at(noise(0))
    told = np.array(
        [
            information_at(q_sample(schedule, x_0, jnp.full(draws, t), noise(t)))
            for t in tqdm(times.tolist(), "noise levels")
        ]
    )
    heading = f"Figure 7. Information contained in $x_t$. {name} ({dataset.source}), {case.uid}"
    beta, alpha_bar = np.asarray(schedule.beta)[1:], np.asarray(schedule.alpha_bar)[1:]
    figure = pictures.information(beta, alpha_bar, times, told, limit)
    report.figure(f"{dataset.name}-figure7", heading, figure)
    rows = [[str(t), f"{ce:.4f}", f"{d:.2f}"] for t, (ce, d) in zip(times, told, strict=True) if t % 100 == 1]
    rows.append(["noise alone", f"{limit[0]:.4f}", f"{limit[1]:.2f}"])
    heads = ["t", "cross entropy (nats)", "Dice (%)"]
    report.table(f"{dataset.name}-figure7", f"Figure 7 in numbers. {draws} draws of the noise", heads, rows)
    report.text(
        "Cross entropy of softmax($x_t$), and Dice of the class with the highest $x_t$, mean over foreground."
    )


# --- report.py all ------------------------------------------------------------------------------


def train_command(config: dict, **changes: object) -> str:
    """The command that trains with these settings; what the data set's preset says is left out."""
    wanted = config | changes
    name, strategy = wanted["dataset"], wanted["strategy"]
    usual = asdict(Config()) | PRESETS[name.partition(":")[0]] | {"run_dir": run_dir(name, strategy)}
    words = [f"python train.py --dataset {name} --strategy {strategy}"]
    for setting, value in wanted.items():
        option, value = setting.replace("_", "-"), tuples(value)
        # dtype and convolutions are chosen for the machine; an older version had settings that are gone.
        chosen = setting in ("dataset", "strategy", "dtype", "convolutions") or setting not in usual
        if chosen or value == usual[setting]:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words.append(f"--{option} {as_typed(value)}")
    return " ".join(words)


def everything(
    report: Report, runs_dir: Path, which: Which, steps: Sequence[int], seeds: int, sampler: str
) -> None:
    """All tables and figures of every data set that has runs."""
    by_dataset: dict[str, dict[Path, dict]] = {}
    for folder in sorted(runs_dir.iterdir() if runs_dir.is_dir() else []):
        if (folder / which.checkpoint).is_file():
            config = read_facts(folder / which.checkpoint)[0].config
            by_dataset.setdefault(config["dataset"], {})[folder] = config
    if not by_dataset:
        raise InputError(f"{runs_dir}: no runs with a checkpoint; train first: python train.py --help")
    for name, runs in by_dataset.items():
        report.text(f"## {name}")
        one_dataset(report, name, runs, which, (steps, seeds, sampler))


def one_dataset(report: Report, name: str, runs: dict[Path, dict], which: Which, ablation: tuple) -> None:
    """All tables and figures of one data set, from its runs' folders and settings."""
    scored = {}
    for folder, config in runs.items():
        try:
            found = {scores.sampler for scores in read_scores(folder, which)}
            scored[folder] = config
        except InputError:
            found = set()
        if not found >= (set(SAMPLERS) if STRATEGIES[config["strategy"]].noisy_mask else {"none"}):
            report.missing(f"{name}, scores of {folder.name}", f"`{test_command(folder, which)}`")
    variant = {
        folder: (config["transformer"], config["train_timesteps"]) for folder, config in scored.items()
    }
    # One variant of network and schedule is compared, that of most runs; Tables 5 and 10 have the others.
    usual = max([(True, TIMESTEPS), *variant.values()], key=list(variant.values()).count)
    plain = {folder: config for folder, config in scored.items() if variant[folder] == usual}
    # The paper's strategy first, where it is there.
    best = sorted(plain, key=lambda f: -list(STRATEGIES).index(plain[f]["strategy"]))
    first = (best or list(runs))[0]
    for strategy in STRATEGIES:
        if strategy not in {config["strategy"] for config in runs.values()}:
            folder = first.parent / f"{name.replace(':', '-')}-{strategy}"
            command = train_command(runs[first], strategy=strategy, run_dir=str(folder))
            report.missing(
                f"{name}, {STRATEGIES[strategy].title}", f"`{command} && {test_command(folder, which)}`"
            )
    if plain:
        report.attempt(f"{name}, Table 1", compare, list(plain), which)
    without = [folder for folder in best if plain[folder]["strategy"] == "no_diff"]
    diffusion = [folder for folder in best if plain[folder]["strategy"] != "no_diff"]
    if without and diffusion:
        pair = (without[0], diffusion[0])
        report.attempt(f"{name}, Table 2", ensemble, pair, which, ablation[2])
    if diffusion:
        others = [folder for folder in scored if folder != diffusion[0]]
        report.attempt(f"{name}, Tables 3 and 4", ablate, [diffusion[0], *others], which, *ablation)
    data_dir = Path(which.data_dir or runs[first]["data_dir"])
    shape = tuples(runs[first]["phantom_shape"])
    report.attempt(f"{name}, Figure 7", information, name, data_dir, shape, "", which.seed)


# --- The program --------------------------------------------------------------------------------


def run_command(args: argparse.Namespace) -> None:
    """Does what was asked for, into a report."""
    command, report = args.command, Report(Path(args.output))
    if command == "information":
        shape = PRESETS.get(args.dataset, {}).get("phantom_shape", ())
        data_dir = Path(args.data_dir or Config.data_dir)
        information(report, args.dataset, data_dir, shape, args.uid, args.seed)
    else:
        which = Which(args.split, args.checkpoint, args.seed, args.sampling_steps, args.data_dir)
        if command == "compare":
            compare(report, args.runs, which)
        elif command == "ensemble":
            ensemble(report, (args.run_no_diff, args.run_diff), which, args.sampler)
        elif command == "ablate":
            ablate(report, args.runs, which, args.steps, args.seeds, args.sampler)
        else:
            everything(report, args.runs_dir, which, args.steps, args.seeds, args.sampler)
    report.close()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(**described(__doc__))
    commands = parser.add_subparsers(required=True, dest="command")
    compared = commands.add_parser("compare", help="Compare training strategies.")
    compared.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Run folders with scores.")
    averaged = commands.add_parser("ensemble", help="Compare without diffusion, with it, and both.")
    averaged.add_argument("run_no_diff", type=Path, help="A run of no_diff.")
    averaged.add_argument("run_diff", type=Path, help="A run with diffusion.")
    ablated = commands.add_parser("ablate", help="Vary sampling steps, seeds, Transformer and schedule.")
    ablated.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Tables 3, 4 are of the first.")
    told = commands.add_parser("information", help="Show what x_t tells of x_0.")
    told.add_argument("--dataset", required=True, help="A data set of train.py.")
    told.add_argument("--uid", default="", help="Which case. Default: the first test case.")
    told.add_argument("--data-dir", default="", help=f"Where the HDF5 file is. Default: {Config.data_dir}.")
    whole = commands.add_parser("all", help="Make everything, for the runs that there are.")
    whole.add_argument("runs_dir", type=Path, help="The folder that holds the runs.")
    for command in (ablated, whole):
        command.add_argument(
            "--steps", type=numbers, default=(2, 5, 10, 20), metavar="K,K",
            help="The numbers of sampling steps of Table 3. Default: 2,5,10,20.",
        )  # fmt: skip
        command.add_argument(
            "--seeds", type=int, default=3, help="How many sampling seeds, from --seed on. Default: 3."
        )
    for command in (averaged, ablated, whole):
        command.add_argument(
            "--sampler", default="ddpm", choices=list(SAMPLERS), help="For what is predicted. Default: ddpm."
        )
    for command in (compared, averaged, ablated, whole):
        add_scoring_options(command)
    for command in (compared, averaged, ablated, told, whole):
        add_sampling_options(command)
        command.add_argument("-o", "--output", default="report", help="Folder to fill. Default: report.")
    args = parser.parse_args(argv)
    check_counts(parser, args, seed=0, seeds=1, sampling_steps=0)
    if min(getattr(args, "steps", (1,))) < 1:
        parser.error("--steps must be 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    prepare_machine()
    with program():
        run_command(parse(argv))


if __name__ == "__main__":
    main()
