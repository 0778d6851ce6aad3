"""Which table, and which figure, of the paper is this? Tables 1-5 and 8-10 and Figures 3-11 of Fu et
al. (2023), for runs of train.py that evaluate.py has scored.

    python report.py all runs -o report            # everything, for the runs that there are
    python report.py compare RUN RUN ...           # Tables 1, 8, 9; Figures 3, 4, 8, 9, 10
    python report.py ensemble RUN_NO_DIFF RUN_DIFF # Tables 2, 8, 9; Figures 5, 6, 11
    python report.py ablate RUN ...                # Tables 3, 4; over several runs 5, 10
    python report.py information --dataset NAME    # Figure 7

Every command fills a folder: report.md, a PNG per figure, a CSV per table. What is in a run's `scores/` is
read. What cannot be there is predicted: the example pictures, the ensemble, and the sampling seeds. The folds
of a cross-validation (`prepare.py build --folds`) become one row with the cases of all of them; what needs a
single network is of the first fold. Reading order: the options, the scores of runs, predictions, then a
section per command.
"""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from data import Sample, open_dataset
from diffusion import SAMPLERS, TIMESTEPS, gaussian, linear_schedule, q_sample
from evaluate import (
    Classes, Model, Probabilities, clean, dice, distances, hausdorff_95, in_pictures, load, score,
    score_split, scores_of, surface,
)  # fmt: skip
from settings import PRESETS, Config
from strategies import STRATEGIES, cross_entropy, one_hot
from support.results import pictures
from support.disk.command_line import (
    Parser, add_sampling_options, add_scoring_options, as_typed, check_counts, numbers,
)  # fmt: skip
from support.disk.files import InputError, program, tuples
from support.machine.devices import prepare_machine, provenance
from support.results.pictures import Label
from support.results.report_folder import Report
from support.results.scores import (
    DICE, HD95, RunScores, against, best_of, class_tests, compared, deviation, first_fold,
    fold_of, group, improved, lost, mean_sd, middle, per_case, pooled, read_scores, scores_name,
    settings, write_scores,
)  # fmt: skip
from train import MAY_CHANGE

MAY_DIFFER = MAY_CHANGE - {"steps"} | {"seed", "convolutions"}  # may differ between runs of one group
# What the paper prints outside of its tables: mean Dice with DDPM (§6.1), and in how many percent of the
# test samples the ensemble beats the plain U-Net (§6.2, Figure 5).
PAPER_DICE = {
    "muscle_us": {"diff": 86.60, "rec_xT": 88.23}, "amos_ct": {"diff": 85.25, "rec_xT": 87.45},
    "prostate_mr": {"diff": 83.61, "rec_xT": 85.54}, "brats_mr": {"diff": 90.29, "rec_xT": 92.29},
}  # fmt: skip
PAPER_ENSEMBLE = {"muscle_us": 70.83, "amos_ct": 91.11, "prostate_mr": 89.02, "brats_mr": 64.54}
# Tables 5 and 10: which setting varies, and what trains another value of it.
VARIED = (
    (5, "Without Transformer", "transformer", "--no-transformer"),
    (10, "Length of the training schedule", "train_timesteps", "--train-timesteps 5"),
)


class Options(NamedTuple):
    """What a command line asks for; each field is the option of its name."""

    split: str = "test"
    checkpoint: str = "best"
    seed: int = 0
    sampling_steps: int = 0  # 0: as many as in validation
    data_dir: str = ""
    sampler: str = "ddpm"  # of what is predicted here
    steps: tuple[int, ...] = (2, 5, 10, 20)  # of Table 3
    seeds: int = 3  # of Table 4


# --- Scores of runs -----------------------------------------------------------------------------


