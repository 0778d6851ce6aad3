"""settings.py: what fits together, what a model file keeps, and the command line."""

import dataclasses
import json
import shutil

import pytest
from test_data import FACTS, sample

import evaluate
import settings
from evaluate import BLENDS
from support.disk.dataset_file import DatasetWriter
from support.disk.files import InputError, read_signed, write_signed


def parsed(*words):
    return settings.parse_config(["--dataset", "phantom_us", *words])[0]


def test_every_way_of_blending_can_be_typed():
    for blend in BLENDS:
        assert parsed("--blend", blend).blend == blend
    with pytest.raises(SystemExit):
        parsed("--blend", "nothing")


def test_an_option_is_not_abbreviated_and_an_error_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--step", "3")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "--step 3" in said


def test_a_folder_of_ones_own_is_proposed_where_only_its_name_is_typed(tmp_path, capsys):
    (tmp_path / "nerve.h5").touch()
    with pytest.raises(SystemExit):
        settings.parse_config(["--dataset", "nerve", "--data-dir", str(tmp_path)])
    assert "did you mean folder:nerve?" in capsys.readouterr().err


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
        ("channels", "16,32,64"), ("run-dir", "runs/folder-f-rec_xT"), ("init-from", "empty"),
        ("weight-decay", settings.Config.weight_decay),
    ):  # fmt: skip
        assert shown[option].endswith(f" Default: {default}.")


def test_a_model_file_of_version_1_has_the_same_facts(save_run, tmp_path):
    """There, nine settings stood twice, what the network is made from was written down, too, and newer
    settings were missing."""
    run = save_run(
        tmp_path / "run", "phantom_us", tmp_path, "diff", patch_shape=(16, 16), phantom_shape=(16, 16)
    )
    new = evaluate.load(run)
    header, arrays = read_signed(run / "best")
    config = header["config"]
    old = {name: value for name, value in config.items() if name not in ("signal", "blend")}
    twice = ("network", "dataset", "schedule", "train_timesteps", "prediction", "sampler", "sampling_steps",
             "patch_shape")  # fmt: skip
    arguments = settings.network_arguments(new.facts.config, 1, 2)
    header = {key: value for key, value in header.items() if key != "numbers"}
    header |= {name: config[name] for name in twice} | {"arguments": arguments, "config": old, "model": 1}
    write_signed(tmp_path / "old", header, arrays)
    facts = evaluate.load(tmp_path / "old").facts
    assert facts == dataclasses.replace(new.facts, numbers=())


@pytest.mark.parametrize(
    "change, says",
    [
        ({"config": {"channels": [4, 0]}}, "1 or more"),
        ({"config": {"channels": [4] * 300}}, "no more than 16"),
        ({"config": {"phantom_shape": "endless"}}, "not like"),
        ({"config": {"schedule": "steep"}}, "not one of"),
        ({"class_names": ["background"]}, "1 classes"),
        ({"channel_names": ["a", "b"]}, "2 names of channels"),
        ({"numbers": [0, -1]}, "no numbers"),
        ({"spacing": [1.0]}, "spacing"),
    ],
)
def test_facts_that_do_not_agree_are_one_line(save_run, tmp_path, change, says):
    run = save_run(
        tmp_path / "run", "phantom_us", tmp_path, "diff", patch_shape=(16, 16), phantom_shape=(16, 16)
    )
    header, arrays = read_signed(run / "best")
    for name, value in change.items():
        header[name] = header[name] | value if isinstance(value, dict) else value
    write_signed(run / "best", json.loads(json.dumps(header)), arrays)
    with pytest.raises(InputError, match=says) as error:
        evaluate.load(run)
    assert str(error.value).startswith(str(run / "best")) and "\n" not in str(error.value)
    shutil.rmtree(run)
