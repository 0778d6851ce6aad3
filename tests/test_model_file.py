"""Model files and training states that are damaged, of older code, or made by somebody else."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from made import mutated, quick

import data
import evaluate
import settings
import train
from support.disk import run_folder
from support.disk.files import InputError, read_signed, write_signed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with the model and the state of a run before its first step."""
    folder = tmp_path_factory.mktemp("runs")
    config, dataset = quick(run_dir=str(folder)), data.open_dataset("phantom_us", Path(), (16, 16))
    state = train.make_state(config, 1, 2)
    evaluate.save(folder / "best", state.network, settings.model_facts(config, dataset, {}))
    run_folder.save_state(folder / "last", state, {"step": 0})
    return folder


@pytest.mark.parametrize("name", ["last", "best"])
def test_no_mutated_file_is_taken_for_a_whole_one(run, tmp_path, name):
    """However it is changed, a state or a model is refused with a line that names it."""
    whole, rng, path = (run / name).read_bytes(), np.random.default_rng(0), tmp_path / name
    read = run_folder.read_state if name == "last" else evaluate.load
    for _ in range(100):
        content = mutated(whole, rng)
        if content != whole:
            path.write_bytes(content)
            with pytest.raises(InputError, match=f"{path}: "):
                read(path)


def test_a_model_that_somebody_else_made_is_refused(run, tmp_path):
    """The checksum guards against accidents. Facts and arrays changed on purpose, and signed: one line, or
    a model with these settings; nothing else, and no memory that the file does not fill."""
    header, arrays = read_signed(run / "best")
    path, rng = tmp_path / "best", np.random.default_rng(0)
    wrong = [None, -1, 0, 10**12, "x", [], [1], [10**9], {}, True, 1.5, float("nan"), [[1, 2], [3]], "ddpm"]
    for i in range(50):
        changed, content = json.loads(json.dumps(header)), arrays
        if i % 2:
            content = mutated(arrays, rng)
        else:
            place = changed if rng.integers(2) else changed["config"]
            place[str(rng.choice(list(place)))] = wrong[rng.integers(len(wrong))]
        write_signed(path, changed, content)
        try:
            evaluate.load(path)
        except InputError as error:
            assert len(str(error).splitlines()) == 1 and str(path) in str(error)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"channels": [4, 0]}, "1 or more"), ({"channels": [4] * 300}, "no more than 16"),
        ({"schedule": "steep"}, "not one of"), ({"sampler": "euler"}, "not one of"),
        ({"unit": "inch"}, "not one of"), ({"data_dir": 7}, "not of type str"),
        ({"train_timesteps": 5000}, "1001 or less"), ({"network": "Nothing"}, "needs the network Nothing"),
        ({"dataset": "liver_ct"}, "needs recipes/liver_ct.py"), ({"numbers": [0, -1]}, "no numbers"),
        ({"dataset": "folder:x", "spacing": []}, "spacing of 0 numbers"),
        ({"spacing": [1.0]}, "spacing of 1 numbers"), ({"class_names": ["background"]}, "1 classes"),
        ({"class_names": ["background", "a", "b"]}, "not a model file"), ({"config": {}}, "not a model file"),
        ({"channel_names": ["a", "b"]}, "2 names of channels"), ({"phantom_shape": "endless"}, "not like"),
        *(({"phantom_shape": shape}, "--phantom-shape") for shape in ([2 * 10**10], 5, ["x"], [[16], 16])),
        # These are refused where such images would be made.
        ({"phantom_shape": [1 << 17, 1 << 17]}, "from 16 to 1024"),
        ({"phantom_shape": [16] * 3}, "must be 2 numbers"),
    ],
)  # fmt: skip
def test_facts_that_do_not_agree_are_one_line(run, tmp_path, changes, says):
    """They are signed as they are, so that nothing is damaged."""
    header, arrays = read_signed(run / "best")
    for name, value in changes.items():
        (header["config"] if name in header["config"] else header)[name] = value
    write_signed(tmp_path / "best", header, arrays)
    with pytest.raises(InputError, match=says) as error:
        evaluate.load(tmp_path).dataset()
    assert str(error.value).startswith((f"{tmp_path / 'best'}: ", "phantom_us: "))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "header", [b"[" * 200_000, b'{"model": 1, "network": ' + b"[" * 400 + b"]" * 400 + b"}"]
)
def test_brackets_without_end_are_one_line(tmp_path, header):
    (tmp_path / "last").write_bytes(hashlib.sha256(header).hexdigest().encode() + b"\n" + header)
    for read in (run_folder.read_state, evaluate.load):
        with pytest.raises(InputError, match=r"of this program|of this version of the code") as error:
            read(tmp_path / "last")
        assert len(str(error.value).splitlines()) == 1


def test_files_of_older_code_get_one_line(run, tmp_path):
    """A checkpoint as it was before there were model files, a state given as a model, and a model as a
    state."""
    write_signed(tmp_path / "file", {"config": {}, "step": 1, "best": {"dice": 0.5, "step": 1}}, b"")
    for read, path, says in (
        (evaluate.load, tmp_path / "file", r"of this version of the code.*train"),
        (run_folder.read_state, tmp_path / "file", r"of this version of the code.*train"),
        (evaluate.load, run / "last", "not a model file"),
        (run_folder.read_state, run / "best", "not a state"),
    ):
        with pytest.raises(InputError, match=says):
            read(path)


def test_a_model_file_of_version_1_has_the_same_facts(run, tmp_path):
    """There, eight settings stood twice, what the network is made from was written down, too, and newer
    settings were missing."""
    new, (header, arrays) = evaluate.load(run), read_signed(run / "best")
    newer, config = ("signal", "blend", "foreground", "restart_at"), header["config"]
    old = {name: value for name, value in config.items() if name not in newer}
    twice = ("network", "dataset", "schedule", "train_timesteps", "prediction", "sampler", "sampling_steps",
             "patch_shape")  # fmt: skip
    arguments = settings.network_arguments(new.facts.config, 1, 2)
    header = {key: value for key, value in header.items() if key != "numbers"}
    header |= {name: config[name] for name in twice} | {"arguments": arguments, "config": old, "model": 1}
    write_signed(tmp_path / "old", header, arrays)
    assert evaluate.load(tmp_path / "old").facts == dataclasses.replace(new.facts, numbers=())