def read_run(folder: Path, options: Options) -> list[RunScores]:
    """A run's scores, one per sampler. Raises InputError if there are none, or if they are not of
    the model that is there."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run; train first: python train.py --help")
    model, found = folder / options.checkpoint, []
    step = load(model).facts.step if model.exists() else None
    pattern = f"{options.split}-{options.checkpoint}-*-seed{options.seed}.json"
    for path in sorted((folder / "scores").glob(pattern)):
        one = read_scores(path)
        config = asdict(Config()) | one.config  # scores may be older than a setting
        if config["strategy"] not in STRATEGIES or one.sampler not in (*SAMPLERS, "none"):
            what = f"strategy {config['strategy']} and sampler {one.sampler}"
            raise InputError(f"{path}: this code does not have {what}; delete it and its CSV file")
        wanted = options.sampling_steps or config["sampling_steps"]
        if one.sampler == "none" or one.dice.shape[2] == wanted:
            if step not in (None, one.trained_steps):
                now = f"scored at step {one.trained_steps}, the model is of step {step}"
                raise InputError(f"{path}: {now}; score it again: {test_command(folder)}")
            found.append(one._replace(config=config, name=STRATEGIES[config["strategy"]].title))
    if not found:
        raise InputError(f"{folder}: no such scores; make them: {test_command(folder)}")
    return found


def ordered(groups: Sequence[RunScores]) -> list[RunScores]:
    """Groups in the order of the samplers, and for each sampler in that of the strategies."""
    samplers, strategies = [*SAMPLERS, "none"], list(STRATEGIES)
    return sorted(groups, key=lambda g: (samplers.index(g.sampler), strategies.index(g.config["strategy"])))


def about(scores: RunScores, options: Options) -> str:
    """What the scores are of: the data set, where it comes from, and how many cases."""
    return f"{scores.config['dataset']} ({scores.source}), {len(scores.uids)} {options.split} cases"


NOTE = (
    "Dice and HD95 are means ± standard deviations (of a sample) over the cases, at the last sampling step. "
    "A case's mean is over the classes that its truth has; a missed one has Dice 0, and the image's diagonal "
    "as its distance. The tests are paired over cases, on Dice: they generalise over images, not over "
    "trainings; the seeds show the latter."
)


# --- Predictions --------------------------------------------------------------------------------


def predict(
    model: Model, options: Options, case: int | None = None
) -> Iterator[tuple[Sample, Probabilities]]:
    """The cases of a split, or one of them, with the noise that they have in scoring, and so with the same
    scores. Raises InputError if there are none."""
    dataset, K = model.dataset(options.data_dir), options.sampling_steps if model.network.noisy_mask else 1
    count = len(dataset.uids[options.split])
    if not count:
        raise InputError(f"{dataset.name}: no {options.split} cases; build it again with some")
    chosen = range(count) if case is None else range(case, case + 1)
    cases = (dataset.load(options.split, i) for i in chosen)
    how = model.sampling(sampler=options.sampler, K=K, seed=options.seed)
    return model.predict(cases, how, first=chosen.start)


def caption(case: Sample, classes: Label, foreground: int) -> str:
    """Dice and distance of a prediction in words, means over the foreground classes."""
    scores = score(classes[None], case, foreground + 1)
    return f"DS {100 * per_case(scores.dice)[0]:.1f}  HD {per_case(scores.hausdorff)[0]:.1f}"


# --- report.py compare --------------------------------------------------------------------------


def compare(report: Report, folders: Sequence[Path], options: Options) -> None:
    """Table 1 (with tests against the best of each sampler), Tables 8 and 9, Figures 3, 10, 8, 9, 4. Of
    folds, Figure 4 is of the first, and everything else of all cases."""
    scores = [one for folder in folders for one in read_run(folder, options)]
    groups = ordered(group(pooled(scores, MAY_DIFFER), MAY_DIFFER))
    stem, whose = groups[0].stem, about(groups[0], options)
    rows = [row for sampler in dict.fromkeys(g.sampler for g in groups) for row in table_1(groups, sampler)]
    report.table(f"{stem}-table1", f"Table 1. Training strategies. {whose}", rows)
    beside = f"if that is not {STRATEGIES[Config.strategy].title}, the tests against it stand beside"
    report.text(f"{NOTE} The reference is the best of its sampler; {beside}.")
    if any((folder / "scores" / "own_grid").is_dir() for folder in folders):
        report.text(
            "All scores here are of images resampled by prepare.py, as in the paper. Those on the images' "
            "own grid, which are to be reported to others, are in scores/own_grid of each run."
        )
    per_class(report, stem, whose, [g for g in groups if g.sampler in (groups[0].sampler, "none")])
    for sampler, curve_number, box_number in (("ddpm", 3, 8), ("ddim", 10, 9)):
        family = [g for g in groups if g.sampler in (sampler, "none")]
        diffusion = [g for g in family if g.sampler == sampler and g.dice.shape[2] > 1]
        if diffusion:
            title = f"Figure {curve_number}. Performance per sampling step, {sampler}. {whose}"
            report.figure(f"{stem}-figure{curve_number}", title, pictures.curves(family))
            title = f"Figure {box_number}. Last step minus first, {sampler}. {whose}"
            report.figure(f"{stem}-figure{box_number}", title, pictures.boxes(diffusion))
    report.attempt(f"{stem}, Figure 4", example, ordered(group(first_fold(scores), MAY_DIFFER)), options)


def table_1(groups: Sequence[RunScores], sampler: str) -> list[dict[str, str]]:
    """The rows of one sampler, with tests against the best, and, if another is the best, against the
    paper's method; with the paper's numbers if it has some of the data set, and with the spread over
    training seeds if there are several in any group."""
    family, rows = [g for g in groups if g.sampler == sampler], []
    # Which is the best shows afterwards; the paper's method was chosen before.
    ours = [i for i, g in enumerate(family) if g.config["strategy"] == Config.strategy]
    head, tests = f"against {STRATEGIES[Config.strategy].title}", [{}] * len(family)
    if len(ours) == 1 and ours[0] != best_of(family):
        tests = against([g.last(DICE) for g in family], ours[0])
    several = max(len(g.folders) for g in groups) > 1
    paper = PAPER_DICE.get(groups[0].stem, {}) if sampler == "ddpm" else {}
    for g, cells, test in zip(family, compared(family), tests, strict=True):
        row = {"method": g.name, "sampler": sampler, **cells}
        row |= {f"{head}: {column}": p for column, p in test.items() if column != "Wilcoxon p"}
        if several:
            runs = 100 * np.nanmean(per_case(g.dice)[:, :, -1], axis=1)
            row["training seeds"] = str(len(runs))
            row["SD of their Dice"] = f"{deviation(runs):.2f}" if len(runs) > 1 else "-"
        if known := paper.get(g.config["strategy"]):
            row["paper, Dice (%)"] = f"{known:.2f}"
        rows.append(row)
    return rows


def per_class(
    report: Report, stem: str, whose: str, groups: Sequence[RunScores], tests: Sequence[dict[str, str]] = ()
) -> None:
    """Tables 8 (with more columns for `tests`, a row per class) and 9, if there are several foreground
    classes; if some are missed or invented, Table 9 again without these, but with their numbers."""
    if len(groups[0].classes) == 1:
        return
    hd95 = f"HD95 ({groups[0].unit})"
    tables = [("8", "Dice (%)", DICE, groups), ("9", hd95, HD95, groups)]
    if any(lost(g.outcome[:, :, -1]) for g in groups):
        tables.append(("9-found", f"{hd95} of found classes", HD95, [g.found() for g in groups]))
    for number, what, measure, shown in tables:
        rows = [{"class": name} for name in groups[0].classes]
        for j, row in enumerate(rows):
            for g in shown:
                others = lost(g.outcome[:, :, -1, j]) if number == "9-found" else ""
                row[g.name] = mean_sd(g.per_class(measure)[:, j]) + (f" ({others})" if others else "")
            row |= tests[j] if number == "8" and tests else {}
        report.table(f"{stem}-table{number}", f"Table {number[0]}. {what} per class. {whose}", rows)


def example(report: Report, groups: Sequence[RunScores], options: Options) -> None:
    """Figure 4: a case over the sampling steps, a row per strategy: the case whose Dice is in the middle."""
    first = groups[0]  # with ddpm, if there is any
    if first.sampler == "none":
        return
    family = [g for g in groups if g.sampler == first.sampler]
    uid = first.uids[middle(np.mean([g.last(DICE) for g in family], axis=0))]
    rows, without = {}, []
    for g in family + [g for g in groups if g.sampler == "none"][:1]:
        model = load(g.folders[0] / options.checkpoint)
        number = model.dataset(options.data_dir).uids[options.split].index(uid)
        [(case, probability)] = predict(model, options._replace(sampler=first.sampler), number)
        found = clean(model.facts.config.dataset, probability.argmax(-1))
        captions = [caption(case, classes, len(g.classes)) for classes in found]
        image, truth, *steps = pictures.over_steps(*in_pictures(case, found, probability), captions)
        if g.sampler == "none":
            without = [steps[-1]._replace(head=g.name)]
        else:
            rows[g.name] = steps
    what = f"{first.sampler}, the case of median Dice, {uid}; DS in %, HD in {first.unit}"
    title = f"Figure 4. Predictions over the steps, {what}. {about(first, options)}"
    lines = [[image, truth, *without], *rows.values()]
    figure = pictures.panels(lines, model.facts.class_names, beside=["", *rows])
    report.figure(f"{first.stem}-figure4", title, figure)


# --- report.py ensemble -------------------------------------------------------------------------


def predict_pair(
    without: Model, diffusion: Model, options: Options, case: int | None = None
) -> Iterator[tuple[Sample, list[Label]]]:
    """Cases with three sets of classes at the last step: without diffusion, with it, and of the mean of their
    probabilities (§5.1.2)."""
    both = zip(*(predict(model, options, case) for model in (without, diffusion)), strict=True)
    name = without.facts.config.dataset
    for (sample, [*_, a]), (_, [*_, b]) in both:
        yield sample, [clean(name, p.argmax(-1)[None])[0] for p in (a, b, (a + b) / 2)]


def ensemble(report: Report, folders: Sequence[Path], options: Options) -> None:
    """Table 2, Tables 8 and 9 of the three, Figures 5, and 6 or 11."""
    models = [load(folder / options.checkpoint) for folder in folders]
    if models[0].network.noisy_mask or not models[1].network.noisy_mask:
        raise InputError(f"{folders[0]}, {folders[1]}: give a run of no_diff, then one with diffusion")
    if models[0].facts.config.dataset != models[1].facts.config.dataset:
        raise InputError(f"{folders[0]} and {folders[1]}: trained on different data sets; use runs of one")
    facts, sampler = models[1].facts, options.sampler
    count = len(models[0].dataset(options.data_dir).uids[options.split])
    scored = [
        [score(predicted[None], case, len(facts.class_names)) for predicted in three]
        for case, three in tqdm(predict_pair(*models, options), "ensemble", count)
    ]
    parts = zip([*models, models[1]], ("none", sampler, sampler), zip(*scored, strict=True), strict=True)
    groups = [scores_of(*part) for part in parts]
    groups[2] = groups[2]._replace(name="Ensemble")
    names, whose, stem = [g.name for g in groups], about(groups[0], options), groups[0].stem
    ran = {
        "split": options.split, "seed": options.seed, "checkpoint": options.checkpoint,
        "sampling_steps": options.sampling_steps or facts.config.sampling_steps,
        "runs": [str(folder) for folder in folders], **provenance(),
    }  # fmt: skip
    both = groups[2]._replace(sampler=f"ensemble_{sampler}")
    write_scores(report.folder / f"{stem}-ensemble", both, ran)
    ensemble_table(report, whose, groups)
    per_class(report, f"{stem}-ensemble", whose, groups, class_tests(groups[0], groups[2]))
    title = f"Figure 5. Differences against {names[0]}, {sampler}. {whose}"
    report.figure(f"{stem}-figure5", title, pictures.bland_altman(groups[0], groups[1:]))
    [(case, three)] = predict_pair(*models, options, middle(groups[2].last(DICE)))
    shown = dict(zip(names, three, strict=True))
    report.attempt(f"{stem}, Figure 6", surface_errors, case, shown, groups[2], whose)


def ensemble_table(report: Report, whose: str, groups: Sequence[RunScores]) -> None:
    """Table 2, with tests, and the share of better cases, against the first group."""
    first, rows = groups[0], []
    for g, cells in zip(groups, compared(groups, 0), strict=True):
        rows.append({"method": g.name, **cells})
        if g is not first:
            rows[-1]["better cases (%)"] = f"{improved(g.last(DICE) - first.last(DICE)):.2f}"
    if first.stem in PAPER_ENSEMBLE:
        rows[-1]["paper, better cases (%)"] = f"{PAPER_ENSEMBLE[first.stem]:.2f}"
    report.table(f"{first.stem}-table2", f"Table 2. Without diffusion, with, and both. {whose}", rows)
    report.text(f"{NOTE} The reference is {first.name}; better cases have a higher Dice than with it.")


def surface_errors(
    report: Report, case: Sample, predictions: dict[str, Label], scores: RunScores, whose: str
) -> None:
    """Figure 6 (11 for the brain): the true surfaces, coloured by how far the predicted one of their class
    is. Raises InputError if the case has no surface."""
    foreground = len(scores.classes)
    masks = {c: case.label == c for c in range(1, foreground + 1) if (case.label == c).any()}
    if not masks:
        raise InputError(f"{case.uid}: the case of median Dice has no foreground in its truth")
    shapes = {c: pictures.faces(m) if m.ndim == 3 else (surface(m),) for c, m in masks.items()}
    errors, titles = [], []
    for name, found in predictions.items():
        far = [distances(shape[0], surface(found == c), case.spacing) for c, shape in shapes.items()]
        errors.append(np.concatenate(far))
        titles.append(f"{name}\n{caption(case, found, foreground)}")
    whole = [np.concatenate(parts) for parts in zip(*shapes.values(), strict=True)]
    figure = pictures.surface_errors(case.image[..., 0], whole, errors, titles, case.spacing, scores.unit)
    number = 11 if scores.stem == "brats_mr" else 6
    colour = "distance of the truth from the prediction; what is predicted beyond the truth does not show"
    title = f"Figure {number}. Surface error ({colour}), the case of median Dice, {case.uid}. {whose}"
    report.figure(f"{scores.stem}-figure{number}", title, figure)


# --- report.py ablate ---------------------------------------------------------------------------


def ablate(report: Report, folders: Sequence[Path], options: Options) -> None:
    """Tables 3 and 4 of the first run, Tables 5 and 10 of all of them."""
    folder, model = folders[0], load(folders[0] / options.checkpoint)
    if not model.network.noisy_mask:
        raise InputError(f"{folder}: no diffusion in it; give a run that has sampling steps first")
    whose, config = sampling_steps(report, model, options), model.facts.config
    if options.seeds > 1:
        inference_seeds(report, model, options, whose)
    scores = [one for folder in folders for one in read_run(folder, options)]
    for number, what, field, change in VARIED:
        if not variants(report, number, what, field, scores, options):
            again = f"python train.py --dataset {config.dataset} --strategy {config.strategy} {change}"
            report.missing(f"{config.dataset}, Table {number}", f"`{again} --run-dir {folder}-table{number}`")


def sampling_steps(report: Report, model: Model, options: Options) -> str:
    """Table 3. What the run's scores do not hold yet is predicted, and added to them. Returns the end of the
    table's title: of which run and data set it is."""
    folder, sampler, found = model.path.parent, options.sampler, []
    dataset = model.dataset(options.data_dir)
    for K in options.steps:
        scores = scores_name(options.split, options.checkpoint, sampler, K, options.seed)
        if not (folder / "scores" / f"{scores}.csv").exists():
            score_split(model, dataset, options.split, sampler=sampler, K=K, seed=options.seed)
        found += [s for s in read_run(folder, options._replace(sampling_steps=K)) if s.sampler == sampler]
    rows = [
        {"sampling steps": str(K), **cells} for K, cells in zip(options.steps, compared(found), strict=True)
    ]
    whose = f"{folder.name}, {sampler}. {about(found[0], options)}"
    report.table(f"{folder.name}-table3", f"Table 3. Number of sampling steps, {whose}", rows)
    report.text(f"{NOTE} The reference is the best of them.")
    return whose


