"""The documentation names nothing that does not exist: commands and their options, links, files, functions,
tests and equation labels, in README.md, CONTRIBUTING.md, docs/ and the text of the notebook."""

import argparse
import json
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from pydoc import locate
from unittest import mock

import pytest
from test_house import sources

import train

HERE = Path(__file__).parent.parent
PROSE = [HERE / "README.md", HERE / "CONTRIBUTING.md", *sorted((HERE / "docs").glob("*.md"))]
NOTEBOOK = HERE / "walkthrough.ipynb"
TO_BE_WRITTEN = {"recipes/squares_us.py", "report.md"}  # by the reader of "Change it"; by report.py
# What a page may name if it says where they are: scripts of the measurements of November 2026.
TAG = "`measured-2026-11`"
GONE = {f"experiments/{name}.py" for name in ("authors", "passes", "patches", "pytorch")}
TESTS = "".join(path.read_text() for path in sorted((HERE / "tests").glob("test_*.py")))
SOURCES = "".join(sources().values())
EQUATIONS = (HERE / "strategies.py").read_text() + (HERE / "diffusion.py").read_text()


def texts():
    """The text of every page, by the path that its links start from."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    said = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return {path: path.read_text() for path in PROSE} | {NOTEBOOK: "\n\n".join(said)}


def split(text):
    """The fenced blocks of a page, and the page without them."""
    pattern = r"^```\w*\n(.*?)^```$"
    return re.findall(pattern, text, re.M | re.S), re.sub(pattern, "", text, flags=re.M | re.S)


def spans(prose):
    """What stands between single backticks, on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


# --- Commands -----------------------------------------------------------------------------------


class Parsed(BaseException):
    """Raised where a program's parser has accepted a command line; holds the words that it left over."""


def accepted(program, words):
    """Starts a program up to the end of its argument parser. Returns the words that the parser left over, or
    None where it refused the command line."""
    parse, running = argparse.ArgumentParser.parse_known_args, []

    def parse_known_args(self, args=None, namespace=None):
        running.append(self)
        result = parse(self, args, namespace)
        running.pop()
        if not running:  # a subcommand's parser runs within the program's
            raise Parsed(result[1])
        return result

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse_known_args),
        mock.patch.object(sys, "argv", [program, *words]),
        mock.patch.object(sys, "path", [str((HERE / program).parent), *sys.path]),
        mock.patch.dict(os.environ),
    ):
        try:
            if program == "train.py":
                train.parse_config(words)
            else:
                runpy.run_path(str(HERE / program))["main"]()
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit as stop:
            return None if stop.code else []
    raise AssertionError(f"{program} parses no command line")


def commands(text):
    """The words after "python" of every command on a page."""
    blocks, prose = split(text)
    lines = [line for block in blocks for line in block.splitlines()] + spans(prose)
    for line in lines:
        for part in re.split(r" && |; ", line):
            if re.match(r"(\$ )?python |[\w/]+\.py \S", part):
                words = shlex.split(part, comments=True)
                yield words[words.index("python") + 1 :] if "python" in words else words


def wrong_commands(text):
    for words in commands(text):
        if words[:2] == ["-m", "pytest"]:
            yield from (f"{w}: no such file" for w in words if "/" in w and not (HERE / w).exists())
        elif words[0] == "-m":
            yield from [] if words[1] in ("venv", "pip") else [f"python {' '.join(words)}"]
        elif not (HERE / words[0]).is_file():
            yield f"{words[0]}: no such program"
        else:
            left = accepted(words[0], words[1:])
            if left and "/" in words[0]:  # what an experiment passes on to train.py
                left = accepted("train.py", left)
            if left is None or left:
                yield f"python {' '.join(words)}: not accepted"


# --- Names --------------------------------------------------------------------------------------


def anchors(path):
    """The anchors that GitHub gives the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", split(path.read_text())[1], re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def wrong_links(text, path):
    for target in re.findall(r"\]\(([^)\s]+)\)", split(text)[1]):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        if not found.exists():
            yield f"link to {target}: no such file"
        elif anchor and anchor not in anchors(found):
            yield f"link to {target}: no such heading"


def is_option(option):
    """Whether some program says it, or makes it of the field of a class."""
    name = option.removeprefix("--").removeprefix("no-").replace("-", "_")
    return re.search(rf'"{option}"|^    {name}: ', SOURCES, re.M)


def wrong_names(text):
    prose = split(text)[1]
    modules = {path.stem for path in HERE.glob("*.py")} | {"support", "recipes"}
    for span in set(spans(prose)) - TO_BE_WRITTEN - (GONE if TAG in text else set()):
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
            if not is_option(option):
                yield f"{span}: no program has {option}"
        if re.fullmatch(r"[\w/]+\.(py|ipynb)|(docs|support|recipes|tests|experiments)/[\w/.]*", span):
            if not (HERE / span).exists():
                yield f"{span}: no such file or folder"
        elif re.fullmatch(r"\w+(\.\w+)+", span) and span.split(".")[0] in modules and not locate(span):
            yield f"{span}: no such function"
    for name in re.findall(r"\btest_\w+\b(?!\.py)", text):
        if f"def {name}(" not in TESTS:
            yield f"{name}: no such test"
    for label in re.findall(r"(?<!\w)\(([2-9][a-f]?)\)", prose):
        if f"({label})" not in EQUATIONS and f"({label}a)" not in EQUATIONS:
            yield f"({label}): no such equation in the code"


# --- The tests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PROSE, NOTEBOOK], ids=lambda path: path.name)
def test_what_is_named_exists(path, capsys):
    text = texts()[path]
    wrong = [*wrong_links(text, path), *wrong_names(text), *wrong_commands(text)]
    assert wrong == [], capsys.readouterr().err


def test_the_readme_is_short_and_prose_is_narrow():
    assert len(PROSE[0].read_text().splitlines()) <= 250
    for path in PROSE:
        lines = split(path.read_text())[1].splitlines()
        assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == [], path


def test_files_are_as_long_as_the_readme_says():
    lengths = re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", PROSE[0].read_text(), re.M)
    assert [name for name, _ in lengths] == [f"{name}.py" for name in (
        "diffusion", "unet", "strategies", "data", "evaluate", "train")]  # fmt: skip
    for name, length in lengths:
        assert int(length) == pytest.approx(len((HERE / name).read_text().splitlines()), rel=0.15), name


def test_the_notebook_is_stored_with_its_pictures():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
    assert NOTEBOOK.stat().st_size < 1e6


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """From the first cell to the last, with its runs in another folder."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    notebook = nbformat.read(NOTEBOOK, 4)
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=folder).execute()
    assert (tmp_path / "runs" / "walkthrough-rec_xT" / "best").is_file()
