"""How are scores kept, written, read, grouped and compared?

evaluate.py writes a CSV file per scoring, with a line per case, sampling step and class, and beside it a JSON
file of what was run; report.py reads both. Scores are arrays [..., sampling step, foreground class].

A case's mean is over the classes that its truth has, for every method: the others' scores are NaN. A class
that is only in the prediction therefore changes no mean, and is counted instead, as a missed one is.
"""

import csv
import io
import json
import re
from collections.abc import Sequence, Set
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Float, Shaped

from support.disk.files import InputError, one_line, replace_file

Cases = Float[np.ndarray, "cases"]
PerClass = Float[np.ndarray, "runs cases K foreground"]
OUTCOMES = ("found", "missed", "invented", "absent")  # in truth and prediction, in one of them, in neither


class CaseScores(NamedTuple):
    """The scores of one case, [sampling step, foreground class], with one of OUTCOMES for each."""

    uid: str
    dice: Float[np.ndarray, "K foreground"]
    hausdorff: Float[np.ndarray, "K foreground"]
    outcome: Shaped[np.ndarray, "K foreground"]


class Measure(NamedTuple):
    """How one of the two scores is shown: under which name and times which number, and whether more of it is
    better (1) or less (-1)."""

    field: str
    name: str
    scale: int
    better: int


DICE, HD95 = Measure("dice", "Dice", 100, 1), Measure("hausdorff", "HD95", 1, -1)
ARRAYS = ("dice", "hausdorff", "outcome")  # of RunScores, [run, case, sampling step, foreground class]


class RunScores(NamedTuple):
    """The scores of one way of training and sampling. The first axis is over runs that differ in their
    training seed alone. Dice is in [0, 1], and distances are in `unit`."""

    name: str  # in tables and figures
    config: dict
    sampler: str
    unit: str
    source: str
    trained_steps: int
    classes: tuple[str, ...]  # of the foreground
    uids: tuple[str, ...]
    folders: tuple[Path, ...]  # of the runs
    dice: PerClass
    hausdorff: PerClass
    outcome: Shaped[np.ndarray, "runs cases K foreground"]
    folds: int = 0  # of cross-validation; 0 if none are put together

    @property
    def stem(self) -> str:
        """How the names of the data set's files begin."""
        name = self.config["dataset"].removeprefix("folder:")
        return f"{name}-{self.folds}-folds" if self.folds else name

    def cases(self, measure: Measure) -> Float[np.ndarray, "cases K"]:
        """Each case's mean over its foreground classes, then over the runs that have one, as it is shown:
        Dice in percent, distances in `unit`. NaN if no run has one, as in a case without foreground."""
        return measure.scale * finite_mean(per_case(getattr(self, measure.field)), 0)

    def last(self, measure: Measure) -> Cases:
        """The same at the last sampling step."""
        return self.cases(measure)[:, -1]

    def per_class(self, measure: Measure) -> Float[np.ndarray, "cases foreground"]:
        """Each case's score of every class at the last sampling step, mean over the runs, as it is shown."""
        return measure.scale * finite_mean(getattr(self, measure.field)[:, :, -1], 0)

    def found(self) -> "RunScores":
        """The same with the distances of found classes alone: a single missed one, as far away as the image's
        diagonal, can move their mean by more than methods differ."""
        return self._replace(hausdorff=np.where(self.outcome == "found", self.hausdorff, np.nan))


def per_case(values: Float[np.ndarray, "*K foreground"]) -> Float[np.ndarray, "*K"]:
    """Mean over the foreground classes that a case's truth has, per sampling step; NaN if it has none."""
    return finite_mean(values, -1)


def finite_mean(values: Float[np.ndarray, "..."], axis: int) -> Float[np.ndarray, "..."]:
    """The mean along an axis of the values that are not NaN; NaN where there are none."""
    return np.ma.masked_invalid(values).mean(axis=axis).filled(np.nan)


def deviation(values: Float[np.ndarray, "n *rest"]) -> Float[np.ndarray, "*rest"]:
    """The standard deviation in all tables and figures: that of a sample (divided by n - 1), since cases and
    seeds stand for others that were not drawn. NaN is left out; a single value has none (NaN)."""
    return np.ma.filled(np.ma.masked_invalid(values).std(axis=0, ddof=1), np.nan)


def over_cases(values: PerClass) -> Float[np.ndarray, "K"]:
    """The mean over the cases, per sampling step, of each case's mean over its classes and over the runs. It
    is NaN if no case has foreground."""
    return np.ma.masked_invalid(per_case(values).mean(axis=0)).mean(axis=0).filled(np.nan)


def lost(outcome: Shaped[np.ndarray, "..."]) -> str:
    """How many classes are missed and invented, in words; nothing if there are none."""
    numbers = ((which, int((outcome == which).sum())) for which in ("missed", "invented"))
    return ", ".join(f"{number} {which}" for which, number in numbers if number)


