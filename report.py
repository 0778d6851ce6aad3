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
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import combinations, product
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer
from matplotlib import colormaps
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from scipy.spatial import KDTree
from scipy.stats import ttest_rel, wilcoxon
from tqdm import tqdm

from data import Dataset, InputError, Sample, one_line, open_dataset, replace_file, tuples
from diffusion import SAMPLERS, Schedule, gaussian, linear_schedule, q_sample
from evaluate import (
    COLOURS,
    Run,
    Score,
    clean,
    dice,
    fullest_slice,
    keep_compiled,
    keep_memory,
    open_run,
    per_case,
    predict_run,
    provenance,
    score,
    score_run,
    show_slice,
    slice_at,
    surface,
    write_scores,
)
from prepare import show_setting
from strategies import STRATEGIES, cross_entropy, one_hot
from train import MAY_CHANGE, PRESETS, Config, T, read_checkpoint

NAMES = {
    "no_diff": "No diff.", "diff": "Diff.", "sc_xt": "Diff. sc. $x_t$",
    "sc_xt1": "Diff. sc. $x_{t+1}$", "rec_xt1": "Diff. rec. $x_{t+1}$", "rec_xT": "Diff. rec. $x_T$",
}  # fmt: skip
MARKERS = "osD^vP*Xd<>"
SAME = MAY_CHANGE - {"steps"} | {"seed", "convolutions"}  # may differ between runs of one group
# What the paper prints outside of its tables: mean Dice with DDPM (§6.1), and in how many percent of the
# test samples the ensemble beats the plain U-Net (§6.2, Figure 5).
PAPER_DICE = {
    "muscle_us": {"diff": 86.60, "rec_xT": 88.23}, "amos_ct": {"diff": 85.25, "rec_xT": 87.45},
    "prostate_mr": {"diff": 83.61, "rec_xT": 85.54}, "brats_mr": {"diff": 90.29, "rec_xT": 92.29},
}  # fmt: skip
PAPER_ENSEMBLE = {"muscle_us": 70.83, "amos_ct": 91.11, "prostate_mr": 89.02, "brats_mr": 64.54}


class Which(NamedTuple):
    """The scores and the predictions that are asked for. K = 0: the sampling steps of training."""

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
        buffer = io.BytesIO()
        figure.suptitle(fill(title, int(16 * figure.get_figwidth())), fontsize=8)
        figure.savefig(buffer, dpi=110, format="png")
        replace_file(self.folder / f"{name}.png", buffer.getvalue())
        self.text(f"**{title}**")
        self.lines += [f"![{title}]({name}.png)", ""]

    def missing(self, what: str, mend: str) -> None:
        self.lacking.append(f"- {what}: {mend}")

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


def read_csv(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray, np.ndarray]:
    """Uids, foreground classes, and [case, K, class] Dice and distances, as evaluate.write_scores wrote
    them. Raises InputError."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        uids, classes = (tuple(dict.fromkeys(row[key] for row in rows)) for key in ("uid", "class"))
        shape = (len(uids), -1, len(classes))
        values = (np.array([float(row[key]) for row in rows]) for key in ("dice", "hausdorff_95"))
        dices, distances = (value.reshape(shape) for value in values)
    except (OSError, ValueError, KeyError) as error:
        mend = "delete it and run evaluate.py test again"
        raise InputError(f"{path}: damaged ({one_line(error)}); {mend}") from error
    return uids, classes, dices, distances


def read_scores(folder: Path, which: Which) -> list[Scores]:
    """A run's scores, one per sampler. Raises InputError where there are none, or where they are not of
    the checkpoint that is there."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run; train first: python train.py --help")
    checkpoint, found = folder / which.checkpoint, []
    step = read_checkpoint(checkpoint)[0]["step"] if checkpoint.exists() else None
    pattern = f"{which.split}-{which.checkpoint}-*-seed{which.seed}.json"
    for path in sorted((folder / "scores").glob(pattern)):
        try:
            facts = json.loads(path.read_text())
            config = asdict(Config()) | facts["config"]  # scores may be older than a setting
            sampler, K = facts["sampler"], facts["sampling_steps"]
            unit = facts.get("unit", "pixel" if len(config["patch_shape"]) == 2 else "mm")
            source, trained = facts["source"], facts["trained_steps"]
        except (ValueError, KeyError, TypeError) as error:
            mend = "delete it and run evaluate.py test again"
            raise InputError(f"{path}: damaged ({one_line(error)}); {mend}") from error
        if sampler == "none" or (which.K or config["sampling_steps"]) == K:
            if step not in (None, trained):
                now = f"scored at step {trained}, the checkpoint is of step {step}"
                raise InputError(f"{path}: {now}; score it again: {test_command(folder, which)}")
            uids, classes, dices, distances = read_csv(path.with_suffix(".csv"))
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
        ", ".join([NAMES[g.config["strategy"]], *(f"{name} {g.config.get(name)}" for name in varying)])
        for g in groups
    ]


