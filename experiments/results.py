"""Writes the tables of docs/results.md and docs/finding/signal.md, the README's table of scores, and the
picture, from the scores of the plan's trainings:

    python experiments/results.py

reads docs/finding/, which finding.py fills, and replaces what stands between the comments "made by
experiments/results.py" and "end" in the pages. It can be run while trainings are still missing: what cannot
be said yet is marked. The same scores give the same pages.
"""

import json
import re
import sys
from collections.abc import Collection
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from compare import HERE
from finding import PLAIN, PLAN, TWO, Effect, Run, random_effects, read_rows
from jaxtyping import Float
from matplotlib.figure import Figure

from strategies import STRATEGIES
from support.disk.command_line import Parser
from support.disk.files import InputError, program, replace_file
from support.results.pictures import png, style
from support.results.scores import as_markdown, holm, show_p

PAGES = HERE / "README.md", HERE / "docs" / "results.md", HERE / "docs" / "finding" / "signal.md"
SEEDS = 3  # per training of the plan
STEPS = 5  # of sampling
LARGE = "b = 16"
SIGNALS = {"b = 1/4": 0.25, PLAIN: 1, "b = 4": 4, LARGE: 16}
DIFFUSION = [name for name, strategy in STRATEGIES.items() if strategy.noisy_mask]
# A patch of the paper, and one of the data set.
PATCHES = {
    "phantom_us": ((480, 512), (32, 32)),
    "hippocampus_2mm": ((128, 128, 128), (16, 24, 16)),
    "nerve_64": ((480, 512), (64, 67)),
}
KINDS = {"phantom_us": "made-up images", "hippocampus_2mm": "MR", "nerve_64": "ultrasound"}
# What question (b) compares.
SIZES = {
    "phantom_us": ("64 x 64 with b = 2 minus 32 x 32 with b = 4", "b = 2, 64 x 64", "b = 4"),
    "hippocampus_2mm": ("1 mm with b = 1 minus 2 mm with b = 2.8", "1 mm", "b = 2.8"),
}
GIVEN_AWAY = "diff, first step from the truth's x_T minus from noise"
GROWN = "b = 16 minus b = 1"
CLAIMS = {
    "1": "`rec_xT` alone gets better over the steps",
    "2": "it ends best of the diffusion strategies",
    "3": "it is on par with the plain U-Net",
    "4": "the ensemble of both is better than either",
    "5": "the same with DDIM",
}

# --- Effects ------------------------------------------------------------------------------------

Dice = Float[np.ndarray, "seeds cases"]  # in points; NaN is what there is not
Key = tuple[str, str, str]  # the claim or question, the signal or what is compared, and the effect
# The effects that a question is answered by; what is compared for (b) depends on the data set.
ANSWERS: dict[str, list[Key]] = {
    "a": [*(("a", GROWN, f"{name}, last step") for name in TWO),
          *(("2", b, "rec_xT minus diff") for b in (PLAIN, LARGE))],
    "b": [*(("b", "", f"{name}, gain") for name in TWO), ("b", "", "rec_xT minus diff, last step")],
    "d": [("d", b, GIVEN_AWAY) for b in (PLAIN, LARGE)],
}  # fmt: skip


def effect_of(values: Dice) -> Effect | None:
    """The mean over the seeds that have any cases, and the cases that each of these has; None with fewer than
    two of either."""
    values = values[np.isfinite(values).any(axis=1)]
    values = values[:, np.isfinite(values).all(axis=0)]
    return random_effects(values) if min(values.shape) > 1 else None