def counts(outcome: Shaped[np.ndarray, "..."]) -> tuple[str, str]:
    """In words, how many classes are missed, of those in the truth, and invented, of all others."""
    found, missed, invented, absent = (int((outcome == which).sum()) for which in OUTCOMES)
    return f"{missed} of {found + missed}", f"{invented} of {invented + absent}"


# --- Shown and written --------------------------------------------------------------------------


def filled_columns(rows: Sequence[dict[str, str]]) -> list[list[str]]:
    """The heads of a table and its cells, without the columns whose cells are all empty. A row may lack
    columns that others have."""
    heads = [head for head in dict.fromkeys(chain(*rows)) if any(row.get(head) for row in rows)]
    return [heads, *([row.get(head, "") for head in heads] for row in rows)]


def as_text(cells: Sequence[Sequence[str]]) -> str:
    """A table for the terminal, whose first column is aligned on its left and whose others on their right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells
    )


def as_markdown(cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    head, *rows = cells
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def table(rows: Sequence[tuple[str, RunScores]]) -> str:
    """For the terminal: mean Dice (percent) at each sampling step, then the columns of `last_step`. A "-" is
    a mean that does not exist."""
    lines, scores = [], [one for _, one in rows]
    for (name, one), last in zip(rows, last_step(scores), strict=True):
        means = enumerate(over_cases(one.dice), 1)
        steps = {f"step {k}": "-" if np.isnan(mean) else f"{100 * mean:.2f}" for k, mean in means}
        lines.append({"": name, **steps, **last})
    return as_text(filled_columns(lines))


def scores_name(split: str, checkpoint: str, sampler: str, K: int, seed: int) -> str:
    """How the files of a scoring are named."""
    return f"{split}-{checkpoint}-{sampler}-{K}-seed{seed}"


def write_scores(folder: Path, scores: RunScores, ran: dict) -> None:
    """A CSV file of the scores of one run, and a JSON file of what was run: `ran`, and what the scores tell
    about it."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["uid", "step", "class", "dice", "hausdorff_95", "outcome"])
    [dice], [hausdorff], [outcome] = (getattr(scores, name) for name in ARRAYS)
    for i, k, j in np.ndindex(dice.shape):
        values = f"{dice[i, k, j]:.6f}", f"{hausdorff[i, k, j]:.4f}", outcome[i, k, j]
        writer.writerow([scores.uids[i], k + 1, scores.classes[j], *values])
    known = {name: getattr(scores, name) for name in ("sampler", "unit", "source", "trained_steps", "config")}
    facts = {**ran, **known, "cases": len(scores.uids)}
    what = ("split", "checkpoint", "sampler", "sampling_steps", "seed")
    path = folder / scores_name(*(facts[key] for key in what))
    replace_file(path.with_name(f"{path.name}.csv"), text.getvalue().encode())
    replace_file(path.with_name(f"{path.name}.json"), json.dumps(facts, indent=2).encode())


