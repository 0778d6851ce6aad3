"""What the project promises to those who change it: a new data set is one recipe and one preset. (A sixth
strategy is in test_report.py, a network of one's own in test_train.py.)"""

import json
import sys

import numpy as np
import PIL.Image
import pytest

import evaluate
import predict
import prepare
import recipes
import train

RECIPE = '''
"""Squares, one brighter than the noise about it."""

from data import SPLITS, normalise
from support.images import files_in
from support.recipe import Case, Plan, Recipe


def plan(raw):
    files = files_in(raw, ".png")
    cases = [Case(SPLITS[i % 3], p.stem, (p,), raw / "labels" / p.name) for i, p in enumerate(files)]
    return Plan(cases, prepare, (0, 255), ("background", "square"), "a test", "none", "pixel")


def prepare(volume, path):
    return volume._replace(image=normalise(volume.image))


RECIPE = Recipe(plan, prepare, "draw them yourself")
'''


@pytest.fixture
def squares(tmp_path, monkeypatch):
    """The recipe as a file of recipes/, found by its name, and images for it."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "squares_us.py").write_text(RECIPE)
    monkeypatch.setattr(recipes, "__path__", [*recipes.__path__, str(tmp_path / "more")])
    found = recipes.find()
    assert set(found) - set(recipes.RECIPES) == {"squares_us"}
    for program in (evaluate, predict, prepare):
        monkeypatch.setattr(program, "RECIPES", found)
    rng = np.random.default_rng(0)
    (tmp_path / "raw" / "labels").mkdir(parents=True)
    for i in range(6):
        label = np.zeros((16, 16), np.uint8)
        label[i : i + 6, 4:12] = 255
        image = rng.integers(0, 100, label.shape) + label // 2
        PIL.Image.fromarray(image.astype(np.uint8)).save(tmp_path / "raw" / f"{i}.png")
        PIL.Image.fromarray(label).save(tmp_path / "raw" / "labels" / f"{i}.png")
    yield tmp_path
    sys.modules.pop("recipes.squares_us")


def test_a_new_data_set_is_one_recipe_and_one_preset(squares, monkeypatch, capsys):
    """From raw files to masks, with the commands as they are."""
    small = {"patch_shape": (16, 16), "channels": (4,), "strides": (), "translation": (1, 1), "steps": 2}
    monkeypatch.setitem(train.PRESETS, "squares_us", small | {"transformer": False, "batch_size": 8})
    data, run = ["--data-dir", str(squares)], squares / "run"
    prepare.main(["build", "squares_us", "--raw", str(squares / "raw"), "--workers", "1", *data])
    train.main(["--dataset", "squares_us", "--strategy", "no_diff", "--run-dir", str(run), *data])
    evaluate.main(["test", str(run), *data])
    predict.main([str(run), str(squares / "raw" / "2.png"), "-o", str(squares / "masks")])
    assert PIL.Image.open(squares / "masks" / "2-mask.png").size == (16, 16)
    facts = json.loads((squares / "masks" / "2.json").read_text())
    assert facts["classes"] == {"0": "background", "1": "square"} and "a test" in facts["trained_on"]
    with pytest.raises(SystemExit):
        prepare.main(["download", "squares_us"])
    assert "draw them yourself" in capsys.readouterr().err
