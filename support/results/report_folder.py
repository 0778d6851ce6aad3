"""Where does a report go? report.py fills a folder with tables, figures and report.md, which shows them."""

import csv
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from urllib.parse import quote

from matplotlib.figure import Figure

from support.disk.files import InputError, replace_file, writing
from support.machine.devices import provenance
from support.results.pictures import png
from support.results.scores import as_markdown, as_text, filled_columns


def plain(text: str) -> str:
    """Markdown as it is printed on a terminal; commands stay as they are."""
    return re.sub(r"(`[^`]*`)|\$|\*\*", lambda found: found[1] or "", text)


class Report:
    """A folder of tables (CSV) and figures (PNG), each written when it is made, and of report.md, which
    shows them all and is written last. Raises InputError at once if the folder cannot be written."""

    def __init__(self, folder: Path):
        with writing(folder):
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
        """Adds a table, and prints it, without the columns whose cells are all empty."""
        cells = filled_columns(rows)
        text = io.StringIO()
        csv.writer(text).writerows([[cell.replace("$", "") for cell in row] for row in cells])
        replace_file(self.folder / f"{name}.csv", text.getvalue().encode())
        self.text(f"**{title}** ([CSV]({quote(name)}.csv))")
        self.lines += [*as_markdown(cells), ""]
        print(as_text([[*map(plain, row)] for row in cells]))

    def figure(self, name: str, title: str, figure: Figure) -> None:
        """Adds a figure, with its title in the picture, too."""
        figure.suptitle(fill(title, int(16 * figure.get_figwidth())), fontsize=8)
        replace_file(self.folder / f"{name}.png", png(figure))
        self.text(f"**{title}**")
        self.lines += [f"![{title}]({quote(name)}.png)", ""]

    def missing(self, what: str, fix: str) -> None:
        """Notes what could not be made, and what would make it, or why."""
        self.lacking.append(f"- {what}: {fix}")

    def attempt(self, what: str, make: Callable, *args: object) -> None:
        """Calls make(self, ...). If that raises InputError, the list of what is missing says why."""
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
        text = "\n".join([head, "", *self.lines])
        # In a forced ASCII locale, the names of folders come with surrogates in place of umlauts.
        replace_file(self.folder / "report.md", text.encode(errors="surrogateescape"))
        print(f"\nall of it: {self.folder / 'report.md'}")