def read_scores(path: Path) -> RunScores:
    """What `write_scores` wrote, by the name of the JSON file, under the name of its run. Raises InputError
    if one of the two files is missing or damaged."""
    try:
        facts = dict(json.loads(path.read_bytes()))
        with open(path.with_suffix(".csv"), newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        uids, classes = (tuple(dict.fromkeys(row[key] for row in rows)) for key in ("uid", "class"))
        values = [[float(row["dice"]), float(row["hausdorff_95"])] for row in rows]
        # All rows must be there.
        shape = 1, facts["cases"], facts["sampling_steps"], len(classes)
        dices, distances = (column.reshape(shape) for column in np.transpose(values))
        outcome = np.array([row["outcome"] for row in rows]).reshape(shape)
        ran = (facts[key] for key in ("sampler", "unit", "source", "trained_steps"))
        run = path.parent.parent
        arrays = dices, distances, outcome
        return RunScores(run.name, dict(facts["config"]), *ran, classes, uids, (run,), *arrays)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        fix = "delete both and run evaluate.py test again"
        why = f"damaged, or older than this code ({one_line(error)})"
        raise InputError(f"{path} or its CSV file: {why}; {fix}") from error


# --- Groups and folds ---------------------------------------------------------------------------


def settings(scores: RunScores, apart: Set[str]) -> str:
    """The settings of a run, without those in `apart`: runs for which they are equal form a group."""
    return json.dumps({name: value for name, value in scores.config.items() if name not in apart})


class Fold(NamedTuple):
    """Which part of a set is the test split of a data set that `prepare.py build --folds N --fold k` made."""

    whole: str  # the set, folder:NAME
    source: str  # where it comes from
    number: int  # k
    of: int  # N


def fold_of(dataset: str, source: str) -> Fold | None:
    """What the name folder:NAME-foldk and the source "..., fold k of N" say together; None for a data set
    that is no fold, even if its name looks like that of one."""
    told = re.fullmatch("(.*), fold ([0-9]{1,4}) of ([0-9]{1,4})", source)
    if not told or not dataset.endswith(f"-fold{told[2]}"):
        return None
    return Fold(dataset.removesuffix(f"-fold{told[2]}"), told[1], int(told[2]), int(told[3]))


def pooled(scores: Sequence[RunScores], same: Set[str]) -> list[RunScores]:
    """The folds of a cross-validation put together: runs that differ in nothing but their fold, and in the
    settings in `same` other than the training seed, become one, which has the cases of all of them, each
    tested by the network that did not see it. The cases are in the order of the folds, whatever the order of
    the runs; the folder is that of the first fold. What is no fold is returned as it is.

    Raises InputError if folds are not of one set, or if a case is in two of them."""
    whole, runs = [], {}  # the latter from what is the same in all folds to the scores of each
    for one in scores:
        if fold := fold_of(one.config["dataset"], one.source):
            key = settings(one, same - {"seed"} | {"dataset"}), one.sampler
            runs.setdefault(key, []).append((fold, one))
        else:
            whole.append(one)
    return whole + [put_together(runs[key]) for key in sorted(runs)]


def put_together(folds: Sequence[tuple[Fold, RunScores]]) -> RunScores:
    """One of `pooled`, from the scores of its folds."""
    folds = sorted(folds, key=lambda pair: pair[0])
    (head, first), *_ = folds
    tested = {}
    for fold, one in folds:
        these = f"{first.folders[0]} and {one.folders[0]}"
        if fold._replace(number=head.number) != head or one.classes != first.classes:
            fix = "build all of them with one --raw, --folds and --classes"
            raise InputError(f"{these}: folds of different sets; {fix}")
        for uid in one.uids:
            if (twin := tested.setdefault(uid, one)) is not one:
                these = f"{twin.folders[0]} and {one.folders[0]}"
                fix = "leave one of them out, or build all folds from the same images"
                raise InputError(f"{these}: case {uid} is in both; {fix}")
    cases = {name: np.concatenate([getattr(one, name) for _, one in folds], 1) for name in ARRAYS}
    numbers = [str(fold.number) for fold, _ in folds]
    source = f"{head.source}, fold{'s' * (len(numbers) > 1)} {', '.join(numbers)} of {head.of}"
    config = first.config | {"dataset": head.whole}
    return first._replace(config=config, source=source, folds=head.of, uids=tuple(tested), **cases)


def first_fold(scores: Sequence[RunScores]) -> list[RunScores]:
    """The scores of the first fold that there is; all of them if none are folds."""
    folds = [fold_of(one.config["dataset"], one.source) for one in scores]
    numbers = [fold.number if fold else 0 for fold in folds]
    return [one for one, number in zip(scores, numbers, strict=True) if number == min(numbers)]


def group(scores: Sequence[RunScores], same: Set[str]) -> list[RunScores]:
    """Runs that differ in nothing but the settings in `same`, such as the training seed, put together. If
    groups differ in other settings than the strategy, these become part of their names. Raises InputError
    if runs are not of one data set, not scored on the same cases, or of the same training seed."""
    first, groups = scores[0], {}
    for one in scores:
        these = f"{first.folders[0]} and {one.folders[0]}"
        data_sets = [(s.config["dataset"], s.folds, s.classes) for s in (first, one)]
        if data_sets[0] != data_sets[1]:
            raise InputError(f"{these}: trained on different data sets or classes; compare runs of one")
        if set(one.uids) != set(first.uids):
            odd = sorted(set(one.uids) ^ set(first.uids))[0]
            fix = "test both again, and give the same folds of each"
            raise InputError(f"{these}: scored on different cases (such as {odd}); {fix}")
        order = [one.uids.index(uid) for uid in first.uids]
        arrays = {name: getattr(one, name)[:, order] for name in ARRAYS}
        one = one._replace(uids=first.uids, **arrays)
        groups.setdefault((settings(one, same), one.sampler), []).append(one)
    configs = [members[0].config for members in groups.values()]
    varying = [
        name for name in configs[0]
        if name not in {*same, "strategy"} and len({str(config.get(name)) for config in configs}) > 1
    ]  # fmt: skip
    together = []
    for members in groups.values():
        head, folders = members[0], tuple(member.folders[0] for member in members)
        if len({member.config["seed"] for member in members}) < len(members):
            these = " and ".join(map(str, folders))
            raise InputError(f"{these}: the same settings and training seed; leave one of them out")
        name = ", ".join([head.name, *(f"{name} {head.config.get(name)}" for name in varying)])
        arrays = {field: np.concatenate([getattr(m, field) for m in members]) for field in ARRAYS}
        together.append(head._replace(name=name, folders=folders, **arrays))
    return together


# --- Statistics ---------------------------------------------------------------------------------


def mean_sd(values: Cases) -> str:
    """ "mean ± standard deviation" over the cases that are not NaN; the mean alone if there is one."""
    values = values[np.isfinite(values)]
    spread = f" ± {deviation(values):.2f}" if values.size > 1 else ""
    return f"{values.mean():.2f}{spread}" if values.size else "-"


def improved(difference: Cases) -> float:
    """The percentage of cases whose difference is above 0."""
    return 100 * float((difference > 0).sum() / np.isfinite(difference).sum())


def middle(values: Cases) -> int:
    """Which case has the median value (the lower one of two)."""
    order = np.argsort(values)  # NaN last
    return int(order[(np.isfinite(values).sum() - 1) // 2])


def paired(a: Cases, b: Cases) -> tuple[float, float]:
    """p of the paired Student's t-test (§5.1.4) and of Wilcoxon's signed-rank test, two-sided, over the
    cases in which both are finite; NaN if these are fewer than two."""
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if len(a) < 2:
        return float("nan"), float("nan")
    if (a == b).all():
        return 1.0, 1.0
    return float(scipy.stats.ttest_rel(a, b).pvalue), float(scipy.stats.wilcoxon(a, b).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction: with m tests, the k-th smallest p (from 0) times m - k, never under the one
    before it, at most 1."""
    order = np.argsort(p)
    steps = (len(p) - np.arange(len(p))) * np.asarray(p, float)[order]
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected.tolist()


def show_p(p: float) -> str:
    """A p value as it stands in a table; "-" if there were too few cases for a test."""
    if np.isnan(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def against(values: Sequence[Cases], reference: int) -> list[dict[str, str]]:
    """Four columns of a table for each of `values`: p of both tests against the reference, the t-test's p
    after Holm's correction (if there are several), and the verdict at 0.05 by the corrected p."""
    columns = ("t-test p", "Wilcoxon p", "Holm p", "at 0.05")
    others = [i for i in range(len(values)) if i != reference]
    tests = [paired(values[i], values[reference]) for i in others]
    rows = [("", "", "", "**reference**" if others else "")] * len(values)
    for i, test, corrected in zip(others, tests, holm([t for t, _ in tests]), strict=True):
        higher = np.nanmean(values[i]) > np.nanmean(values[reference])
        verdict = ("higher" if higher else "lower") if corrected < 0.05 else "no difference shown"
        rows[i] = (*map(show_p, test), show_p(corrected) if len(others) > 1 else "", verdict)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def best_of(family: Sequence[RunScores]) -> int:
    """The number of the one whose mean Dice at the last sampling step is the highest."""
    return int(np.argmax([np.nanmean(scores.last(DICE)) for scores in family]))


def class_tests(first: RunScores, other: RunScores) -> list[dict[str, str]]:
    """§6.2, the Dice of one against that of another, class by class: for each class, p of the paired t-test,
    as in the paper, and after Holm's correction for the number of classes."""
    a, b = other.per_class(DICE), first.per_class(DICE)
    p = [paired(a[:, j], b[:, j])[0] for j in range(a.shape[1])]
    head = f"{other.name} against {first.name}"
    return [
        {f"{head}: t-test p": show_p(alone), f"{head}: Holm p": show_p(corrected)}
        for alone, corrected in zip(p, holm(p), strict=True)
    ]


def last_step(family: Sequence[RunScores]) -> list[dict[str, str]]:
    """Columns of a table for each of a family: Dice and distance at the last sampling step; if any of them
    has missed or invented classes, also the distance of the found ones and the numbers of the others."""
    rows, outcomes = [], [scores.outcome[:, :, -1] for scores in family]
    for scores, outcome in zip(family, outcomes, strict=True):
        row = {"Dice (%)": mean_sd(scores.last(DICE)), f"HD95 ({scores.unit})": mean_sd(scores.last(HD95))}
        if any(map(lost, outcomes)):
            row[f"HD95 of found classes ({scores.unit})"] = mean_sd(scores.found().last(HD95))
            row["missed"], row["invented"] = counts(outcome)
        rows.append(row)
    return rows


def compared(family: Sequence[RunScores], reference: int | None = None) -> list[dict[str, str]]:
    """The columns of `last_step`, and tests of Dice against the one whose number is given, or against the
    best."""
    values = [scores.last(DICE) for scores in family]
    tests = against(values, best_of(family) if reference is None else reference)
    return [row | test for row, test in zip(last_step(family), tests, strict=True)]
