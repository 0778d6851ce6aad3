"""Writes the tables, figures and answers of docs/results.md, and the first table and picture of the README:

    python experiments/results.py

reads the scores in docs/finding/, which finding.py and nnunet.py leave there, and replaces what stands
between the comments "made by experiments/results.py" and "end" in both pages. The same scores give the
same pages.
"""

import argparse
import json
import re
import sys
import textwrap
from itertools import chain
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from compare import HERE
from finding import (
    CLAIMS, TOLD, Effect, Results, corrected, effects, figure_of, means_of, read_rows,
    row, short, verdict,
)  # fmt: skip
from matplotlib.figure import Figure

from strategies import STRATEGIES
from support.command_line import described
from support.files import InputError, program, replace_file
from support.pictures import png
from support.scores import show_p

FOLDER = HERE / "docs" / "finding"
WHAT = {"no_diff": "nothing; it sees the image alone", "diff": "the truth with noise",
        "sc_xt": "the same, with a first prediction beside it",
        "sc_xt1": "the same, the prediction being one step earlier",
        "rec_xt1": "a re-noised prediction, made from the noised truth",
        "rec_xT": "a re-noised prediction, made from noise"}  # fmt: skip


class Study(NamedTuple):
    """What the trainings on one data set say."""

    name: str
    facts: dict
    results: Results
    effects: dict[tuple[str, str, str], Effect | None]
    p: dict[tuple[str, str, str], float]  # corrected for all effects of the data set

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.results.rows})

    def verdict(self, claim: str, told: str) -> str:
        return verdict(claim, told, self.effects, self.p, len(self.seeds))

    def cell(self, *key: str) -> str:
        """An effect and its interval; in bold type where its corrected p is below 0.05."""
        effect = self.effects.get(key)
        if effect is None:
            return ""
        text = f"{effect.mean:+.2f} ({effect.low:+.2f} to {effect.high:+.2f})"
        text = f"**{text}**" if self.p[key] < 0.05 else text
        return text if effect.seeds == len(self.seeds) else f"{text}, {effect.seeds} seeds"


def read(path: Path) -> Study:
    results = Results(read_rows(path))
    found = effects(results)
    facts = json.loads(path.with_suffix(".json").read_text())
    seeds = len({run.seed for run in results.rows})
    return Study(path.stem, facts, results, found, corrected(found, seeds))


# --- Tables -------------------------------------------------------------------------------------


def table(head: list[str], lines: list[list]) -> list[str]:
    return [row(*head), "|---" * len(head) + "|", *(row(*line) for line in lines)]


def trainings(studies: list[Study]) -> list[str]:
    """What was trained."""
    lines = []
    for study in studies:
        ran = study.facts["runs"].values()
        runs = study.results.rows
        cases = len({cells[4] for rows in runs.values() for cells in rows})
        facts = [(one["steps"], one["devices"], short(one["commit"])) for one in ran]
        said = [", ".join(sorted(set(map(str, values)))) for values in zip(*facts, strict=True)]
        page = f"[{study.name}](finding/{study.name}.md)"
        lines.append([page, len(runs), ", ".join(map(str, study.seeds)), cases, *said, study.facts["source"]])
    head = ["data set", "trainings", "seeds", "test cases", "steps", "hardware", "commit", "source"]
    return table(head, lines)


def columns(studies: list[Study]) -> list[tuple[Study, str]]:
    return [(study, told) for study in studies for told in TOLD]


def heads(studies: list[Study]) -> list[str]:
    return [f"{study.name}, {told}" for study, told in columns(studies)]


def claims(studies: list[Study]) -> list[str]:
    lines = [
        [f"{claim}. {text}", *(study.verdict(claim, told) for study, told in columns(studies))]
        for claim, text in CLAIMS.items()
    ]
    return table(["claim of the paper", *heads(studies)], lines)


SAYS = {
    "reproduced": "is reproduced on",
    "not reproduced": "is not reproduced on",
    "undecided": "is undecided on",
    "not all run": "is open, since not all of it was trained, on",
}


def answer(studies: list[Study], claim: str) -> list[str]:
    """One sentence: where a claim is reproduced, where not, and where that is not known."""
    parts = []
    for says, words in SAYS.items():
        places = []
        for study in studies:
            told = [told for told in TOLD if study.verdict(claim, told) == says]
            if told:
                places.append(f"{study.name} ({' and '.join(told)})")
        if places:
            parts.append(f"{words} {' and '.join(places)}")
    said = f"**Claim {claim} ({CLAIMS[claim]})** {'; it '.join(parts)}."
    return [*textwrap.wrap(said, 100, break_long_words=False, break_on_hyphens=False), ""]


def effects_table(studies: list[Study], *wanted: str) -> list[str]:
    """The effects of some claims, a column per data set and embedding."""
    names = dict.fromkeys((c, name) for s in studies for c, _, name in s.effects if c in wanted)
    lines = []
    for claim, name in names:
        cells = [study.cell(claim, told, name) for study, told in columns(studies)]
        if any(cells):
            lines.append([claim, name, *cells])
    return table(["claim", "effect", *heads(studies)], lines)