def inference_seeds(report: Report, model: Model, options: Options, whose: str) -> None:
    """Table 4: over all pairs of sampling seeds, how far their predictions are from each other, and how far
    their scores are."""
    facts, run, measured = model.facts, model.path.parent.name, []
    classes = len(facts.class_names)
    seeds = [options._replace(seed=options.seed + n) for n in range(options.seeds)]
    count = len(model.dataset(options.data_dir).uids[options.split])
    together = zip(*(predict(model, seed) for seed in seeds), strict=True)
    for same_case in tqdm(together, f"{len(seeds)} seeds", count):
        case = same_case[0][0]
        found = [clean(facts.config.dataset, probability.argmax(-1)) for _, probability in same_case]
        scored = [score(steps, case, classes) for steps in found]
        means = [np.stack([per_case(one.dice), per_case(one.hausdorff)]) for one in scored]
        pairs = [
            np.stack([*agreement(found[i], found[j], case, classes), *np.abs(means[i] - means[j])])
            for i, j in combinations(range(len(seeds)), 2)
        ]
        measured.append(np.mean(pairs, axis=0))
    values = np.stack(measured) * np.array([100, 1, 100, 1])[:, None]  # [case, column, K]
    heads = ["Dice of each other (%)", f"HD95 of each other ({facts.unit})",
             "difference in Dice (points)", f"difference in HD95 ({facts.unit})"]  # fmt: skip
    rows = [
        {"step": str(k + 1), **{head: mean_sd(values[:, i, k]) for i, head in enumerate(heads)}}
        for k in range(values.shape[2])
    ]
    report.table(f"{run}-table4", f"Table 4. {len(seeds)} sampling seeds, {whose}", rows)
    report.text(
        "Means ± standard deviations over the cases, of the mean over all pairs of seeds: Dice and HD95 of "
        "one prediction against the other; the absolute difference of their scores against the truth."
    )