class Study:
    """What the trainings on one data set say."""

    def __init__(self, name: str, rows: dict[Run, list[list[str]]]):
        self.name, self.rows = name, rows
        self.seeds = sorted({run.seed for run in rows})
        self.cases = sorted({line[4] for lines in rows.values() for line in lines})
        self.effects = {key: effect_of(values) for key, values in self.planned().items()}
        # What does not have all its seeds counts as p = 1: what is significant stays so when more is trained.
        p = [effect.p if effect and effect.seeds == SEEDS else 1.0 for effect in self.effects.values()]
        self.p = dict(zip(self.effects, holm(p), strict=True))

    def last(self, strategy: str, variant: str = PLAIN, sampler: str = "ddpm", step: int = STEPS) -> Dice:
        """Dice at the last step, or at another; after the last one comes that of the mean with no_diff, whose
        own Dice has no sampler. A case without foreground has none."""
        found = np.full((len(self.seeds), len(self.cases)), np.nan)
        for run, lines in self.rows.items():
            for line in lines if run[:2] == (strategy, variant) else ():
                steps = line[5:] if len(line) >= 5 + STEPS else [np.nan] * (STEPS - 1) + line[5:]
                if line[3] in ("", sampler) and step <= len(steps):
                    place = self.seeds.index(run.seed), self.cases.index(line[4])
                    found[place] = 100 * float(steps[step - 1])
        return found

    def first(self, strategy: str, variant: str = PLAIN, sampler: str = "ddpm") -> Dice:
        """Dice at the first step, which a strategy of a single one, the last, does not have."""
        return self.last(strategy, variant, sampler, step=1)

    def gain(self, strategy: str, variant: str = PLAIN, sampler: str = "ddpm") -> Dice:
        """Dice at the last step minus that at the first."""
        return self.last(strategy, variant, sampler) - self.first(strategy, variant, sampler)

    def planned(self) -> dict[Key, Dice]:
        """The values of every effect of the plan."""
        last, gain, found = self.last, self.gain, {}
        for b in (PLAIN, LARGE):
            for strategy in DIFFUSION:
                found["1", b, f"{strategy}, last step minus first"] = gain(strategy, b)
            for other in DIFFUSION[:-1]:
                found["2", b, f"rec_xT minus {other}"] = last("rec_xT", b) - last(other, b)
            found["3", b, "rec_xT minus no_diff"] = last("rec_xT", b) - last("no_diff")
            both = last("rec_xT", b, step=STEPS + 1)
            found["4", b, "mean of both minus no_diff"] = both - last("no_diff")
            found["4", b, "mean of both minus rec_xT"] = both - last("rec_xT", b)
            found["5", b, "rec_xT, last step minus first"] = gain("rec_xT", b, "ddim")
            found["5", b, "rec_xT minus diff"] = last("rec_xT", b, "ddim") - last("diff", b, "ddim")
        for name, score in (("first step", self.first), ("last step", last), ("gain", gain)):
            grown = {strategy: score(strategy, LARGE) - score(strategy) for strategy in TWO}
            grown["diff minus rec_xT"] = grown["diff"] - grown["rec_xT"]
            for what, values in grown.items():
                found["a", GROWN, f"{what}, {name}"] = values
        if self.name in SIZES:
            title, large, small = SIZES[self.name]
            for strategy in TWO:
                found["b", title, f"{strategy}, gain"] = gain(strategy, large) - gain(strategy, small)
            at_large, at_small = (last("rec_xT", size) - last("diff", size) for size in (large, small))
            found["b", title, "rec_xT minus diff, last step"] = at_large - at_small
        if self.name == "hippocampus_2mm":
            for length, strategy in product(("500 steps", "4000 steps"), TWO):
                found["c", length, f"{strategy}, gain"] = gain(strategy, length)
            for other in ("diff", "no_diff"):
                name = f"rec_xT after 1000 steps minus {other} after 1400, last step"
                found["c", "the same time", name] = last("rec_xT") - last(other, "1400 steps")
        for b in SIGNALS:
            for k in range(1, STEPS):
                change = last("diff", b, step=k + 1) - last("diff", b, step=k)
                found["d", b, f"diff, step {k + 1} minus step {k}"] = change
            truth, noise = (last("diff", b, f"x_T from {source}") for source in ("truth", "noise"))
            found["d", b, GIVEN_AWAY] = truth - noise
        return found

    def known(self, question: str, about: str) -> tuple[dict[str, Effect], bool]:
        """The effects of a question that have all seeds, and whether these are all of them."""
        mine = {key[2]: effect for key, effect in self.effects.items() if key[:2] == (question, about)}
        known = {name: effect for name, effect in mine.items() if effect and effect.seeds == SEEDS}
        return known, len(known) == len(mine)