def title(scores: Scores, which: Which) -> str:
    """Whose scores: the data set, where it comes from, and how many cases."""
    return f"{scores.config['dataset']} ({scores.source}), {len(scores.uids)} {which.split} cases"


# --- Statistics ---------------------------------------------------------------------------------


def of_cases(values: Float[np.ndarray, "runs cases K foreground"]) -> Float[np.ndarray, "cases K"]:
    """A case's mean over its foreground classes, then over the runs of the group; NaN where it has no
    foreground."""
    return per_case(values).mean(axis=0)


def mean_sd(values: Float[np.ndarray, "cases"], scale: int = 1) -> str:
    """ "mean ± standard deviation", without NaN."""
    values = scale * values[np.isfinite(values)]
    return f"{values.mean():.2f} ± {values.std():.2f}" if values.size else "-"


def improved(difference: Float[np.ndarray, "cases"]) -> float:
    """The percentage of cases whose difference is above 0."""
    return 100 * float((difference > 0).sum() / np.isfinite(difference).sum())


def paired(a: Float[np.ndarray, "cases"], b: Float[np.ndarray, "cases"]) -> tuple[float, float]:
    """p of the paired Student's t-test (§5.1.4) and of Wilcoxon's signed-rank test, two-sided, over the
    cases in which both are finite."""
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if (a == b).all():
        return 1.0, 1.0
    return float(ttest_rel(a, b).pvalue), float(wilcoxon(a, b).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction: with m tests, the k-th smallest p (from 0) times m - k, never under the one
    before it, at most 1."""
    order, corrected, highest = np.argsort(p), [0.0] * len(p), 0.0
    for k, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - k) * p[i]))
        corrected[i] = highest
    return corrected


def show_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def against(values: Sequence[Float[np.ndarray, "cases"]], reference: int) -> list[list[str]]:
    """For each row: p of both tests against the reference's row, the t-test's p after Holm's correction
    (where there are several), and the verdict at 0.05 by the last of the t-test's."""
    others = [i for i in range(len(values)) if i != reference]
    tests = {i: paired(values[i], values[reference]) for i in others}
    corrected = dict(zip(others, holm([tests[i][0] for i in others]), strict=True))
    rows = []
    for i in range(len(values)):
        if i == reference:
            rows.append(["", "", "", "**reference**" if len(values) > 1 else ""])
            continue
        higher = np.nanmean(values[i]) > np.nanmean(values[reference])
        verdict = ("higher" if higher else "lower") if corrected[i] < 0.05 else "no difference shown"
        rows.append([*map(show_p, tests[i]), show_p(corrected[i]) if len(others) > 1 else "", verdict])
    return rows


TESTS = ["t-test p", "Wilcoxon p", "Holm p", "at 0.05"]
NOTE = (
    "Dice and HD95 are means ± standard deviations over the cases, at the last sampling step. The tests are "
    "paired over cases, on Dice: they speak of these networks on other images, not of other trainings."
)


# --- report.py compare --------------------------------------------------------------------------


def compare(report: Report, folders: Sequence[Path], which: Which) -> None:
    """Table 1 (with tests against the best of each sampler), Tables 8 and 9, Figures 3, 10, 8, 9, 4."""
    groups = group([scores for folder in folders for scores in read_scores(folder, which)])
    named, about, stem = (
        list(zip(groups, labels(groups), strict=True)),
        title(groups[0], which),
        groups[0].stem,
    )
    heads = ["method", "sampler", "Dice (%)", f"HD95 ({groups[0].unit})", *TESTS]
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
            report.figure(f"{stem}-figure{curve_number}", heading, curves(family))
            heading = f"Figure {box_number}. Last step minus first, {sampler}. {about}"
            report.figure(f"{stem}-figure{box_number}", heading, boxes(diffusion))
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


def style(index: int) -> dict:
    """Colour and marker of the index-th line: told apart without colour, too."""
    colours = [c for c in COLOURS if c != "#F0E442"]  # yellow is faint on white
    return {"color": colours[index % len(colours)], "marker": MARKERS[index % len(MARKERS)]}


def curves(family: Sequence[tuple[Scores, str]]) -> Figure:
    """Figures 3 and 10: mean Dice and distance at every sampling step. Without diffusion: a line."""
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (scores, name) in enumerate(family):
        for axes, values, scale in ((left, scores.dice, 100), (right, scores.hausdorff, 1)):
            mean = scale * np.nanmean(of_cases(values), axis=0)
            if scores.sampler == "none":
                axes.axhline(mean[0], color="black", linestyle="--", linewidth=1, label=name)
            else:
                axes.plot(range(1, len(mean) + 1), mean, label=name, markersize=5, **style(index))
    steps = max(scores.dice.shape[2] for scores, _ in family)
    left.set(xlabel="sampling step", ylabel="Dice (%)", xticks=range(1, steps + 1))
    right.set(xlabel="sampling step", ylabel=f"HD95 ({family[0][0].unit})", xticks=range(1, steps + 1))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def boxes(family: Sequence[tuple[Scores, str]]) -> Figure:
    """Figures 8 and 9: the last step's score minus the first's, per case, and in how many percent of the
    cases it is better (a higher Dice, a smaller distance)."""
    figure = Figure(figsize=(9, 1.4 + 0.5 * len(family)), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    names = [name for _, name in family]
    for axes, what, sign, scale in zip(grid, ("dice", "hausdorff"), (1, -1), (100, 1), strict=True):
        values = [of_cases(getattr(scores, what)) for scores, _ in family]
        differences = [scale * (v[:, -1] - v[:, 0]) for v in values]
        drawn = axes.boxplot(
            [d[np.isfinite(d)] for d in differences], orientation="horizontal", tick_labels=names,
            patch_artist=True, medianprops={"color": "black"}, flierprops={"markersize": 3}, widths=0.6,
        )  # fmt: skip
        for i, (box, difference) in enumerate(zip(drawn["boxes"], differences, strict=True)):
            box.set_facecolor(style(i)["color"])
            share = f"{improved(sign * difference):.0f} % better"
            axes.annotate(share, (1.01, i + 1), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    grid[0].invert_yaxis()
    grid[0].set_xlabel("Dice, last step - first (percentage points)")
    grid[1].set_xlabel(f"HD95, last step - first ({family[0][0].unit})")
    return figure


def example(report: Report, named: Sequence[tuple[Scores, str]], which: Which) -> None:
    """Figure 4: a case over the sampling steps, a row per strategy: the case whose Dice is in the middle."""
    first = named[0][0]  # with ddpm, where there is any
    family = [(g, n) for g, n in named if g.sampler == first.sampler]
    plain = [(g, n) for g, n in named if g.sampler == "none"][:1]
    if first.sampler == "none":
        return
    uid = first.uids[middle(np.mean([of_cases(g.dice)[:, -1] for g, _ in family], axis=0))]
    shown = []
    for scores, name in family + plain:
        run = open_run(scores.folders[0], which.checkpoint, which.data_dir)
        number = run.dataset.uids[which.split].index(uid)
        case, probability = predict_case(run, number, which, first.sampler)
        shown.append((name, clean(run.config.dataset, probability.argmax(-1))))
    about = f"{first.sampler}, the case of median Dice, {uid}; DS in %, HD in {first.unit}"
    heading = f"Figure 4. Predictions over the steps, {about}. {title(first, which)}"
    figure = over_steps(case, shown[: len(family)], shown[len(family) :], len(first.classes))
    report.figure(f"{first.stem}-figure4", heading, figure)


def over_steps(case: Sample, shown: Sequence[tuple], without: Sequence[tuple], foreground: int) -> Figure:
    """Image, truth and the prediction without diffusion (if there is one), then a row per strategy."""
    height, width = slice_at(case.label, 0 if case.label.ndim == 3 else None).shape
    columns, lines = max(3, *(len(predictions) for _, predictions in shown)), len(shown) + 1
    wide, high = np.clip(2 * width / height, 1.2, 2), np.clip(2 * height / width, 1, 2) + 0.4
    figure = Figure(figsize=(wide * columns + 0.4, high * lines + 0.4), layout="constrained")
    grid = figure.subplots(lines, columns)
    for axes in grid.ravel():
        axes.axis("off")
    panel(grid[0, 0], case, np.zeros_like(case.label), "image")
    panel(grid[0, 1], case, case.label, "truth")
    for name, predictions in without:
        panel(grid[0, 2], case, predictions[-1], name, foreground)
    for row, (name, predictions) in zip(grid[1:], shown, strict=True):
        for k, (axes, predicted) in enumerate(zip(row, predictions, strict=False), 1):
            panel(axes, case, predicted, f"step {k}", foreground)
        row[0].set_ylabel(name, fontsize=9)
    return figure


def middle(values: Float[np.ndarray, "cases"]) -> int:
    """Which case has the median value (the lower one of two)."""
    order = np.argsort(values)  # NaN last
    return int(order[(np.isfinite(values).sum() - 1) // 2])


def predict_case(run: Run, number: int, which: Which, sampler: str) -> tuple[Sample, np.ndarray]:
    """One case of a split with the noise that it has in scoring, and so with the same scores."""
    K = (which.K or run.config.sampling_steps) if run.model.noisy_mask else 1
    cases = [run.dataset.load(which.split, number)]
    return next(predict_run(run, cases, sampler=sampler, K=K, seed=which.seed, first=number))


def panel(
    axes, case: Sample, classes: Integer[np.ndarray, "*spatial"], head: str, foreground: int = 0
) -> None:
    """The case's image with the outlines of classes, of a volume its fullest slice; scores underneath
    where the number of foreground classes is given."""
    axes.axis("on")
    z = fullest_slice(case.label) if case.label.ndim == 3 else None
    show_slice(axes, slice_at(case.image[..., 0], z), slice_at(classes, z))
    axes.set_title(head, fontsize=8)
    if foreground:
        axes.set_xlabel(caption(case, classes, foreground), fontsize=8)


def caption(case: Sample, classes: Integer[np.ndarray, "*spatial"], foreground: int) -> str:
    """Dice and distance, means over the foreground classes."""
    scores = score(classes[None], case, foreground + 1)
    return f"DS {100 * per_case(scores.dice)[0]:.1f}  HD {per_case(scores.hausdorff)[0]:.1f}"


# --- report.py ensemble -------------------------------------------------------------------------


def as_scores(scores: Sequence[Score], run: Run, sampler: str, uids: Sequence[str]) -> Scores:
    """Scores of the last step that were made here, as if they had been read."""
    dataset = run.dataset
    return Scores(
        asdict(run.config), sampler, dataset.unit, dataset.source, dataset.class_names[1:], tuple(uids),
        (run.folder,), np.stack([s.dice[-1:] for s in scores])[None],
        np.stack([s.hausdorff[-1:] for s in scores])[None],
    )  # fmt: skip


def predict_pair(plain: Run, diffusion: Run, which: Which, sampler: str) -> Iterator[tuple]:
    """Every case with three sets of classes: without diffusion, with, and of their probabilities' mean
    (§5.1.2)."""
    uids = plain.dataset.uids[which.split]
    K = which.K or diffusion.config.sampling_steps

    def cases() -> Iterator[Sample]:
        return (plain.dataset.load(which.split, i) for i in range(len(uids)))

    with_K = zip(
        predict_run(plain, cases(), sampler="none", K=1, seed=which.seed),
        predict_run(diffusion, cases(), sampler=sampler, K=K, seed=which.seed),
        strict=True,
    )
    for (case, without), (_, steps) in tqdm(with_K, "ensemble", len(uids)):
        three = [without[-1], steps[-1], (without[-1] + steps[-1]) / 2]
        yield case, [clean(plain.config.dataset, p.argmax(-1)[None])[0] for p in three]


def ensemble(report: Report, folders: Sequence[Path], which: Which, sampler: str = "ddpm") -> None:
    """Table 2, Tables 8 and 9 of the three, Figures 5, and 6 or 11."""
    runs = [open_run(folder, which.checkpoint, which.data_dir) for folder in folders]
    if runs[0].model.noisy_mask or not runs[1].model.noisy_mask:
        raise InputError(f"{folders[0]}, {folders[1]}: give a run of no_diff, then one with diffusion")
    if runs[0].config.dataset != runs[1].config.dataset:
        raise InputError(f"{folders[0]} and {folders[1]}: trained on different data sets; use runs of one")
    dataset, uids = runs[0].dataset, runs[0].dataset.uids[which.split]
    classes = len(dataset.class_names)
    scored = [
        [score(predicted[None], case, classes) for predicted in three]
        for case, three in predict_pair(*runs, which, sampler)
    ]
    names = ["No diff.", NAMES[runs[1].config.strategy], "Ensemble"]
    methods = list(zip(*scored, strict=True))
    groups = [
        as_scores(method, runs[min(i, 1)], "none" if i == 0 else sampler, uids)
        for i, method in enumerate(methods)
    ]
    about, stem = title(groups[0], which), groups[0].stem
    facts = {
        "split": which.split, "sampler": f"ensemble_{sampler}", "seed": which.seed, "unit": dataset.unit,
        "sampling_steps": which.K or runs[1].config.sampling_steps, "checkpoint": which.checkpoint,
        "runs": [str(folder) for folder in folders], "source": dataset.source, **provenance(),
    }  # fmt: skip
    write_scores(report.folder / f"{stem}-ensemble", list(methods[2]), dataset.class_names, facts)
    ensemble_table(report, stem, about, groups, names)
    per_class(report, f"{stem}-ensemble", about, list(zip(groups, names, strict=True)))
    heading = f"Figure 5. Differences against No diff., {sampler}. {about}"
    report.figure(f"{stem}-figure5", heading, bland_altman(groups, names))
    number = middle(of_cases(groups[2].dice)[:, 0])
    case = dataset.load(which.split, number)
    first = [predict_case(run, number, which, sampler)[1][-1] for run in runs]
    three = [clean(dataset.name, p.argmax(-1)[None])[0] for p in [*first, (first[0] + first[1]) / 2]]
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
    """Figure 5: differences against the first group over the mean of the two, with their mean (line), mean
    ± 1.96 standard deviations (dashed), and the share of better cases."""
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    grid = figure.subplots(2, 2)
    unit = groups[0].unit
    what = (("dice", 1, 100, "Dice", "%", "points"), ("hausdorff", -1, 1, "HD95", unit, unit))
    for row, (values, sign, scale, name, mean_unit, unit) in zip(grid, what, strict=True):
        for axes, i in zip(row, (1, 2), strict=True):
            a, b = (scale * of_cases(getattr(groups[j], values))[:, 0] for j in (i, 0))
            difference = a - b
            mean, reach = np.nanmean(difference), 1.96 * np.nanstd(difference, ddof=1)
            axes.plot((a + b) / 2, difference, "o", color=COLOURS[4], markersize=4, alpha=0.7)
            axes.axhline(mean, color=COLOURS[2], label=f"mean {mean:.2f}")
            label = f"± 1.96 SD: {mean - reach:.2f} to {mean + reach:.2f}"
            axes.axhline(mean - reach, color=COLOURS[5], linestyle="--", label=label)
            axes.axhline(mean + reach, color=COLOURS[5], linestyle="--")
            axes.set_title(f"{names[i]} - {names[0]}: {improved(sign * difference):.0f} % better", fontsize=9)
            axes.set(xlabel=f"{name}, mean of both ({mean_unit})", ylabel=f"{name}, difference ({unit})")
            axes.legend(fontsize=7)
    return figure


def faces(mask: Bool[np.ndarray, "x y z"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The squares between a mask's voxels and its outside: which voxel, the 4 corners (in voxels, a voxel
    reaching from its index to the next), and the normal."""
    padded, voxels, corners, normals = np.pad(mask, 1), [], [], []
    for axis, side in product(range(3), (0, 1)):
        outside = ~np.roll(padded, 1 - 2 * side, axis)[1:-1, 1:-1, 1:-1]
        found = np.argwhere(mask & outside)
        square = np.zeros((4, 3))
        square[:, axis] = side
        square[:, [i for i in range(3) if i != axis]] = [(0, 0), (0, 1), (1, 1), (1, 0)]
        voxels.append(found)
        corners.append(found[:, None] + square)
        normals.append(np.tile(np.eye(3)[axis] * (2 * side - 1), (len(found), 1)))
    return np.concatenate(voxels), np.concatenate(corners), np.concatenate(normals)


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
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    grid = figure.subplots(1, 3, subplot_kw={"projection": "3d"} if volume else {})
    shapes = [faces(case.label == c) if volume else (surface(case.label == c),) for c in present]
    errors = [
        [distances_to(shape[0], classes == c, case.spacing) for c, shape in zip(present, shapes, strict=True)]
        for classes in predictions
    ]
    # The few farthest places would leave one colour to all others.
    top = max(float(np.percentile(np.concatenate(error), 99)) for error in errors)
    limits = {"vmin": 0, "vmax": max(top, min(case.spacing))}
    for axes, classes, name, error in zip(grid, predictions, names, errors, strict=True):
        if volume:
            draw_surfaces(axes, shapes, error, case.spacing, limits["vmax"])
        else:
            show_slice(axes, case.image[..., 0], np.zeros_like(case.label))
            for (places,), distance in zip(shapes, error, strict=True):
                axes.scatter(places[:, 1], places[:, 0], c=distance, s=14, cmap="viridis", **limits)
        axes.set_title(f"{name}\n{caption(case, classes, len(foreground))}", fontsize=9)
    colours = figure.axes[0].scatter([], [], c=[], cmap="viridis", **limits)
    figure.colorbar(colours, ax=list(grid), label=f"distance to the prediction ({dataset.unit})", shrink=0.7)
    return figure


def draw_surfaces(axes, shapes, errors, spacing: Sequence[float], top: float) -> None:
    """Squares in 3D, their viridis colour darkened where they turn away from the light."""
    corners = np.concatenate([shape[1] for shape in shapes]) * np.array(spacing)
    normals = np.concatenate([shape[2] for shape in shapes])
    colour = colormaps["viridis"](np.clip(np.concatenate(errors) / top, 0, 1))
    light = np.array([-0.5, -0.6, 0.62])
    colour[:, :3] *= (0.85 + 0.15 * normals @ light)[:, None]
    axes.add_collection3d(Poly3DCollection(corners, facecolors=colour, edgecolors="none"))
    low, high = corners.min(axis=(0, 1)), corners.max(axis=(0, 1))
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
    # Looked at from the side, slightly from above and from one end.
    axes.view_init(elev=30, azim=-70 if high[0] - low[0] > high[1] - low[1] else -30)
    axes.set_box_aspect(high - low, zoom=1.1)
    axes.set_axis_off()


# --- report.py ablate ---------------------------------------------------------------------------


def ablate(
    report: Report, folders: Sequence[Path], which: Which, steps: Sequence[int], seeds: int, sampler: str
) -> None:
    """Tables 3 and 4 of the first run, Tables 5 and 10 of all of them."""
    run = open_run(folders[0], which.checkpoint, which.data_dir)
    if not run.model.noisy_mask:
        raise InputError(f"{run.folder}: no diffusion in it; give a run that has sampling steps first")
    sampling_steps(report, run, which, steps, sampler)
    if seeds > 1:
        inference_seeds(report, run, which, seeds, sampler)
    scores = [one for folder in folders for one in read_scores(folder, which)]
    for number, field, value in ((5, "transformer", False), (10, "train_timesteps", 5)):
        if not variants(report, number, field, scores, which):
            folder = f"{run.folder}-{field}"
            command = train_command(asdict(run.config), run_dir=folder, **{field: value})
            test = test_command(Path(folder), which)
            report.missing(f"{run.config.dataset}, Table {number}", f"`{command} && {test}`")


def sampling_steps(report: Report, run: Run, which: Which, steps: Sequence[int], sampler: str) -> None:
    """Table 3. What the run's scores do not hold yet is predicted, and added to them."""
    found = []
    for K in steps:
        name = f"{which.split}-{which.checkpoint}-{sampler}-{K}-seed{which.seed}.csv"
        if not (run.folder / "scores" / name).exists():
            score_run(run, which.split, sampler=sampler, K=K, seed=which.seed)
        found += [s for s in read_scores(run.folder, which._replace(K=K)) if s.sampler == sampler]
    values = [of_cases(s.dice)[:, -1] for s in found]
    tests = against(values, int(np.argmax([np.nanmean(v) for v in values])))
    rows = [
        [str(K), mean_sd(value, 100), mean_sd(of_cases(s.hausdorff)[:, -1]), *test]
        for K, s, value, test in zip(steps, found, values, tests, strict=True)
    ]
    heading = f"Table 3. Number of sampling steps, {run.folder.name}, {sampler}. {title(found[0], which)}"
    heads = ["sampling steps", "Dice (%)", f"HD95 ({found[0].unit})", *TESTS]
    report.table(f"{run.folder.name}-table3", heading, heads, rows)
    report.text(f"{NOTE} The reference is the best of them.")


def inference_seeds(report: Report, run: Run, which: Which, seeds: int, sampler: str) -> None:
    """Table 4: over all pairs of sampling seeds, how far their predictions are from each other, and how far
    their scores are."""
    uids, K = run.dataset.uids[which.split], which.K or run.config.sampling_steps
    classes = len(run.dataset.class_names)

    def predictions(seed: int) -> Iterator[tuple[Sample, np.ndarray]]:
        cases = (run.dataset.load(which.split, i) for i in range(len(uids)))
        return predict_run(run, cases, sampler=sampler, K=K, seed=seed)

    apart = []
    together = zip(*(predictions(which.seed + n) for n in range(seeds)), strict=True)
    for same_case in tqdm(together, f"{seeds} seeds", len(uids)):
        case = same_case[0][0]
        found = [clean(run.config.dataset, probability.argmax(-1)) for _, probability in same_case]
        scores = [score(classified, case, classes) for classified in found]
        pairs = [
            between(found[a], found[b], case, classes)
            + tuple(
                np.abs(per_case(getattr(scores[a], of)) - per_case(getattr(scores[b], of)))
                for of in ("dice", "hausdorff")
            )
            for a, b in combinations(range(seeds), 2)
        ]
        apart.append(np.mean(pairs, axis=0))  # [measure, K]
    rows = [
        [str(k + 1), *(mean_sd(np.array([a[i, k] for a in apart]), (100, 1)[i % 2]) for i in range(4))]
        for k in range(K)
    ]
    unit, source = run.dataset.unit, run.dataset.source
    heads = ["step", "Dice of each other (%)", f"HD95 of each other ({unit})",
             "difference in Dice (points)", f"difference in HD95 ({unit})"]  # fmt: skip
    about = f"{run.config.dataset} ({source}), {len(uids)} {which.split} cases"
    heading = f"Table 4. {seeds} sampling seeds, {run.folder.name}, {sampler}. {about}"
    report.table(f"{run.folder.name}-table4", heading, heads, rows)
    report.text(
        "Means ± standard deviations over the cases, of the mean over all pairs of seeds: Dice and HD95 of "
        "one prediction against the other; the absolute difference of their scores against the truth."
    )


def between(a: np.ndarray, b: np.ndarray, case: Sample, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Dice and distance of one prediction against another per step, means over the foreground classes that
    either has."""
    steps = [score(a[k : k + 1], case._replace(label=b[k]), classes) for k in range(len(a))]
    return (
        np.array([per_case(s.dice)[0] for s in steps]),
        np.array([per_case(s.hausdorff)[0] for s in steps]),
    )


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
                row = [NAMES[g.config["strategy"]], g.sampler, str(g.config[field]), mean_sd(value, 100)]
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
    schedule, classes = linear_schedule(T), len(dataset.class_names)
    x_0 = one_hot(jnp.asarray(case.label[None].astype(np.int32)), classes)
    draws = -(-(2**17) // case.label.size)  # a small image alone would show chance
    x_0 = jnp.repeat(x_0, draws, axis=0)
    keys = jax.random.split(jax.random.key(seed), draws)
    times = np.unique(np.rint(np.linspace(1, T, 51)).astype(int))

    def tells(x: jax.Array) -> tuple[float, float]:
        predicted = np.asarray(x).argmax(-1)
        truth = np.broadcast_to(case.label, predicted.shape)
        scores = [dice(predicted == c, truth == c) for c in range(1, classes)]
        return float(cross_entropy(x, x_0).mean()), 100 * float(np.nanmean(scores))

    def noise(number: int) -> jax.Array:
        return gaussian(jax.vmap(jax.random.fold_in, (0, None))(keys, number), x_0)

    limit = tells(noise(0))
    told = np.array(
        [
            tells(q_sample(schedule, x_0, jnp.full(draws, t), noise(t)))
            for t in tqdm(times.tolist(), "noise levels")
        ]
    )
    heading = f"Figure 7. Information contained in $x_t$. {name} ({dataset.source}), {case.uid}"
    report.figure(f"{dataset.name}-figure7", heading, information_figure(schedule, times, told, limit))
    rows = [[str(t), f"{ce:.4f}", f"{d:.2f}"] for t, (ce, d) in zip(times, told, strict=True) if t % 100 == 1]
    rows.append(["noise alone", f"{limit[0]:.4f}", f"{limit[1]:.2f}"])
    heads = ["t", "cross entropy (nats)", "Dice (%)"]
    report.table(f"{dataset.name}-figure7", f"Figure 7 in numbers. {draws} draws of the noise", heads, rows)
    report.text(
        "Cross entropy of softmax($x_t$), and Dice of the class with the highest $x_t$, mean over foreground."
    )


def information_figure(
    schedule: Schedule, times: np.ndarray, told: np.ndarray, limit: Sequence[float]
) -> Figure:
    """beta_t and sqrt(alpha_bar_t) at every t; [time, 2] cross entropy and Dice at `times`, with the limit of
    noise alone (dashed)."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    grid = figure.subplots(2, 2).ravel()
    grid[0].plot(range(1, T + 1), np.asarray(schedule.beta)[1:], color=COLOURS[4])
    grid[1].plot(range(1, T + 1), np.sqrt(np.asarray(schedule.alpha_bar)[1:]), color=COLOURS[4])
    for axes, values, end in zip(grid[2:], told.T, limit, strict=True):
        axes.plot(times, values, color=COLOURS[4], label="$x_t$ and $x_0$")
        axes.axhline(end, color=COLOURS[5], linestyle="--", label="noise alone and $x_0$")
        axes.legend(fontsize=8)
    what = (r"$\beta_t$", r"$\sqrt{\bar\alpha_t}$", "cross entropy (nats per voxel)", "Dice (%)")
    for axes, label in zip(grid, what, strict=True):
        axes.set(xlabel="timestep t", ylabel=label, xticks=range(1, T + 1, 200))
    return figure


# --- report.py all ------------------------------------------------------------------------------


def train_command(config: dict, **changes: object) -> str:
    """The command that trains with these settings; what the data set's preset says is left out."""
    wanted = config | changes
    usual = asdict(Config()) | PRESETS[wanted["dataset"].partition(":")[0]]
    usual["run_dir"] = f"runs/{wanted['dataset'].replace(':', '-')}-{wanted['strategy']}"
    words = [f"python train.py --dataset {wanted['dataset']} --strategy {wanted['strategy']}"]
    for name, value in wanted.items():
        option, value = name.replace("_", "-"), tuples(value)
        # dtype and convolutions are chosen for the machine; an older version had settings that are gone.
        chosen = name in ("dataset", "strategy", "dtype", "convolutions") or name not in usual
        if chosen or value == usual[name]:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words.append(f"--{option} {show_setting(value) if isinstance(value, tuple) else value}")
    return " ".join(words)


def everything(
    report: Report, runs_dir: Path, which: Which, steps: Sequence[int], seeds: int, sampler: str
) -> None:
    """All tables and figures of every data set that has runs."""
    by_dataset: dict[str, dict[Path, dict]] = {}
    for folder in sorted(runs_dir.iterdir() if runs_dir.is_dir() else []):
        if (folder / which.checkpoint).is_file():
            config = asdict(read_checkpoint(folder / which.checkpoint)[0]["config"])
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
    usual = max([(True, T), *variant.values()], key=list(variant.values()).count)
    plain = {folder: config for folder, config in scored.items() if variant[folder] == usual}
    # The paper's strategy first, where it is there.
    best = sorted(plain, key=lambda f: -list(STRATEGIES).index(plain[f]["strategy"]))
    first = (best or list(runs))[0]
    for strategy in STRATEGIES:
        if strategy not in {config["strategy"] for config in runs.values()}:
            folder = first.parent / f"{name.replace(':', '-')}-{strategy}"
            command = train_command(runs[first], strategy=strategy, run_dir=str(folder))
            report.missing(f"{name}, {NAMES[strategy]}", f"`{command} && {test_command(folder, which)}`")
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
    data_dir, shape = Path(which.data_dir or runs[first]["data_dir"]), runs[first]["phantom_shape"]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    compared = commands.add_parser("compare", help="training strategies")
    compared.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    averaged = commands.add_parser("ensemble", help="with, without diffusion, and both")
    averaged.add_argument("run_no_diff", type=Path)
    averaged.add_argument("run_diff", type=Path)
    ablated = commands.add_parser("ablate", help="sampling steps, seeds, Transformer, schedule")
    ablated.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Tables 3, 4 are of the first")
    told = commands.add_parser("information", help="what x_t tells of x_0")
    told.add_argument("--dataset", required=True)
    told.add_argument("--uid", default="", help="of the case; the first test case unless given")
    whole = commands.add_parser("all", help="everything")
    whole.add_argument("runs_dir", type=Path)
    for command in (ablated, whole):
        command.add_argument("--steps", type=_numbers, default=(2, 5, 10, 20), metavar="K,K", help="Table 3")
        command.add_argument("--seeds", type=int, default=3, help="Table 4: how many, from --seed on")
    for command in (averaged, ablated, whole):
        command.add_argument("--sampler", default="ddpm", choices=list(SAMPLERS), help="of what is predicted")
    for command in (compared, averaged, ablated, whole):
        command.add_argument("--split", default="test", choices=["validation", "test"])
        command.add_argument("--checkpoint", default="best", choices=["best", "last"])
        command.add_argument("--sampling-steps", type=int, default=0, help="K; 0: as trained")
    for command in (compared, averaged, ablated, told, whole):
        command.add_argument("--seed", type=int, default=0, help="of the sampling noise")
        command.add_argument("--data-dir", default="", help="where the HDF5 file is, if it moved")
        command.add_argument("-o", "--output", default="report", help="folder to fill (default: report)")
    args = parser.parse_args(argv)
    if args.seed < 0 or getattr(args, "seeds", 1) < 1:
        parser.error("--seed must be 0 or more, --seeds 1 or more")
    return args


def _numbers(text: str) -> tuple[int, ...]:
    """ "2,5" -> (2, 5)."""
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 2,5,10")
    return tuple(int(part) for part in text.split(","))


def main(argv: Sequence[str] | None = None) -> None:
    keep_compiled()
    keep_memory()
    try:
        run_command(parse(argv))
    except (InputError, OSError) as error:  # OSError: a full disk, a folder that cannot be written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