def agreement(a: Classes, b: Classes, case: Sample, classes: int) -> Float[np.ndarray, "2 K"]:
    """Dice and distance of one prediction against another per step, means over the foreground classes that
    either has."""
    pairs = [[(x == c, y == c) for c in range(1, classes)] for x, y in zip(a, b, strict=True)]
    dices = [[dice(*pair) for pair in step] for step in pairs]
    far = [[hausdorff_95(*pair, case.spacing) for pair in step] for step in pairs]
    return np.stack([per_case(np.array(values)) for values in (dices, far)])


def variants(
    report: Report, number: int, what: str, field: str, scores: Sequence[RunScores], options: Options
) -> bool:
    """Tables 5 and 10: groups that differ in one setting alone, side by side. Returns whether there are."""
    groups, pairs, rows = ordered(group(pooled(scores, MAY_DIFFER), MAY_DIFFER)), {}, []
    for g in groups:
        pairs.setdefault((settings(g, MAY_DIFFER | {field}), g.sampler), []).append(g)
    for members in pairs.values():
        if len(members) > 1:
            members = sorted(members, key=lambda member: -member.config[field])
            for g, cells in zip(members, compared(members, 0), strict=True):
                method, value = STRATEGIES[g.config["strategy"]].title, str(g.config[field])
                rows.append({"method": method, "sampler": g.sampler, field: value, **cells})
    if rows:
        title = f"Table {number}. {what}. {about(groups[0], options)}"
        report.table(f"{groups[0].stem}-table{number}", title, rows)
        report.text(f"{NOTE} The reference is the first of each pair.")
    return bool(rows)