def studies_of(folder: Path) -> list[Study]:
    """A study per data set that has scores; what was trained at 1 mm stands beside what was at 2 mm."""
    rows = {name: read_rows(folder / f"{name}.csv") for name in PATCHES}
    for run, lines in read_rows(folder / "hippocampus_1mm.csv").items():
        rows["hippocampus_2mm"][run._replace(variant="1 mm")] = lines
    return [Study(name, found) for name, found in rows.items() if found]


# --- What they say ------------------------------------------------------------------------------


def within_two_points(effects: Collection[Effect]) -> tuple[bool, bool]:
    """Whether all intervals lie within -2 to 2, and whether one lies outside."""
    inside = [effect.low > -2 and effect.high < 2 for effect in effects]
    return all(inside), any(effect.low > 2 or effect.high < -2 for effect in effects)


def verdict(study: Study, claim: str, b: str) -> str:
    """Whether a claim of the paper is reproduced, by the rules of the plan. One effect can speak against a
    claim; for it, all must be known."""
    known, whole = study.known(claim, b)
    if claim == "3":
        shown, against = within_two_points(known.values())
    else:
        sure = {name: effect.mean for name, effect in known.items() if study.p[claim, b, name] < 0.05}
        others = {name for name in known if claim == "1" and not name.startswith("rec_xT,")}
        against = any(mean > 0 if name in others else mean < 0 for name, mean in sure.items())
        shown = all(sure.get(name, 0) > 0 for name in known.keys() - others)
    if against:
        return "not reproduced"
    return ("reproduced" if shown else "undecided") if whole else "not all run"


def reading(study: Study, question: str) -> str:
    """Whether a question's effects speak for the explanation, by the rules of the plan."""
    about = next((key[1] for key in study.effects if key[0] == question), "")
    known, whole = study.known(question, LARGE if question == "d" else about)
    if not known or not whole:
        return "-" if whole else "not all run"
    if question == "a":
        more = known["diff minus rec_xT, last step"]
        shown, against = more.high < 0 and known["diff, last step"].high < 0, more.high >= 0
    elif question == "b":
        shown, against = within_two_points(known.values())
    else:
        shown, against = known[GIVEN_AWAY].low > 2, known[GIVEN_AWAY].high <= 2
    return "for it" if shown else "against it" if against else "undecided"


# --- Tables -------------------------------------------------------------------------------------


def table(
    head: list[str], lines: list[list[str]], nothing: str = "No effect has two seeds yet."
) -> list[str]:
    """A table; without any row it is the sentence `nothing`."""
    if not lines:
        return [nothing, ""]
    return [*as_markdown([head, *lines]), ""]


def interval(effect: Effect) -> str:
    """An effect and its interval."""
    return f"{effect.mean:+.2f} ({effect.low:+.2f} to {effect.high:+.2f})"


def cell(study: Study, key: Key) -> str:
    """An effect and its interval, in bold type if its corrected p is below 0.05."""
    effect = study.effects[key]
    if effect is None:
        return "fewer than two seeds"
    text = f"**{interval(effect)}**" if study.p[key] < 0.05 else interval(effect)
    return text if effect.seeds == SEEDS else f"{text}, {effect.seeds} seeds"


def columns_of(studies: list[Study]) -> dict[str, tuple[Study, str]]:
    """The data sets at the paper's signal and at the largest one, by how a table calls them."""
    return {f"{study.name}, {b}": (study, b) for study in studies for b in (PLAIN, LARGE)}


