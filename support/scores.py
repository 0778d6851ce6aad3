"""How are scores kept, read, grouped and compared?

evaluate.py writes a CSV file per scoring, with a line per case, sampling step and class, and a JSON file of
what was run beside it; report.py reads them. Scores are arrays [..., sampling step, foreground class]; NaN
leaves a class out of a case's mean.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import ttest_rel, wilcoxon

from support.files import InputError, one_line, replace_file


class Score(NamedTuple):
    """Scores of one case, [sampling step, foreground class]."""

    uid: str
    dice: Float[np.ndarray, "K foreground"]
    hausdorff: Float[np.ndarray, "K foreground"]


def per_case(values: Float[np.ndarray, "*K foreground"]) -> Float[np.ndarray, "*K"]:
    """Mean over the foreground classes that a case has, per sampling step; NaN where it has none."""
    return np.ma.masked_invalid(values).mean(axis=-1).filled(np.nan)


def mean_std(values: Sequence[Float[np.ndarray, "K foreground"]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the cases of the mean over classes, per sampling step."""
    cases = np.ma.masked_invalid([per_case(v) for v in values])
    return cases.mean(axis=0).filled(np.nan), cases.std(axis=0).filled(np.nan)


# --- Shown and written --------------------------------------------------------------------------


def table(rows: Sequence[tuple[str, list[Score]]], unit: str) -> str:
    """Mean Dice (percent) at each sampling step, with mean and standard deviation over the cases at
    the last, and the last step's 95 % Hausdorff distance."""
    K = max(len(scores[0].dice) for _, scores in rows)
    first = max(len(name) for name, _ in rows) + 2
    heads = [f"step {k}" for k in range(1, K + 1)]
    lines = [" " * first + "".join(h.rjust(8) for h in heads) + f"{'Dice (%)':>17}{f'HD95 ({unit})':>19}"]
    for name, scores in rows:
        mean, std = mean_std([s.dice for s in scores])
        far, far_std = mean_std([s.hausdorff for s in scores])
        steps = "".join(f"{100 * m:8.2f}" for m in mean).ljust(8 * K)
        last = f"{100 * mean[-1]:9.2f} ± {100 * std[-1]:5.2f}{far[-1]:11.2f} ± {far_std[-1]:5.2f}"
        lines.append(name.ljust(first) + steps + last)
    return "\n".join(lines)


def scores_name(split: str, checkpoint: str, sampler: str, K: int, seed: int) -> str:
    """How the files of a scoring are named."""
    return f"{split}-{checkpoint}-{sampler}-{K}-seed{seed}"


def write_scores(folder: Path, scores: list[Score], classes: Sequence[str], facts: dict) -> None:
    """A CSV file of the scores, and a JSON file of their means and of what was run (`facts`)."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["uid", "step", "class", "dice", "hausdorff_95"])
    for case in scores:
        for k, j in np.ndindex(case.dice.shape):
            values = f"{case.dice[k, j]:.6f}", f"{case.hausdorff[k, j]:.4f}"
            writer.writerow([case.uid, k + 1, classes[j + 1], *values])
    means = {}
    for name, field in (("dice", "dice"), ("hausdorff_95", "hausdorff")):
        mean, std = mean_std([getattr(s, field) for s in scores])
        means |= {f"{name}_mean": mean.tolist(), f"{name}_std": std.tolist()}
    summary = {**facts, "cases": len(scores), **means}
    what = ("split", "checkpoint", "sampler", "sampling_steps", "seed")
    path = folder / scores_name(*(facts[key] for key in what))
    replace_file(path.with_name(f"{path.name}.csv"), text.getvalue().encode())
    replace_file(path.with_name(f"{path.name}.json"), json.dumps(summary, indent=2).encode())


def read_scores_csv(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray, np.ndarray]:
    """Uids, foreground classes, and [case, K, class] Dice and distances, as they were written. Raises
    InputError."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        uids, classes = (tuple(dict.fromkeys(row[key] for row in rows)) for key in ("uid", "class"))
        shape = (len(uids), -1, len(classes))
        values = (np.array([float(row[key]) for row in rows]) for key in ("dice", "hausdorff_95"))
        dices, distances = (value.reshape(shape) for value in values)
    except (OSError, ValueError, KeyError) as error:
        fix = "delete it and run evaluate.py test again"
        raise InputError(f"{path}: damaged ({one_line(error)}); {fix}") from error
    return uids, classes, dices, distances


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


def middle(values: Float[np.ndarray, "cases"]) -> int:
    """Which case has the median value (the lower one of two)."""
    order = np.argsort(values)  # NaN last
    return int(order[(np.isfinite(values).sum() - 1) // 2])


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


TESTS = ["t-test p", "Wilcoxon p", "Holm p", "at 0.05"]


def against(values: Sequence[Float[np.ndarray, "cases"]], reference: int) -> list[list[str]]:
    """For each row the columns TESTS: p of both tests against the reference's row, the t-test's p after
    Holm's correction (where there are several), and the verdict at 0.05 by the last of the t-test's."""
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