# --- report.py information ----------------------------------------------------------------------


def information(report: Report, name: str, shape: Sequence[int], options: Options) -> None:
    """Figure 7: what x_t still tells of x_0, for the mask of the first test case (of a made-up data set, of
    size `shape`)."""
    dataset = open_dataset(name, Path(options.data_dir or Config.data_dir), shape)
    case = dataset.load("test" if dataset.uids["test"] else "train", 0)
    schedule, classes = linear_schedule(), len(dataset.class_names)
    draws = -(-(2**17) // case.label.size)  # a small image alone would show chance
    truth = np.repeat(case.label[None].astype(np.int32), draws, axis=0)
    x_0, keys = one_hot(jnp.asarray(truth), classes), jax.random.split(jax.random.key(options.seed), draws)
    times = np.unique(np.rint(np.linspace(1, schedule.T, 51)).astype(int))

    def information_at(t: int) -> tuple[float, float]:
        """Cross entropy and Dice of x_t; t = 0 stands for noise alone."""
        eps = gaussian(jax.vmap(jax.random.fold_in, (0, None))(keys, t), x_0)
        x_t = q_sample(schedule, x_0, jnp.full(draws, t), eps) if t else eps
        predicted = np.asarray(x_t).argmax(-1)
        scores = [dice(predicted == c, truth == c) for c in range(1, classes)]
        return float(cross_entropy(x_t, x_0).mean()), 100 * float(np.nanmean(scores))

    limit = information_at(0)
    told = np.array([information_at(t) for t in tqdm(times.tolist(), "noise levels")])
    title = f"Figure 7. Information contained in $x_t$. {name} ({dataset.source}), {case.uid}"
    beta, alpha_bar = np.asarray(schedule.beta)[1:], np.asarray(schedule.alpha_bar)[1:]
    figure = pictures.information(beta, alpha_bar, times, told, limit)
    report.figure(f"{dataset.name}-figure7", title, figure)
    report.text(
        f"Means of {draws} draws of the noise: cross entropy of softmax($x_t$), and Dice of the class with "
        "the highest $x_t$, mean over foreground."
    )


# --- report.py all ------------------------------------------------------------------------------


def test_command(folder: Path) -> str:
    """The command that makes a run's scores, with every sampler."""
    return shlex.join(["python", "evaluate.py", "test", str(folder)])


def everything(report: Report, runs_dir: Path, options: Options) -> None:
    """All tables and figures of every data set that has scored runs. The folds of one are pooled."""
    sets: dict[str, dict[Path, list[RunScores]]] = {}
    why = "train first: python train.py --help"
    for folder in sorted(runs_dir.iterdir() if runs_dir.is_dir() else []):
        if (folder / options.checkpoint).is_file():
            try:
                scores = read_run(folder, options)
            except InputError as error:
                why = str(error)
                report.missing(folder.name, why)
                continue
            name = scores[0].config["dataset"]
            fold = fold_of(name, scores[0].source)
            sets.setdefault(f"{fold.whole}, {fold.of} folds" if fold else name, {})[folder] = scores
    if not sets:
        raise InputError(f"{runs_dir}: no runs with scores that can be read; {why}")
    for title, runs in sets.items():
        report.text(f"## {title}")
        one_set(report, title, runs, options)


def one_set(report: Report, title: str, runs: dict[Path, list[RunScores]], options: Options) -> None:
    """All tables and figures of one data set, or of the folds of one. One variant of network and schedule is
    compared, that of most runs; Tables 5 and 10 have the others."""
    variant = {
        folder: (one.config["transformer"], one.config["train_timesteps"])
        for folder, (one, *_) in runs.items()
    }
    usual = max([(True, TIMESTEPS), *variant.values()], key=list(variant.values()).count)
    alike = [folder for folder in runs if variant[folder] == usual]
    # A single network is that of the first fold, and of the paper's strategy, if it is trained.
    shown = first_fold([runs[folder][0] for folder in alike])
    strategies = [Config.strategy, *reversed(STRATEGIES)]
    shown.sort(key=lambda one: strategies.index(one.config["strategy"]))
    diffusion = [one.folders[0] for one in shown if STRATEGIES[one.config["strategy"]].noisy_mask]
    without = [one.folders[0] for one in shown if one.folders[0] not in diffusion]
    config, name = shown[0].config, shown[0].config["dataset"]

    trained = {one.config["strategy"] for one, *_ in runs.values()}
    for strategy in (strategy for strategy in STRATEGIES if strategy not in trained):
        command = f"`python train.py --dataset {name} --strategy {strategy}`"
        report.missing(f"{title}, {STRATEGIES[strategy].title}", command)
    if name != title:
        report.text(f"Tables 2 to 4 and Figures 4 to 7 need a single network each, and are of {name} alone.")
    report.attempt(f"{title}, Table 1", compare, alike, options)
    if without and diffusion:
        report.attempt(f"{name}, Table 2", ensemble, (without[0], diffusion[0]), options)
    if diffusion:
        others = [folder for folder in runs if folder != diffusion[0]]
        report.attempt(f"{name}, Tables 3 and 4", ablate, [diffusion[0], *others], options)
    options = options._replace(data_dir=options.data_dir or config["data_dir"])
    report.attempt(f"{name}, Figure 7", information, name, tuples(config["phantom_shape"]), options)


# --- The program --------------------------------------------------------------------------------


def run_command(args: argparse.Namespace) -> None:
    """Does what was asked for, into a report."""
    report = Report(Path(args.output))
    options = Options(**{name: value for name, value in vars(args).items() if name in Options._fields})
    if args.command == "information":
        shape = PRESETS.get(args.dataset, {}).get("phantom_shape", ())
        information(report, args.dataset, shape, options)
    else:
        make = {"compare": compare, "ensemble": ensemble, "ablate": ablate, "all": everything}[args.command]
        make(report, args.runs, options)
    report.close()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Ends the program if something on it is wrong."""
    parser, usual = Parser(__doc__), Options()
    commands = parser.add_subparsers(required=True, dest="command")
    # What several commands have.
    scored, predicted, ablated, written = (Parser(add_help=False) for _ in range(4))
    add_scoring_options(scored)
    add_sampling_options(scored)
    text = f"The sampler of what is predicted. Default: {usual.sampler}."
    predicted.add_argument("--sampler", default=usual.sampler, choices=list(SAMPLERS), help=text)
    text = f"The numbers of sampling steps of Table 3. Default: {as_typed(usual.steps)}."
    ablated.add_argument("--steps", type=numbers, default=usual.steps, metavar="K,K", help=text)
    text = f"How many sampling seeds Table 4 has, from --seed on. Default: {usual.seeds}."
    ablated.add_argument("--seeds", type=int, default=usual.seeds, help=text)
    written.add_argument("-o", "--output", default="report", help="The folder to fill. Default: report.")

    def add(name: str, text: str, *parents: Parser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, parents=[*parents, written])

    runs = {"nargs": "+", "type": Path, "metavar": "RUN"}
    command = add("compare", "Compare training strategies.", scored)
    command.add_argument("runs", **runs, help="The folders of runs that have scores.")
    command = add("ensemble", "Compare without diffusion, with it, and both.", scored, predicted)
    text = "The folders of a run of no_diff, and of one with diffusion."
    command.add_argument("runs", nargs=2, type=Path, metavar="RUN", help=text)
    text = "Vary sampling steps, sampling seeds, Transformer and schedule."
    command = add("ablate", text, scored, predicted, ablated)
    command.add_argument("runs", **runs, help="The folders of runs; Tables 3 and 4 are of the first.")
    command = add("information", "Show what x_t still tells of x_0.")
    command.add_argument("--dataset", required=True, help="A data set of train.py.")
    text = f"Where the HDF5 file is. Default: {Config.data_dir}."
    command.add_argument("--data-dir", default="", help=text)
    command.add_argument("--seed", type=int, default=0, help="Seed of the noise. Default: 0.")
    command = add("all", "Make everything, for the runs that there are.", scored, predicted, ablated)
    command.add_argument("runs", type=Path, metavar="RUNS_DIR", help="The folder that holds the runs.")
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