def ends(study: Study, strategy: str, variant: str) -> str:
    """Mean Dice at the first and last sampling step, or at the only one; and how many seeds, if not all."""
    steps = study.first(strategy, variant), study.last(strategy, variant)
    known = [dice for dice in steps if np.isfinite(dice).any()]
    if not known:
        return "-"
    text = " → ".join(f"{np.nanmean(dice):.1f}" for dice in known)
    seeds = np.isfinite(known[-1]).any(axis=1).sum()
    return text if seeds == SEEDS else f"{text} ({seeds} of {SEEDS} seeds)"


def scores(studies: list[Study]) -> list[str]:
    """Mean Dice of each strategy; that of the plain U-Net does not depend on b."""
    columns, lines = columns_of(studies), []
    for name in STRATEGIES:
        cells = [ends(study, name, PLAIN if name == "no_diff" else b) for study, b in columns.values()]
        lines.append([f"`{name}`", *cells])
    return table(["strategy", *columns], lines)


def verdicts(studies: list[Study]) -> list[str]:
    """What the trainings say of the paper's claims, and of the explanation."""
    columns, lines = columns_of(studies), []
    for claim, text in CLAIMS.items():
        lines.append([f"{claim}. {text}", *(verdict(study, claim, b) for study, b in columns.values())])
    return table(["claim of the paper", *columns], lines)


def claims(studies: list[Study]) -> list[str]:
    """The effects that the verdicts rest on, if there are two seeds anywhere."""
    columns, lines = columns_of(studies), []
    for claim, signal, name in studies[0].effects:
        if claim in CLAIMS and signal == PLAIN:
            keys = [(study, (claim, b, name)) for study, b in columns.values()]
            if any(study.effects[key] for study, key in keys):
                lines.append([claim, name, *(cell(study, key) for study, key in keys)])
    return table(["claim", "effect", *columns], lines)


def answers(studies: list[Study]) -> list[str]:
    """The effects that the questions are answered by, and what they say of the explanation."""
    lines = []
    for letter, keys in ANSWERS.items():
        for claim, about, name in keys:
            cells = []
            for study in studies:
                mine = [key for key in study.effects if key[0] == claim and key[2] == name]
                shown = [cell(study, key) for key in mine if about in ("", key[1])]
                cells.append(shown[0] if shown else "-")
            lines.append([f"({letter}) {about or 'the two sizes'}: {name}", *cells])
        says = (reading(study, letter) for study in studies)
        lines.append([f"({letter}) **the explanation**", *says])
    return table(["question and effect", *(study.name for study in studies)], lines)


def question(studies: list[Study], letter: str) -> list[str]:
    """The effects of a question on the data sets that have it."""
    usual = [("1", PLAIN, f"{strategy}, last step minus first") for strategy in TWO]  # after 1000 steps
    lines = []
    for study in studies:
        mine = [key for key in study.effects if key[0] == letter]
        for key in [*usual, *mine] if mine and letter == "c" else mine:
            if effect := study.effects[key]:
                p = show_p(effect.p), show_p(study.p[key])
                lines.append([study.name, *key[1:], cell(study, key), *p])
    return table(["data set", "", "effect", "mean (95 % interval)", "p", "Holm p"], lines)


def trainings(folder: Path, planned: dict[str, int]) -> list[str]:
    """What was trained of the planned number, by the names of the files of scores."""
    lines = []
    for name, number in planned.items():
        if not (runs := read_rows(folder / f"{name}.csv")):
            continue
        facts = json.loads((folder / f"{name}.json").read_text())
        ran = [[one["steps"], one["devices"], one["commit"]] for one in facts["runs"].values()]
        sets = [{run.seed for run in runs}, *map(set, zip(*ran, strict=True))]
        seeds, steps, devices, commits = (", ".join(map(str, sorted(values))) for values in sets)
        commits = re.sub(r"\b(\w{10})\w{30}\b", r"\1", commits)
        link, count = f"[{name}]({name}.csv)", f"{len(runs)} of {number}"
        lines.append([link, count, seeds, steps, devices, commits, facts["source"]])
    heads = ["data set", "trainings", "seeds", "steps", "hardware", "commits", "source"]
    return table(heads, lines, "Nothing is trained yet.")


