"""Where does a report go, and what is said before it begins?

report.py fills a folder with tables, figures and report.md, which shows them. It says beforehand what it will
predict and about how long that takes.
"""

import csv
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from support import pictures
from support.files import InputError, replace_file
from support.machine import provenance


def plain(text: str) -> str:
    """Markdown as it is printed on a terminal; commands stay as they are."""
    return re.sub(r"(`[^`]*`)|\$|\*\*", lambda found: found[1] or "", text)


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
        """Adds a paragraph, and prints it."""
        self.lines += [line, ""]
        print(f"\n{plain(line)}")

    def table(self, name: str, title: str, rows: Sequence[dict[str, str]]) -> None:
        """Adds a table, and prints it. Every row holds a cell per column, under the column's head. A column
        whose cells are all empty is left out."""
        heads = [head for head in rows[0] if any(row[head] for row in rows)]
        cells = [heads, *([row[head] for head in heads] for row in rows)]
        text = io.StringIO()
        csv.writer(text).writerows([[cell.replace("$", "") for cell in row] for row in cells])
        replace_file(self.folder / f"{name}.csv", text.getvalue().encode())
        self.text(f"**{title}** ([CSV]({name}.csv))")
        ruled = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
        self.lines += ["| " + " | ".join(row) + " |" for row in ruled] + [""]
        widths = [max(len(plain(cell)) for cell in column) for column in zip(*cells, strict=True)]
        for row in cells:
            padded = (plain(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(padded).rstrip())

    def figure(self, name: str, title: str, figure: Figure) -> None:
        """Adds a figure, with its title in the picture, too."""
        figure.suptitle(fill(title, int(16 * figure.get_figwidth())), fontsize=8)
        replace_file(self.folder / f"{name}.png", pictures.png(figure))
        self.text(f"**{title}**")
        self.lines += [f"![{title}]({name}.png)", ""]

    def missing(self, what: str, fix: str) -> None:
        """Notes what could not be made, and what would make it, or why."""
        self.lacking.append(f"- {what}: {fix}")

    def attempt(self, what: str, make: Callable, *args: object) -> None:
        """Calls make(self, ...). Where that raises InputError, the list of what is missing says why."""
        try:
            make(self, *args)
        except InputError as error:
            self.missing(what, str(error))

    def close(self) -> None:
        """Writes report.md."""
        ran = provenance()
        if self.lacking:
            self.text("## What is missing, and what would make it")
            self.text("\n".join(self.lacking))
        head = f"# Tables and figures\n\nMade on {ran['date']} at commit {ran['commit']}, {ran['devices']}."
        replace_file(self.folder / "report.md", "\n".join([head, "", *self.lines]).encode())
        print(f"\nall of it: {self.folder / 'report.md'}")


class Work(NamedTuple):
    """Something to predict, and how long that is likely to take; NaN where this is not known."""

    what: str
    seconds: float


def announce(work: Sequence[Work]) -> None:
    """Says what will be predicted, and how long it takes, before it begins."""
    known = [one.seconds for one in work if np.isfinite(one.seconds)]
    if work:
        print("to be predicted, beside what the scores hold already:", file=sys.stderr)
    for one in work:
        time = f"about {duration(one.seconds)}" if np.isfinite(one.seconds) else "no time known"
        print(f"  {one.what}: {time}", file=sys.stderr)
    if known:
        print(f"together about {duration(sum(known))}, at the pace of scoring", file=sys.stderr)
    if len(known) < len(work):
        why = "the scores are older than its record, which evaluate.py test makes"
        print(f"where no time is known, {why}", file=sys.stderr)


def duration(seconds: float) -> str:
    """A time with two or three digits: "40 s", "12 min" or "3.4 h"."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
