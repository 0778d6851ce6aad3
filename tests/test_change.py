"""What the README and docs/change.md show works exactly as it is written there: a seventh strategy, a new
data set and a network of one's own, from raw files to masks, in a copy of the project."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

HERE = Path(__file__).parent.parent
# One process for all commands, since most of their time here is that of importing and compiling.
COMMANDS = """
import jax
jax.config.update("jax_disable_most_optimizations", True)
import evaluate, predict, prepare, report, train

prepare.main(["build", "squares_us", "--raw", "raw", "--workers", "1"])
words = ["--dataset", "squares_us", "--strategy", "rec_xs", "--network", "Plain", "--steps", "2"]
train.main([*words, "--run-dir", "run"])
evaluate.main(["test", "run", "--sampler", "ddpm"])
report.main(["compare", "run", "-o", "report"])
predict.main(["run", "raw/2.png", "-o", "masks"])
prepare.main(["download", "squares_us"])
"""


def shown(page, after):
    """The first code block of a page after some words of it."""
    text = (HERE / page).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text[text.index(after) :], re.M | re.S)[0]


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the project with all three changes, and six images with a bright square in the folder raw."""
    copy = tmp_path_factory.mktemp("changed") / "project"
    copy.mkdir()
    for path in HERE.glob("*.py"):
        shutil.copy(path, copy)
    for folder in ("support", "recipes"):
        shutil.copytree(HERE / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))

    for file, block in (
        ("strategies.py", shown("README.md", "**A seventh strategy**")),
        ("unet.py", shown("docs/change.md", "## A network")),
    ):
        (copy / file).write_text(f"{(copy / file).read_text()}\n\n{block}")
    (copy / "recipes" / "squares_us.py").write_text(shown("docs/change.md", "## A data set"))
    presets = "PRESETS: dict[str, dict] = {\n"
    text = (copy / "settings.py").read_text()
    assert presets in text
    preset = shown("docs/change.md", "in the `PRESETS`")
    (copy / "settings.py").write_text(text.replace(presets, presets + preset))

    rng = np.random.default_rng(0)
    (copy / "raw" / "labels").mkdir(parents=True)
    for i in range(6):
        label = np.zeros((16, 16), np.uint8)
        label[i : i + 6, 4:12] = 255
        image = rng.integers(0, 100, label.shape) + label // 2
        PIL.Image.fromarray(image.astype(np.uint8)).save(copy / "raw" / f"{i}.png")
        PIL.Image.fromarray(label).save(copy / "raw" / "labels" / f"{i}.png")
    return copy


def test_what_is_shown_to_be_changed_works(changed):
    ended = subprocess.run([sys.executable, "-c", COMMANDS], cwd=changed, capture_output=True, text=True)
    # The last command cannot download a data set that one draws, and says so.
    assert ended.returncode == 2 and "draw them yourself" in ended.stderr, ended.stderr
    assert "Diff. rec. x_s" in (changed / "report" / "squares_us-table1.csv").read_text()
    facts = json.loads((changed / "run" / "scores" / "test-best-ddpm-5-seed0.json").read_text())
    assert facts["config"]["network"] == "Plain" and facts["cases"] == 2
    assert PIL.Image.open(changed / "masks" / "2-mask.png").size == (16, 16)
    facts = json.loads((changed / "masks" / "2.json").read_text())
    assert facts["classes"] == {"0": "background", "1": "square"} and "own drawings" in facts["trained_on"]