def embeddings_table(studies: list[Study]) -> list[str]:
    lines = [
        [study.name, key[2], study.cell(*key), show_p(effect.p), show_p(study.p[key]), effect.seeds]
        for study in studies
        for key, effect in study.effects.items()
        if effect and key[0] == "t"
    ]
    return table(["data set", "effect", "mean (95 % interval)", "p", "Holm p", "seeds"], lines)


def first_table(studies: list[Study]) -> list[str]:
    """The README's: Dice at the first and last step (told t, DDPM), and the change with its interval."""

    def cell(study: Study, name: str) -> str:
        means = means_of(study.results, name, "told t", "ddpm")
        if not means:
            return "-"
        if name == "no_diff":
            return f"{np.mean(means):.1f}"
        first, *_, last, _ = np.mean(means, axis=0)
        gain = study.effects["1", "told t", f"{name}, last step minus first"]
        if not gain:
            return "-"
        change = f"{gain.mean:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})"
        few = f"; {gain.seeds} seeds" if gain.seeds < len(study.seeds) else ""
        return f"{first:.1f} → {last:.1f}: {change}{few}"

    earlier = (HERE / "docs" / "earlier.md").read_text().splitlines()

    def made_up(name: str) -> str:
        """From the first table of the earlier runs, whose scores of single cases were not kept."""
        cells = next(line for line in earlier if line.startswith(f"{name} ")).split()
        if name == "no_diff":
            return cells[1]
        first, last = cells[2], cells[6]
        return f"{first} → {last}: {float(last) - float(first):+.2f}"

    lines = []
    for name, strategy in STRATEGIES.items():
        title = strategy.title.replace("$", "")
        scores = [made_up(name), *(cell(study, name) for study in studies)]
        lines.append([f"`{name}`", title, WHAT[name], *scores])
    names = ["made-up images", *(study.name for study in studies)]
    return table(["`--strategy`", "the paper's name", "what the last pass denoises", *names], lines)


# --- Figures ------------------------------------------------------------------------------------


def forests(studies: list[Study], *wanted: str) -> Figure:
    """The effects of some claims, a panel per data set. A full marker is beyond doubt after correction."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    for axes, study in zip(figure.subplots(1, len(studies), squeeze=False)[0], studies, strict=True):
        known = [key for key, effect in study.effects.items() if effect and key[0] in wanted]
        labels = []
        for y, key in enumerate(known):
            effect, sure = study.effects[key], study.p[key] < 0.05
            axes.plot([effect.low, effect.high], [-y, -y], color="tab:blue", linewidth=1.5)
            face = "tab:blue" if sure else "white"
            axes.plot(effect.mean, -y, "o", color="tab:blue", markerfacecolor=face, markersize=6)
            few = f", {effect.seeds} seeds" if effect.seeds < len(study.seeds) else ""
            labels.append(f"{key[2]}{'' if key[0] == 't' else f', {key[1]}'}{few}")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks([-y for y in range(len(known))], labels, fontsize=8)
        axes.set_title(study.name, fontsize=9)
        axes.set_xlabel("points of Dice, 95 % interval")
    return figure


# --- The pages ----------------------------------------------------------------------------------


def filled(path: Path, **blocks: list[str]) -> bytes:
    """A page with each of its marked blocks replaced. Raises InputError unless it has just these."""
    pattern = r"(<!-- made by experiments/results\.py: (\w+) -->)\n.*?<!-- end -->"
    page = path.read_text()
    if sorted(name for _, name in re.findall(pattern, page, re.S)) != sorted(blocks):
        raise InputError(f"{path}: the marks of the blocks {', '.join(blocks)} must be there once each")

    def block(match: re.Match) -> str:
        return f"{match[1]}\n\n" + "\n".join(blocks[match[2]]) + "\n\n<!-- end -->"

    return re.sub(pattern, block, page, flags=re.S).encode()


def pages() -> dict[Path, bytes]:
    """The new content of every page and picture."""
    paths = [path for path in sorted(FOLDER.glob("*.csv")) if not path.stem.startswith("nnunet-")]
    studies = list(map(read, paths))
    beside = (FOLDER / "nnunet-hippocampus_mr.md").read_text()
    results = filled(
        HERE / "docs" / "results.md",
        trainings=trainings(studies),
        claims=claims(studies),
        steps=[*answer(studies, "1"), *effects_table(studies, "1")],
        end=[*chain(*(answer(studies, claim) for claim in "234")), *effects_table(studies, *"234")],
        ddim=[*answer(studies, "5"), *effects_table(studies, "5")],
        embeddings=embeddings_table(studies),
        nnunet=beside.splitlines()[2:],
    )
    return {
        HERE / "docs" / "results.md": results,
        HERE / "README.md": filled(HERE / "README.md", first=first_table(studies)),
        FOLDER / "steps.png": png(figure_of({study.name: study.results for study in studies})),
        FOLDER / "end.png": png(forests(studies, *"234")),
        FOLDER / "embeddings.png": png(forests(studies, "t")),
    }


def main() -> None:
    argparse.ArgumentParser(**described(__doc__)).parse_args()
    with program():
        for path, content in pages().items():
            replace_file(path, content)


if __name__ == "__main__":
    main()