# --- The picture and the page -------------------------------------------------------------------


def figure_of(studies: list[Study]) -> Figure:
    """Dice at the last step, and the gain over the steps, against b, with 95 % intervals. The vertical line
    is the b at which a small image's mask gives away what one of the paper's does."""
    figure = Figure(figsize=(1 + 4 * len(studies), 6.2), layout="constrained")
    grid = figure.subplots(2, len(studies), squeeze=False, sharex=True)
    for panels, study in zip(grid.T, studies, strict=True):
        for axes, score in zip(panels, (study.last, study.gain), strict=True):
            for number, strategy in enumerate(DIFFUSION, 1):
                effects = [(b, effect_of(score(strategy, name))) for name, b in SIGNALS.items()]
                beside = 1.05 ** (number - 3)  # so that no interval hides another
                drawn = [(b * beside, e.mean, e.high - e.mean) for b, e in effects if e]
                x, mean, reach = np.reshape(drawn, (-1, 3)).T
                axes.errorbar(x, mean, reach, label=strategy, capsize=2, **style(strategy))
            paper, own = map(np.prod, PATCHES[study.name])
            axes.axvline(
                np.sqrt(paper / own), color="grey", linestyle=":", label="the paper's size, by calculation"
            )
            axes.set_xscale("log", base=4)
            axes.set_xticks(list(SIGNALS.values()), ["1/4", "1", "4", "16"])
        if plain := effect_of(study.last("no_diff")):
            panels[0].axhline(plain.mean, color="black", linestyle="--", linewidth=1, label="no_diff")
        panels[1].axhline(0, color="black", linewidth=0.8)
        panels[0].set_title(f"{study.name}: {KINDS[study.name]}", fontsize=10)
        panels[1].set_xlabel("b, the strength of the mask against the noise")
    grid[0, 0].set_ylabel("Dice at the last step (%)")
    grid[1, 0].set_ylabel("gain: last step minus first (points)")
    lines = grid[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def filled(path: Path, **blocks: list[str]) -> bytes:
    """A page with its marked blocks replaced. Raises InputError unless each of them is there once."""
    page = path.read_text()
    for name, lines in blocks.items():
        pattern = rf"(<!-- made by experiments/\w+\.py: {name} -->)\n.*?(<!-- end -->)"
        made = "\n".join(["", "", *lines, ""])
        page, count = re.subn(pattern, lambda marks, made=made: marks[1] + made + marks[2], page, flags=re.S)
        if count != 1:
            raise InputError(f"{path}: the marks of the block {name} must be there once")
    return page.encode()


def pages(readme: Path, page: Path, effects: Path) -> dict[Path, bytes]:
    """The new content of the pages and of the picture beside the scores. Raises InputError."""
    folder, studies = effects.parent, studies_of(effects.parent)
    planned = {name.removeprefix("folder:"): SEEDS * len(pairs) for name, pairs in PLAN.items()}
    letters = {"signals": "a", "size": "b", "lengths": "c", "steps": "d"}
    blocks = {name: question(studies, letter) for name, letter in letters.items()}
    return {
        readme: filled(readme, scores=scores(studies)),
        page: filled(page, answers=answers(studies), claims=verdicts(studies)),
        effects: filled(effects, trainings=trainings(folder, planned), claims=claims(studies), **blocks),
        folder / "signal.png": png(figure_of(studies)),
    }


def main() -> None:
    Parser(__doc__).parse_args()
    with program():
        for path, content in pages(*PAGES).items():
            replace_file(path, content)


if __name__ == "__main__":
    main()
