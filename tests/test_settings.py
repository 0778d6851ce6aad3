"""settings.py: what fits together, what a model file keeps, and the command line."""

import pytest
from made import one_line
from test_data import FACTS, sample

import settings
from support.disk.dataset_file import DatasetWriter


def test_a_folder_of_ones_own_is_proposed_where_only_its_name_is_typed(tmp_path, capsys):
    (tmp_path / "nerve.h5").touch()
    said = one_line(capsys, settings.parse_config, "--dataset", "nerve", "--data-dir", tmp_path)
    assert "did you mean folder:nerve?" in said


def test_the_help_shows_the_defaults_of_the_data_set_that_is_typed(tmp_path, monkeypatch, capsys):
    """Those of its preset, which what the file proposes replaces."""
    proposed = {"patch_shape": [24, 40], "foreground": 0.33}
    with DatasetWriter(tmp_path / "f.h5", **FACTS, settings=proposed) as writer:
        writer.add("train", **sample()._asdict())
    words = ["--dataset", "folder:f", "--data-dir", str(tmp_path), "--steps", "7", "--help"]
    monkeypatch.setenv("COLUMNS", "999")  # so that no default is broken at a hyphen
    with pytest.raises(SystemExit) as stop:
        settings.parse_config(words)
    options = capsys.readouterr().out.split("\n  --")[1:]
    shown, preset = {text.split()[0]: text for text in options}, settings.PRESETS["folder"]
    assert stop.value.code == 0
    for option, default in (
        ("patch-shape", "24,40"), ("foreground", "0.33"), ("steps", preset["steps"]),
        ("channels", "16,32,64"), ("run-dir", "runs/folder-f-rec_xT"),
        ("weight-decay", settings.Config.weight_decay),
    ):  # fmt: skip
        assert shown[option].endswith(f" Default: {default}.")
    assert shown["init-from"].endswith(" Empty by default.")
